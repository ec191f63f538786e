"""The requests of a benchmark: held-out questions of all domains, with the lengths of their answers, in two orders.

    rows = trace(recipe, tokenizer, 120, "bursts")

Prompts are the recipe's own held-out ones; an answer has as many tokens as the row's own, within bounds that keep a
request from being nothing or the whole run.
"""

import random
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from fusion.checkpoint import write_lines
from fusion.data import load_examples
from fusion.encoding import encode
from fusion.recipe import Recipe

LEAST, MOST = 8, 128  # tokens of an answer
BURST = 8  # requests of one domain in a row
Order = Literal["evenly", "bursts"]
ORDERS: tuple[Order, ...] = ("evenly", "bursts")


def trace(recipe: Recipe, tokenizer: Any, count: int, order: Order) -> list[dict[str, Any]]:
    """`count` requests, {prompt, prompt_tokens, output_tokens, domain}: of each domain as many, or one more."""
    least, more = divmod(count, len(recipe.domains))
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for place, (name, domain) in enumerate(recipe.domains.items()):
        share = least + (place < more)
        rows = load_examples(domain.held_out, name, share, recipe.evaluation.seed)
        found = []
        for number in range(share):
            row = rows[number % len(rows)]
            encoded = encode(tokenizer, row)
            length = min(MOST, max(LEAST, len(encoded.ids) - encoded.answer_start))
            text = "\n\n".join(message["content"] for message in row.prompt)
            tokens = {"prompt_tokens": encoded.answer_start, "output_tokens": length}
            found.append({"prompt": text, **tokens, "domain": name})
        by_domain[name] = found
    if order == "evenly":
        return [row for rows in zip_longest(*by_domain.values()) for row in rows if row]
    blocks = [rows[i : i + BURST] for rows in by_domain.values() for i in range(0, len(rows), BURST)]
    random.Random(0).shuffle(blocks)
    return [row for block in blocks for row in block]


def lengths(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The tokens of prompts and of answers: least, mean and most."""
    found = {}
    for name in ("prompt_tokens", "output_tokens"):
        tokens = [row[name] for row in rows]
        found[name] = {"least": min(tokens), "mean": round(mean(tokens), 1), "most": max(tokens)}
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The requests as vLLM's load generator reads them (its data set `custom`)."""
    write_lines(path, rows)
    return path
