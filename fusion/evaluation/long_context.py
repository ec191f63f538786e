"""Answers late in a long context: their loss and the recall of a passkey by position, anchor beside fused.

    qwen-fusion evaluate configs/qwen2.5-0.5b-two-experts.yaml --long

Held-out questions are asked after so many tokens of other questions with their answers; a passkey is hidden at three
depths among such questions and asked for at the end (arXiv:2305.16300). Positions double up to serving.max_model_len,
and a second time with YaRN where `serving.yarn_factor` is set.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fusion.data import ChatExample, load_examples
from fusion.encoding import encode, load_tokenizer
from fusion.evaluation.evaluate import held_out_rows
from fusion.evaluation.generate import answer_examples
from fusion.evaluation.intervals import mean_interval
from fusion.recipe import Recipe
from fusion.sources import ModelSource, anchor_source, load_model

SHORTEST = 256  # tokens
DEPTHS = (0.1, 0.5, 0.9)
HIDDEN = "Remember this: the pass key is {key}."
ASKED = "What is the pass key? Answer with the number alone."
MARGIN = 16  # tokens of a context that may be missing


def lengths_of(recipe: Recipe) -> list[int]:
    """The contexts that are measured, in tokens: doubling, the last one serving.max_model_len less an answer's room."""
    last = recipe.serving.max_model_len - recipe.evaluation.max_new_tokens
    found: list[int] = []
    while SHORTEST * 2 ** len(found) < last:
        found.append(SHORTEST * 2 ** len(found))
    return [*found, last] if last >= SHORTEST else [last]


def evaluate_long(recipe: Recipe, rows: int) -> dict[str, Any]:
    """Loss (nats a token, 95% interval) and passkey recall by length, of `rows` questions a length.

    Raises UserError where a model or the data are missing.
    """
    tokenizer = load_tokenizer(recipe.fused)
    questions = [row for found in held_out_rows(recipe, list(recipe.domains)).values() for row in found]
    lengths = lengths_of(recipe)
    short = [row for row in questions if len(encode(tokenizer, row).ids) <= lengths[0]]
    questions = short or questions  # a row longer than a context would be counted as one of that length
    rng = random.Random(recipe.evaluation.seed)
    rng.shuffle(questions)
    fillers = [
        row
        for name, domain in recipe.domains.items()
        for row in load_examples(domain.train, name, 200, recipe.evaluation.seed)
    ]
    asked = {n: [_after(tokenizer, row, fillers, n, rng) for row in questions[:rows]] for n in lengths}
    hidden = {
        n: [_with_key(tokenizer, fillers, n, depth, rng) for depth in DEPTHS for _ in range(rows)] for n in lengths
    }
    factors: list[float | None] = [None, *([recipe.serving.yarn_factor] if recipe.serving.yarn_factor else [])]
    result: dict[str, Any] = {"recipe": recipe.name, "rows": rows, "lengths": lengths, "models": {}}
    for name, source in {"anchor": anchor_source(recipe), "fused": ModelSource("fused", recipe.fused)}.items():
        for factor in factors:
            model = load_model(source, recipe.attn_implementation, recipe.loading, yarn_factor=factor)
            label = name if factor is None else f"{name}, YaRN {factor:g}"
            measured = {}
            for length in lengths:
                losses = answer_examples(model, tokenizer, asked[length], 1, 1, f"{label}, {length} tokens")
                keys = answer_examples(model, tokenizer, hidden[length], 12, 1, f"{label}, {length}, passkeys")
                right = [float(row.answer in a.text) for row, a in zip(hidden[length], keys, strict=True)]
                loss = mean_interval([a.nats for a in losses], [a.tokens for a in losses])
                by_depth = [right[i * rows : (i + 1) * rows] for i in range(len(DEPTHS))]
                measured[str(length)] = {
                    "loss": loss.__dict__,
                    "recall": mean_interval(right).__dict__,
                    "recall_by_depth": {str(d): sum(r) / len(r) for d, r in zip(DEPTHS, by_depth, strict=True)},
                }
            result["models"][label] = measured
            del model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return result


def _filled(
    tokenizer: Any, row: ChatExample, fillers: Sequence[ChatExample], length: int, rng: random.Random
) -> list[Any]:
    """Turns of other conversations until they and `row` have about `length` tokens."""
    turns: list[Any] = []
    order = rng.sample(range(len(fillers)), len(fillers))
    room = length - len(encode(tokenizer, row).ids)
    for number in order * (1 + length // max(1, len(order))):
        found = [message for message in fillers[number].messages if message["role"] != "system"]
        size = _tokens(tokenizer, found) - _tokens(tokenizer, [])
        if size <= room:
            turns += found
            room -= size
        if room < MARGIN:
            break
    return turns


def _tokens(tokenizer: Any, turns: list[Any]) -> int:
    """How long turns are behind an empty system message, which keeps a template from putting in one of its own."""
    text = tokenizer.apply_chat_template([{"role": "system", "content": ""}, *turns], tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _after(
    tokenizer: Any, row: ChatExample, fillers: Sequence[ChatExample], length: int, rng: random.Random
) -> ChatExample:
    """A question at the end of a context of about `length` tokens."""
    system = [message for message in row.messages[:1] if message["role"] == "system"]
    turns = _filled(tokenizer, row, fillers, length, rng)
    return replace(row, messages=(*system, *turns, *row.messages[len(system) :]))


def _with_key(
    tokenizer: Any, fillers: Sequence[ChatExample], length: int, depth: float, rng: random.Random
) -> ChatExample:
    """A number hidden at `depth` of a context, asked for at its end."""
    key = f"{rng.randrange(10_000, 100_000)}"
    hidden = ({"role": "user", "content": HIDDEN.format(key=key)}, {"role": "assistant", "content": "OK."})
    asked = ({"role": "user", "content": ASKED}, {"role": "assistant", "content": key})
    row = ChatExample(messages=(*hidden, *asked), domain="passkey")
    turns = _filled(tokenizer, row, fillers, length, rng)
    place = 2 * round(depth * len(turns) / 2)
    return replace(row, messages=(*turns[:place], *hidden, *turns[place:], *asked))


def markdown(result: dict[str, Any]) -> str:
    """One line a model and length."""
    lines = ["| model | tokens before the answer | answer loss, nats a token | passkeys recalled | by depth |"]
    lines.append("| --- " * 5 + "|")
    for model, measured in result["models"].items():
        for length, row in measured.items():
            loss, recall = row["loss"], row["recall"]
            depths = ", ".join(f"{depth}: {share:.2f}" for depth, share in row["recall_by_depth"].items())
            cells = [f"{loss['value']:.3f} [{loss['low']:.2f}, {loss['high']:.2f}]", f"{recall['value']:.2f}", depths]
            lines.append(f"| {model} | {int(length):,} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
