"""Training rows packed into sequences, and the loss of their answers.

`fusion.branch` and `fusion.demo_family` train on these; rows in one sequence do not see each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fusion.data import ChatExample
from fusion.encoding import encode

IGNORED = -100  # label of a position without loss


def training_row(tokenizer: Any, example: ChatExample) -> dict[str, Any]:
    """A row for `pack`: `input_ids`, and `labels` that are IGNORED up to the answer."""
    row = encode(tokenizer, example)
    return {"input_ids": row.ids, "labels": [IGNORED] * row.answer_start + row.ids[row.answer_start :]}


def pack(rows: Sequence[dict[str, Any]], max_length: int, pad: int) -> dict[str, torch.Tensor]:
    """Packs encoded rows into sequences of at most `max_length` tokens, as few and as even as they go.

    The longest rows come first, each into the emptiest sequence. Returns input_ids, labels and position_ids, each
    (sequences, longest sequence). Positions start again with each row; without an attention mask, transformers keeps
    rows apart by that. Padding has position 0, each its own row.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    bins: list[list[dict[str, Any]]] = [[] for _ in range(-(-sum(lengths) // max_length))]
    filled = [0] * len(bins)
    for index in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        slot = min(range(len(bins)), key=filled.__getitem__)
        if filled[slot] + lengths[index] > max_length:
            slot = len(bins)
            bins.append([])
            filled.append(0)
        bins[slot].append(rows[index])
        filled[slot] += lengths[index]
    width = max(filled)

    def laid_out(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([v + [filler] * (width - len(v)) for v in values])  # (sequences, width)

    return {
        "input_ids": laid_out([[t for row in bin_ for t in row["input_ids"]] for bin_ in bins], pad),
        "labels": laid_out([[t for row in bin_ for t in row["labels"]] for bin_ in bins], IGNORED),
        "position_ids": laid_out([[p for row in bin_ for p in range(len(row["input_ids"]))] for bin_ in bins], 0),
    }


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The summed loss in nats of a packed batch's answer tokens, and their number; the head runs on those alone."""
    states = model.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state  # (sequences, width, hidden)
    labels = batch["labels"][:, 1:].to(states.device)
    answers = labels != IGNORED  # (sequences, width - 1)
    logits = model.lm_head(states[:, :-1][answers]).float()  # (answer tokens, vocabulary)
    loss = cross_entropy(logits, labels[answers].to(logits.device), reduction="sum")
    return loss, int(answers.sum())
