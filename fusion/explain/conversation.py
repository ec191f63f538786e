"""The conversation that is explained: from the command line or a file, and as tokens that know what they are part of.

tokens = tokenize(tokenizer, Conversation(({"role": "user", "content": "17+25="},), answer="42"))
"".join(token.text for token in tokens)          # the text in the chat template, to the letter
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fusion.data import Message
from fusion.encoding import END, prompt_text
from fusion.errors import UserError
from fusion.explain.explanation import Part, Token
from fusion.sections.training import Turn

MARK = "\ue000{}\ue001"  # of message N, where the template would put its text
FORM = '{"messages": [{"role": "user", "content": "1+1="}]}'


@dataclass(frozen=True)
class Conversation:
    """The messages of a prompt, the last of them the user's, and the answer to it, if any."""

    messages: tuple[Message, ...]
    answer: str | None = None

    @property
    def question(self) -> str:
        """The last user message: what label channels look at."""
        return self.messages[-1]["content"]


def of_prompt(text: str) -> Conversation:
    """A conversation of one user message. Raises UserError where that is empty."""
    if not text.strip():
        raise UserError("the prompt is empty: give it some words")
    return Conversation(({"role": "user", "content": text},))


def of_file(path: Path) -> Conversation:
    """The conversation in a file: a prompt's text, or (.json, .jsonl) one object with `messages`.

    A last message of the assistant is the answer. Raises UserError where the file is missing, not UTF-8 or neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--file {path} does not exist: name a file with the prompt") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if path.suffix not in (".json", ".jsonl"):
        if not text.strip():
            raise UserError(f"--file {path} is empty: write the prompt into it")
        return of_prompt(text)
    try:
        turns = TypeAdapter(tuple[Turn, ...]).validate_python(json.loads(text)["messages"])
    except (ValueError, TypeError, KeyError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"--file {path} is no conversation ({why}): one is {FORM}, alone in its file") from None
    messages = tuple(turn.model_dump() for turn in turns)
    answer = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None
    asked = messages if answer is None else messages[:-1]
    if not asked or asked[-1]["role"] != "user":
        raise UserError(f"--file {path} has no user message to answer: one is {FORM}")
    return Conversation(asked, answer)


def tokenize(tokenizer: Any, conversation: Conversation) -> list[Token]:
    """The tokens that the served model sees of prompt, answer and end mark; their texts joined are the whole text.

    Raises UserError where there is nothing but the chat template, or that changes a message's text.
    """
    text, spans = _rendered(tokenizer, conversation.messages)
    tokens = list(_tokens(tokenizer, text, spans))
    if conversation.answer is not None:
        answer = conversation.answer + END
        tokens += _tokens(tokenizer, answer, [(0, len(answer), "answer")])
    elif not any(token.part == "prompt" for token in tokens):
        raise UserError("the prompt is empty: give it some words")
    return tokens


Span = tuple[int, int, Part]  # first character, the one after the last, what they are


def _rendered(tokenizer: Any, messages: tuple[Message, ...]) -> tuple[str, list[Span]]:
    """The prompt in the chat template, and where in it the messages' own texts lie."""
    text = prompt_text(tokenizer, messages)
    marked = [{**message, "content": MARK.format(i)} for i, message in enumerate(messages)]
    first, *rest = re.split(MARK.format(r"\d+"), prompt_text(tokenizer, marked))
    spans: list[Span] = []
    built = first
    for message, following in zip(messages, rest, strict=True):
        content = message["content"]
        if not text.startswith(content, len(built)):
            content = content.strip()  # as some templates do
        spans.append((len(built), len(built + content), "system" if message["role"] == "system" else "prompt"))
        built += content + following
    if built != text:
        raise UserError("the model's chat template changes the text of a message: its tokens cannot be told apart")
    return text, spans


def _tokens(tokenizer: Any, text: str, spans: list[Span]) -> Iterator[Token]:
    """The tokens of `text`. Of a character that several tokens share, the last has the text, all of them a label."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("the text holds half a character (a surrogate without its other half): write it as UTF-8")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    starts = [0, *(start for start, _ in places[1:]), len(text)]
    shared = [(place, len(list(run))) for place, run in groupby(places)]
    numbered = [(number, count) for _, count in shared for number in range(1, count + 1)]
    for i, (identity, (start, end)) in enumerate(zip(encoded["input_ids"], places, strict=True)):
        number, count = numbered[i]
        piece = text[start:end] + (f" {number}/{count}" if count > 1 else "")
        part: Part = next((part for first, last, part in spans if start < last and end > first), "template")
        yield Token(identity, text[starts[i] : starts[i + 1]], piece, part)
