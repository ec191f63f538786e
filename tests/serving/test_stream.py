"""Events of a finished answer: what a client reads from them is the answer."""

import json
from typing import Any

from serving.guard.stream import as_events, error_events
from tests.serving.upstream import USAGE, completion


def chunks(events: bytes) -> list[dict[str, Any]]:
    lines = events.decode().removesuffix("\n\n").split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_chat_completion_comes_in_deltas() -> None:
    found = chunks(as_events({**completion("one", "zwei"), "guard": {"attempts": []}}, include_usage=True))
    assert (found[-1]["choices"], found[-1]["usage"], found[-1]["guard"]) == ([], USAGE, {"attempts": []})
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    for index, text in enumerate(("one", "zwei")):
        mine = [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["delta"].get("content") or "" for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine] == [None, None, "stop"]


def test_a_completion_comes_as_text() -> None:
    answer = {"id": "cmpl-1", "choices": [{"index": 0, "text": "one", "finish_reason": "stop"}]}
    (chunk,) = chunks(as_events(answer))
    assert chunk["object"] == "text_completion" and chunk["choices"][0]["text"] == "one"


def test_an_error_is_the_last_event() -> None:
    assert chunks(error_events(b'{"error": {"code": "x"}}')) == [{"error": {"code": "x"}}]
    assert "error" in chunks(error_events(b"<html>"))[0]
