"""What a completion said, read from the bytes that went to the client: a JSON object, or a stream of events.

told(b'{"choices": [{"message": {"content": "42"}}], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}')
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DATA = b"data:"


@dataclass(frozen=True)
class Told:
    """The text of the first choice, and the tokens of prompt and answer where the answer names them."""

    text: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def told(body: bytes, streamed: bool) -> Told:
    """What an answer says, as far as it can be read: one that was cut short has said less."""
    text = ""
    usage: Any = None
    for part in _events(body) if streamed else _objects([body]):
        for choice in part.get("choices") or []:
            if isinstance(choice, dict) and choice.get("index", 0) == 0:
                text += _text(choice)
        usage = part.get("usage") or usage
    return Told(text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    return _objects(line[len(DATA) :] for line in body.splitlines() if line.startswith(DATA))


def _objects(parts: Any) -> Iterator[dict[str, Any]]:
    for part in parts:
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):  # [DONE], or the end of what was kept
            continue
        if isinstance(found, dict):
            yield found


def _text(choice: dict[str, Any]) -> str:
    """A choice's text, or a piece of it; tool calls as JSON."""
    message = choice.get("message") or choice.get("delta") or {}
    said = choice.get("text") or (message.get("content") if isinstance(message, dict) else None)
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return (said if isinstance(said, str) else "") + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _count(usage: Any, key: str) -> int | None:
    count = usage.get(key) if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None
