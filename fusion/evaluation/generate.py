"""Greedy answers and answer losses of any causal language model, batched by length.

Used wherever a model is judged: a branch before and after its training, and the columns of the evaluation.

    python -m fusion.evaluation.generate MODEL "17+25="
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fusion.data import ChatExample, Message
from fusion.encoding import Encoded, encode, prompt_text
from fusion.evaluation.scores import score
from fusion.progress import track


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _shown(batches: list[list[int]], description: str | None) -> Iterable[list[int]]:
    return batches if description is None else track(batches, description, unit="batch")


def _padded(rows: Sequence[Sequence[int]], value: int, left: bool) -> torch.Tensor:
    width = max(map(len, rows))
    filled = [[value] * (width - len(r)) + list(r) if left else list(r) + [value] * (width - len(r)) for r in rows]
    return torch.tensor(filled)  # (rows, width)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[Message]],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    description: str | None = "answers",
) -> list[str]:
    """Greedy answers to `prompts` (each a list of chat messages), in their order, without special tokens.

    Prompts of like length share a batch, padded on the left; a batch ends when all its answers have. No bar where
    `description` is None.
    """
    rows = [tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False)["input_ids"] for prompt in prompts]
    answers = _continue(model, tokenizer, rows, max_new_tokens, batch_size, description)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def _continue(
    model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int, batch_size: int, description: str | None
) -> list[list[int]]:
    """The greedy tokens after each row of token ids."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers: list[list[int]] = [[] for _ in rows]
    with _evaluating(model):
        for batch in _shown(_batches([len(r) for r in rows], batch_size), description):
            chosen = [rows[i] for i in batch]
            ids = _padded(chosen, pad, left=True).to(model.device)  # (batch, longest row)
            out = model.generate(
                input_ids=ids,
                attention_mask=_padded([[1] * len(r) for r in chosen], 0, left=True).to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=None,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=pad,
            )
            for index, new in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[index] = new
    return answers


def _answer_logits(
    model: Any, encoded: Sequence[Encoded], batch_size: int, description: str | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each row: its index, logits before each answer token, the answer's ids.

    The head runs on the answer's positions alone: at Qwen's vocabulary it costs as much as a third of the layers do.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PEFT wrapper set aside
    body, head = inner.base_model, inner.get_output_embeddings()
    for batch in _shown(_batches([len(row.ids) for row in encoded], batch_size), description):
        rows = [encoded[i].ids for i in batch]
        ids = _padded(rows, 0, left=False).to(model.device)  # (batch, longest row)
        mask = _padded([[1] * len(r) for r in rows], 0, left=False).to(model.device)
        states = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (batch, row, hidden)
        for row, index in enumerate(batch):
            length, start = len(rows[row]), encoded[index].answer_start
            logits = head(states[row, start - 1 : length - 1]).float()  # (answer tokens, vocabulary)
            yield index, logits, ids[row, start:length].to(logits.device)


def answer_examples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[ChatExample],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    description: str | None = "answers",
) -> list[str]:
    """The model's greedy answer to each example, in their order: what `generate` gives, and sooner.

    The reference answer is tried as a draft first: one pass over it shows how many of its tokens greedy decoding
    would write. A row that would write all of them is answered; the others go on from where they part, token by token.
    """
    encoded = [encode(tokenizer, example) for example in examples]
    drafts = [row.ids[row.answer_start :] for row in encoded]
    accepted = [0] * len(encoded)
    with _evaluating(model):
        for index, logits, wanted in _answer_logits(model, encoded, batch_size, None):
            accepted[index] = int((logits.argmax(-1) == wanted).long().cumprod(0).sum())
    written = [draft[: min(n, max_new_tokens)] for draft, n in zip(drafts, accepted, strict=True)]
    going = [i for i, (ids, draft) in enumerate(zip(written, drafts, strict=True)) if ids != draft[:max_new_tokens]]
    rows = [encoded[i].ids[: encoded[i].answer_start] + written[i] for i in going]
    for i, new in zip(going, _continue(model, tokenizer, rows, max_new_tokens, batch_size, description), strict=True):
        written[i] = [*written[i], *new][:max_new_tokens]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


def score_examples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[ChatExample],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    description: str | None = "task score",
) -> list[float]:
    """The task score (0 to 1) of the model's greedy answer to each example, in their order."""
    answers = answer_examples(model, tokenizer, examples, max_new_tokens, batch_size, description)
    return [score(answer, example) for answer, example in zip(answers, examples, strict=True)]


def answer_losses(
    model: Any,
    tokenizer: Any,
    examples: Sequence[ChatExample],
    batch_size: int = 8,
    description: str | None = "answer loss",
) -> list[tuple[float, int]]:
    """Per example the summed loss in nats over its answer's tokens (the end token among them), and their number."""
    encoded = [encode(tokenizer, example) for example in examples]
    losses = [(0.0, 0)] * len(encoded)
    with _evaluating(model):
        for index, logits, wanted in _answer_logits(model, encoded, batch_size, description):
            losses[index] = (float(cross_entropy(logits, wanted, reduction="sum")), len(wanted))
    return losses


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, question = sys.argv[1:3]
    print(
        *generate(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            AutoTokenizer.from_pretrained(path),
            [[{"role": "user", "content": question}]],
        )
    )
