"""Strict JSON: one value, no more, every way to be wrong has a name.

Python's own parser keeps the last of two equal keys, and takes NaN, 1e400 and lone surrogates; this one does not. Large
integers keep their digits.

    python -c "from serving.guard.strict_json import parse; print(parse('{\\"a\\": 1}'))"
"""

import json
import math
import re
from itertools import islice
from typing import Any

WHITESPACE = " \t\n\r"
MAX_DEPTH = 128
MAX_INTEGER_DIGITS = 4000
MAX_STARTS = 64  # brackets that are tried as the start of a value within a text

_FENCE = re.compile(r"^```[a-zA-Z]*[ \t]*$", re.MULTILINE)
_OPENING = re.compile(r"[\[{]")
_JSON_BEGUN = re.compile(r'[\[{]\s*(?:["\[\]{}]|-?[0-9]|true|false|null|NaN|-?Infinity)')
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


class Malformed(ValueError):
    """A text that is no document of its format.

    `violation` names why, `detail` are words that quote the text. Of strict JSON: empty, byte_order_mark, too_deep,
    duplicate_key, not_a_number, number_overflow, number_too_long, lone_surrogate, trailing_text, syntax.
    """

    def __init__(self, violation: str, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.violation, self.detail = violation, detail


def parse(text: str, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a text that holds exactly one strict JSON value, white space around it allowed.

    Raises Malformed, whose `violation` names what is wrong.
    """
    text = begun(text)
    if text.count("[") + text.count("{") > max_depth:
        _check_depth(text, max_depth)
    try:
        value, end = (_DECODER if len(text) <= MAX_INTEGER_DIGITS else _CAREFUL).raw_decode(text)
    except json.JSONDecodeError as error:
        raise Malformed("syntax", f"{error.msg} at line {error.lineno} column {error.colno}") from None
    if end < len(text):
        raise Malformed("trailing_text", f"text after the JSON value, from character {end}")
    check_surrogates(value if "\\" in text else text)
    return value


def begun(text: str) -> str:
    """A text without white space around it. Raises Malformed: empty, byte_order_mark."""
    if text.startswith("\ufeff"):
        raise Malformed("byte_order_mark", "the text starts with a byte order mark")
    text = text.strip(WHITESPACE)
    if not text:
        raise Malformed("empty", "the text is empty")
    return text


def unwrapped(text: str) -> str | None:
    """The one JSON object or array within a text: alone in a fence, or with text around it; None where it is not one.

    Nothing is mended: what comes back is a piece of the text as it stands, and the only such piece.
    """
    fences = list(islice(_FENCE.finditer(text), 3))
    if len(fences) == 2 and fences[0][0].rstrip() in ("```", "```json") and fences[1][0].rstrip() == "```":
        return text[fences[0].end() : fences[1].start()].strip(WHITESPACE)
    found: str | None = None
    position = 0
    for _ in range(MAX_STARTS):
        start = _OPENING.search(text, position)
        if start is None:
            return found
        try:
            _, position = _CAREFUL.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            if _JSON_BEGUN.match(text, start.start()):  # what follows is a part of something broken
                return None
            position = start.end()
            continue
        if found is not None:
            return None
        found = text[start.start() : position]
    return None


def _check_depth(text: str, max_depth: int) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        mark = match.group()
        if mark in "[{":
            depth += 1
            if depth > max_depth:
                raise Malformed("too_deep", f"more than {max_depth} levels of nesting")
        elif mark in "]}":
            depth -= 1


def check_surrogates(value: Any) -> None:
    """Raises Malformed (lone_surrogate) where a text in a value holds one."""
    try:
        _encode(value)
    except UnicodeEncodeError:
        raise Malformed("lone_surrogate", "a string holds a lone surrogate") from None


def _encode(value: Any) -> None:
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            key.encode()
            _encode(item)
    elif isinstance(value, list):
        for item in value:
            _encode(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(
            "duplicate_key", "a key occurs twice in one object", f"the key {json.dumps(twice)} occurs twice"
        )
    return result


def to_float(digits: str) -> float:
    """A number as a double. Raises Malformed (number_overflow) where it is too large for one."""
    value = float(digits)
    if math.isinf(value):
        said = f"the number {digits[:40]} is too large for a double"
        raise Malformed("number_overflow", "a number is too large for a double", said)
    return value


def to_integer(digits: str) -> int:
    """An integer, all of its digits kept. Raises Malformed (number_too_long) where it has too many."""
    if len(digits) > MAX_INTEGER_DIGITS:
        raise Malformed("number_too_long", f"an integer of more than {MAX_INTEGER_DIGITS} digits")
    return int(digits)


def _constant(name: str) -> Any:
    raise Malformed("not_a_number", f"{name} is not JSON")


# a text that is shorter than the longest integer holds none that is too long
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=to_float, parse_constant=_constant, strict=True)
_CAREFUL = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=to_float, parse_int=to_integer, parse_constant=_constant, strict=True
)
