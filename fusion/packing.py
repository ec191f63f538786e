"""Training rows packed into sequences, and what their answers cost: cross-entropy, or divergence from a teacher.

`fusion.branch` and `fusion.demo_family` train on these; rows in one sequence do not see each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fusion.data import ChatExample
from fusion.encoding import encode

IGNORED = -100  # label of a position without loss
TEACHER_COLUMNS = ("teacher_ids", "teacher_logs")
REST = 1e-5  # probability that a teacher gives at least to the tokens it does not name


def training_row(tokenizer: Any, example: ChatExample) -> dict[str, Any]:
    """A row for `pack`: `input_ids`, and `labels` that are IGNORED up to the answer."""
    row = encode(tokenizer, example)
    return {"input_ids": row.ids, "labels": [IGNORED] * row.answer_start + row.ids[row.answer_start :]}


def pack(rows: Sequence[dict[str, Any]], max_length: int, pad: int) -> dict[str, torch.Tensor]:
    """Packs encoded rows into sequences of at most `max_length` tokens, as few and as even as they go.

    The longest rows come first, each into the emptiest sequence. Returns input_ids, labels and position_ids, each
    (sequences, longest sequence). Positions start again with each row; without an attention mask, transformers keeps
    rows apart by that. Padding has position 0, each its own row. Rows with a teacher's columns (fusion/teacher.py) give
    teacher_ids and teacher_logs as well, `(answer tokens, k)` in the order of the packed answers.
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

    packed = {
        "input_ids": laid_out([[t for row in bin_ for t in row["input_ids"]] for bin_ in bins], pad),
        "labels": laid_out([[t for row in bin_ for t in row["labels"]] for bin_ in bins], IGNORED),
        "position_ids": laid_out([[p for row in bin_ for p in range(len(row["input_ids"]))] for bin_ in bins], 0),
    }
    for column in TEACHER_COLUMNS:
        if column in rows[0]:
            packed[column] = torch.cat([row[column] for bin_ in bins for row in bin_])
    return packed


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The summed loss in nats of a packed batch's answer tokens, and their number.

    Where the batch has a teacher's columns it is the KL divergence from the teacher's distribution to the model's, over
    the teacher's k likeliest tokens and the rest as one.
    """
    logits, labels = answer_logits(model, batch)
    if "teacher_ids" in batch:
        loss = _divergence(logits, batch["teacher_ids"].to(logits.device), batch["teacher_logs"].to(logits.device))
    else:
        loss = cross_entropy(logits, labels, reduction="sum")
    return loss, len(labels)


def answer_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(answer tokens, vocabulary)` in float32 and the tokens themselves; the head runs on answers alone."""
    states = model.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state  # (sequences, width, hidden)
    labels = batch["labels"][:, 1:].to(states.device)
    answers = labels != IGNORED  # (sequences, width - 1)
    logits = model.lm_head(states[:, :-1][answers]).float()
    return logits, labels[answers].to(logits.device)


def _divergence(logits: torch.Tensor, ids: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """The summed KL of a teacher's `logs` `(tokens, k)` at vocabulary `ids`, what it gives the rest as one more."""
    ours = torch.log_softmax(logits, dim=1).gather(1, ids.long())  # (tokens, k)
    logs = logs.float()
    rests = [(1 - part.exp().sum(dim=1)).clamp_min(REST).log() for part in (logs, ours)]  # (tokens,) each
    within = (logs.exp() * (logs - ours)).sum()
    return within + (rests[0].exp() * (rests[0] - rests[1])).sum()
