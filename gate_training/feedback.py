"""Feedback as routing examples: what people said of requests joins the data that gates are trained on.

    qwen-fusion train-gates RECIPE --with-feedback

OUTPUT/feedback.jsonl holds chat rows with their right domain (`qwen-fusion feedback export` writes it). A quarter of
them, by a hash of the question, is held out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.data import ChatExample, split_of
from fusion.errors import UserError
from fusion.recipe import Recipe

FILE = "feedback.jsonl"
HELD_OUT_SHARE = 0.25
MOST_REPEATS = 50


def feedback_file(recipe: Recipe) -> Path:
    """Where feedback lies that gates are trained on."""
    return recipe.folder / FILE


def read_feedback(file: Path, recipe: Recipe) -> list[ChatExample]:
    """The rows of a file of feedback, none where there is no such file. Raises UserError on a row that is none."""
    if not file.is_file():
        return []
    return [checked(row, recipe, f"{file}, line {number}") for number, row in enumerate(json_rows(file), 1)]


def json_rows(file: Path) -> list[Any]:
    """The values of a file of JSON lines. Raises UserError where it is none."""
    from fusion.checkpoint import read_lines  # which imports torch

    if not file.is_file():
        raise UserError(f"{file} does not exist: give a file that `feedback export` has written")
    try:
        return read_lines(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no file of JSON lines ({error}): give what `feedback export` writes") from None


def checked(row: Any, recipe: Recipe, where: str) -> ChatExample:
    """A row of feedback. Raises UserError, with `where` it is, where it is none or of no domain of the recipe."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or len(messages) < 2 or not all(map(_is_message, messages)):
        raise UserError(f"{where}: no row of feedback, which has 'messages' that end with an answer, and a 'domain'")
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is not an assistant's: add one, empty where no answer is right")
    domain = row.get("domain")
    if domain not in recipe.domains:
        raise UserError(f"{where}: its domain {domain!r} is none of {', '.join(recipe.domains)}")
    return ChatExample(tuple({"role": m["role"], "content": m["content"]} for m in messages), domain)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def split(rows: Sequence[ChatExample]) -> tuple[list[ChatExample], list[ChatExample]]:
    """The rows to train on, and those held out."""
    held_out = [row for row in rows if split_of(row.question, HELD_OUT_SHARE) == "held_out"]
    return [row for row in rows if row not in held_out], held_out


def repeated(rows: Sequence[ChatExample], others: int, share: float) -> list[ChatExample]:
    """The rows so often that they are `share` of all examples, beside `others`, as near as whole repeats come."""
    if not rows:
        return []
    wanted = share / (1 - share) * others
    return list(rows) * max(1, min(MOST_REPEATS, round(wanted / len(rows))))
