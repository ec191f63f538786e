"""Greedy answers and answer losses of any causal language model, batched by length.

Used wherever a model is judged: a branch before and after its training, and the columns of the evaluation. A row's
reference answer serves twice: its loss is measured, and it is the draft from which decoding starts.

    python -m fusion.evaluation.generate MODEL "17+25="
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear, pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StoppingCriteria
from transformers.masking_utils import sdpa_mask

from fusion.data import ChatExample, Message
from fusion.encoding import Encoded, encode, prompt_text
from fusion.errors import run_main
from fusion.progress import progress_bar

GROUPED = "sdpa_grouped"
DRAFT_TOKENS = 4096  # a pass over references, with its padding
FEW_ROWS = 64
LIKE = 4  # times the length of a row to which it is padded at most
STRETCH = 16  # tokens decoded between two looks at which rows have ended


@dataclass(frozen=True)
class Answered:
    """A model's greedy answer to one example, and what it makes of the reference answer.

    `nats` is the summed loss of the reference answer's `tokens` (its end mark among them).
    """

    text: str
    nats: float
    tokens: int


@dataclass(frozen=True)
class _Draft:
    """One pass over a reference answer: its loss, how much of it greedy decoding writes, and what it writes next."""

    nats: float
    tokens: int
    agreed: int
    following: int | None  # the token that greedy decoding writes in the place of the first one it does not agree to


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first, so that a lack of memory shows at once.

    None is padded to more than LIKE times its length: one long row would make every step of the others as dear as its.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == batch_size or lengths[batches[-1][0]] > LIKE * lengths[index]:
            batches.append([])
        batches[-1].append(index)
    return batches


def _padded(rows: Sequence[Sequence[int]], value: int, left: bool) -> torch.Tensor:
    width = max(map(len, rows))
    filled = [[value] * (width - len(r)) + list(r) if left else list(r) + [value] * (width - len(r)) for r in rows]
    return torch.tensor(filled)  # (rows, width)


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA over grouped keys and values as they are, `(batch, heads, length, head_dim)`.

    Where there is a mask, transformers first copies them out to one per query head: at every step, for every layer, the
    whole cache times heads / groups.
    """
    causal = attention_mask is None and query.shape[2] > 1
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=causal, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None  # (batch, length, heads, head_dim)


AttentionInterface.register(GROUPED, _grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class _FewRows(TorchFunctionMode):
    """Products of few rows as (W xᵀ)ᵀ: on a CPU BLAS reads the weights 1.1 to 1.6 times as fast that way (LOG)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and args[1].numel() and args[0].numel() <= FEW_ROWS * args[0].shape[-1]:
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            out = (weight @ x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], -1)  # (..., out)
            return out if bias is None else out + bias
        return func(*args, **(kwargs or {}))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Inference mode; on a CPU with attention over grouped keys as they are (GPU kernels want them copied out)."""
    was_training, inner = model.training, unwrapped(model)
    attention = inner.config._attn_implementation
    model.eval()
    try:
        on_cpu = inner.device.type == "cpu"
        if attention == "sdpa" and on_cpu:
            inner.set_attn_implementation(GROUPED)
        with torch.inference_mode(), _FewRows() if on_cpu else nullcontext():
            yield
    finally:
        inner.set_attn_implementation(attention)
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

    Prompts of like length share a batch, padded on the left. No bar where `description` is None.
    """
    rows = [tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=False)["input_ids"] for prompt in prompts]
    batches = _batches([len(row) for row in rows], batch_size)
    answers = [""] * len(rows)
    with _evaluating(model), _steps(description, len(batches) * max_new_tokens) as step:
        for number, batch in enumerate(batches):
            chosen = [rows[i] for i in batch]
            ids = _padded(chosen, _pad(tokenizer), left=True)  # (batch, longest row)
            mask = _padded([[1] * len(row) for row in chosen], 0, left=True)
            limits = [max_new_tokens] * len(batch)
            for index, new in zip(batch, _decode(model, tokenizer, ids, mask, limits, step), strict=True):
                answers[index] = tokenizer.decode(new, skip_special_tokens=True)
            step((number + 1) * max_new_tokens)
    return answers


def _pad(tokenizer: Any) -> int:
    pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad


def _decode(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    limits: Sequence[int],
    step: Callable[[int | None], None],
    cache: Any = None,
) -> list[list[int]]:
    """The greedy tokens after each row of `ids`, `(batch, length)`; with a `cache`, of all but its last column.

    Every STRETCH tokens the rows that have written their end mark, or as much as their own limit, leave the batch.
    """
    cache = DynamicCache() if cache is None else cache
    written: list[list[int]] = [[] for _ in limits]
    going = list(range(len(limits)))
    while going:
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=cache,
            max_new_tokens=min(STRETCH, max(limits[row] - len(written[row]) for row in going)),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=_pad(tokenizer),
            stopping_criteria=[_Watched(step)],
        ).cpu()
        new = out[:, ids.shape[1] :]  # (going, stretch)
        for row, tokens in zip(going, new.tolist(), strict=True):
            written[row] += tokens
        on = [
            place
            for place, row in enumerate(going)
            if len(written[row]) < limits[row] and tokenizer.eos_token_id not in written[row]
        ]
        if 0 < len(on) < len(going):
            cache.batch_select_indices(torch.tensor(on, device=model.device))
        going = [going[place] for place in on]
        ids, mask = out[on], torch.cat([mask[on], torch.ones_like(new[on])], dim=1)
    return [tokens[:limit] for tokens, limit in zip(written, limits, strict=True)]


class _Watched(StoppingCriteria):
    """Stops nothing: tells the bar of every token."""

    def __init__(self, step: Callable[[int | None], None]):
        self.step = step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.step(None)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextmanager
def _steps(description: str | None, total: int) -> Iterator[Callable[[int | None], None]]:
    """A bar over decoding steps, as a function that notes one more, or that so many are done; none without a text."""
    if description is None:
        yield lambda done: None
        return
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, unit="steps")
        yield lambda done: bar.advance(task) if done is None else bar.update(task, completed=done)


def _draft(model: Any, rows: Sequence[Encoded], use_cache: bool) -> tuple[list[_Draft], Any]:
    """One pass over prompts and reference answers, padded on the right; its keys and values where `use_cache`.

    The head runs on one row's answer at a time: at Qwen's vocabulary it costs as much as a third of the layers do.
    """
    inner = unwrapped(model)
    body, head = inner.base_model, inner.get_output_embeddings()
    ids = _padded([row.ids for row in rows], 0, left=False).to(model.device)  # (batch, longest row)
    mask = _padded([[1] * len(row.ids) for row in rows], 0, left=False).to(model.device)
    out = body(input_ids=ids, attention_mask=mask, use_cache=use_cache)
    drafts = []
    for index, row in enumerate(rows):
        states = out.last_hidden_state[index, row.answer_start - 1 : len(row.ids) - 1]  # (answer tokens, hidden)
        logits = head(states).float()  # (answer tokens, vocabulary)
        wanted = ids[index, row.answer_start : len(row.ids)].to(logits.device)
        greedy = logits.argmax(-1)
        agreed = int((greedy == wanted).long().cumprod(0).sum())
        following = int(greedy[agreed]) if agreed < len(wanted) else None
        drafts.append(_Draft(float(cross_entropy(logits, wanted, reduction="sum")), len(wanted), agreed, following))
    return drafts, out.past_key_values


def answer_examples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[ChatExample],
    max_new_tokens: int | Sequence[int] = 256,
    batch_size: int = 16,
    description: str | None = "answers",
) -> list[Answered]:
    """The model's greedy answer to each example, in their order (the text that `generate` gives), and the answer loss.

    One pass over prompt and reference answer gives the loss, and shows how many of the reference's tokens greedy
    decoding would write. A row that would write all of them is answered; the others go on from where they part, token
    by token and `batch_size` at a time, on the keys and values of that pass. `max_new_tokens` may differ by example.
    """
    limits = [max_new_tokens] * len(examples) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    encoded = [encode(tokenizer, example) for example in examples]
    batches = _batches([len(row.ids) for row in encoded], batch_size)
    found: dict[int, Answered] = {}
    most = max(limits, default=0)
    with _evaluating(model), _steps(description, len(batches) * most) as step:
        for number, batch in enumerate(batches):
            going = _Going(tokenizer)
            for piece in _pieces([len(encoded[i].ids) for i in batch]):
                rows = [encoded[batch[i]] for i in piece]
                drafts, cache = _draft(model, rows, use_cache=True)
                going.add(rows, drafts, cache, [limits[batch[i]] for i in piece])
            answers = going.finish(model, step)
            for index, draft, ids in zip(batch, going.drafts, answers, strict=True):
                found[index] = Answered(tokenizer.decode(ids, skip_special_tokens=True), draft.nats, draft.tokens)
            step((number + 1) * most)
    return [found[i] for i in range(len(examples))]


def _pieces(lengths: Sequence[int]) -> Iterator[range]:
    """Consecutive rows, the longest first, in pieces of at most DRAFT_TOKENS tokens with their padding."""
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, DRAFT_TOKENS // lengths[start]))
        yield range(start, stop)
        start = stop


class _Going:
    """Rows on their way from draft to answer: what is written so far, and the cache of those that go on."""

    def __init__(self, tokenizer: Any) -> None:
        self.drafts: list[_Draft] = []
        self._tokenizer = tokenizer
        self._written: list[list[int]] = []
        self._limits: list[int] = []
        self._going: list[int] = []
        self._kept: list[int] = []  # of each row that goes on, how many tokens of its cache are its own
        self._caches: list[Any] = []

    def add(self, rows: Sequence[Encoded], drafts: Sequence[_Draft], cache: Any, limits: Sequence[int]) -> None:
        """Takes in drafted rows; those that part from their draft before its end and before their limit will go on."""
        chosen = []
        for index, (row, draft, limit) in enumerate(zip(rows, drafts, limits, strict=True)):
            ids = row.ids[row.answer_start : row.answer_start + draft.agreed]
            if draft.following is not None:
                ids.append(draft.following)
                if draft.following != self._tokenizer.eos_token_id and len(ids) < limit:
                    chosen.append(index)
                    self._going.append(len(self._written))
                    self._kept.append(row.answer_start + draft.agreed)
            self._written.append(ids[:limit])
        self.drafts += drafts
        self._limits += limits
        if chosen:
            cache.batch_select_indices(torch.tensor(chosen))
            self._caches.append(cache)

    def finish(self, model: Any, step: Callable[[int | None], None]) -> list[list[int]]:
        """The answers of all rows, up to their limits: the cache's tokens that are not a row's are masked."""
        if self._going:
            cache = _joined(self._caches)
            width = cache.get_seq_length()
            mask = torch.tensor([[1] * kept + [0] * (width - kept) + [1] for kept in self._kept])  # (going, width + 1)
            ids = torch.full_like(mask, _pad(self._tokenizer))
            ids[:, -1] = torch.tensor([self._written[i][-1] for i in self._going])
            left = [self._limits[i] - len(self._written[i]) for i in self._going]
            decoded = _decode(model, self._tokenizer, ids, mask, left, step, cache)
            for i, new in zip(self._going, decoded, strict=True):
                self._written[i] += new
        return self._written


def _joined(caches: Sequence[Any]) -> DynamicCache:
    """One cache of all rows, each padded on the right to the longest."""
    width = max(cache.get_seq_length() for cache in caches)
    joined = DynamicCache()
    for layer in range(len(caches[0])):
        parts = [(cache.layers[layer].keys, cache.layers[layer].values) for cache in caches]
        keys, values = (
            torch.cat([pad(tensor, (0, 0, 0, width - tensor.shape[2])) for tensor in tensors])
            for tensors in zip(*parts, strict=True)
        )  # (rows, heads, width, head_dim)
        joined.update(keys, values, layer)
    return joined


def answer_losses(
    model: Any, tokenizer: Any, examples: Sequence[ChatExample], batch_size: int = 8
) -> list[tuple[float, int]]:
    """Per example the summed loss in nats over its answer's tokens (the end mark among them), and their number."""
    encoded = [encode(tokenizer, example) for example in examples]
    losses = [(0.0, 0)] * len(encoded)
    with _evaluating(model):
        for batch in _batches([len(row.ids) for row in encoded], batch_size):
            drafts, _ = _draft(model, [encoded[i] for i in batch], use_cache=False)
            for index, draft in zip(batch, drafts, strict=True):
                losses[index] = (draft.nats, draft.tokens)
    return losses


def main(path: str, question: str) -> None:
    """Prints the answer of the model in folder `path`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    print(*generate(model, AutoTokenizer.from_pretrained(path), [[{"role": "user", "content": question}]]))


if __name__ == "__main__":
    run_main(main)
