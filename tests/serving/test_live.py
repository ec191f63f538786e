"""A live stream is judged the same way however it is cut, and nothing of a broken one looks complete."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.guard.live import BrokenJson, JsonAlong, LiveCheck
from serving.guard.schema import CheckerCache
from serving.guard.strict_json import Malformed, parse
from serving.guard.wanted import Wanted, wanted_of
from tests.serving.upstream import stream_chunk

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WANTED = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def wanted(**request: Any) -> Wanted:
    found = wanted_of(request, CheckerCache().get)
    assert found is not None
    return found


def run(asked: Wanted, stream: bytes, cuts: list[int] | None = None) -> tuple[bytes, list[str], bool]:
    """What goes out of a stream that comes in pieces, what is wrong with it, and whether it was stopped early."""
    check = LiveCheck(asked)
    places = sorted({min(cut, len(stream)) for cut in cuts or []} | {0, len(stream)})
    out = b"".join(check.feed(stream[a:b]) for a, b in pairwise(places) if not check.over)
    stopped = check.over and bool(check.violations)
    return out + check.end(), [violation.keyword for violation in check.violations], stopped


def stream(*texts: str, finish: str | None = "stop", done: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join([*(stream_chunk({"content": text}) for text in texts), stream_chunk({}, finish), done])


def test_a_good_stream_goes_out_as_it_came() -> None:
    whole = b": hello\n\n" + stream('{"a"', ": 1}")
    assert run(wanted(**WANTED), whole) == (whole, [], False)
    assert run(wanted(**WANTED), whole.replace(b"\n", b"\r\n"))[1] == []


@pytest.mark.parametrize(
    ("texts", "keyword", "early"),
    [
        (['{"a": 1', ', "a": 2}', " "], "duplicate_key", True),
        (['{"a": NaN', "}"], "syntax", True),
        (['{"a": 1}', " and so on"], "syntax", True),
        (["[" * 150, "]"], "too_deep", True),
        (['{"a": "x"}'], "type", False),
        (['{"a": '], "syntax", False),
        ([""], "empty", False),
    ],
)
def test_what_is_wrong_ends_a_stream_with_an_error(texts: list[str], keyword: str, early: bool) -> None:
    out, keywords, stopped = run(wanted(**WANTED), stream(*texts))
    assert (keywords, stopped) == ([keyword], early)
    *_, error, done = out.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    said = json.loads(error.removeprefix("data: "))["error"]
    assert (said["type"], said["code"]) == ("invalid_structured_output", "json_guard_live")
    assert said["attempts"][0]["errors"][0]["keyword"] == keyword


def test_a_stream_that_does_not_end_is_a_failure() -> None:
    for broken in (stream('{"a": 1}', finish=None), stream('{"a": 1}', finish=None, done=b"")):
        assert run(wanted(**WANTED), broken)[1] == ["stream"]
    assert run(wanted(**WANTED), stream('{"a": ', finish="length"))[1] == ["output_truncated"]
    assert run(wanted(**WANTED), b"data: {no json\n\n")[1:] == (["stream"], True)
    out, keywords, _ = run(wanted(**WANTED), stream_chunk({"content": "{"}) + b'data: {"error": {"code": "x"}}\n\n')
    assert keywords == [] and b'{"error":{"code":"x"}}' in out and out.endswith(b"data: [DONE]\n\n")


def test_tool_calls_are_put_together_and_judged() -> None:
    def call(index: int, **function: str) -> bytes:
        return stream_chunk({"tool_calls": [{"index": index, "function": function}]})

    end = stream_chunk({}, "tool_calls") + b"data: [DONE]\n\n"
    good = call(0, name="f", arguments="") + call(0, arguments='{"a": ') + call(0, arguments="1}") + end
    assert run(wanted(tools=[TOOL]), good)[1] == []
    bad = call(0, name="f", arguments='{"a": 1}') + call(1, name="f", arguments='{"a": "x"}') + end
    assert run(wanted(tools=[TOOL]), bad)[1] == ["type"]
    broken = call(0, name="f", arguments='{"a": 1, "a": 1}') + end
    assert run(wanted(tools=[TOOL]), broken)[1:] == (["duplicate_key"], True)


@given(
    st.lists(st.integers(0, 700), max_size=12), st.sampled_from(['{"a": 1}', '{"a": "é😀张"}', '{"a": 1, "a": 1}', "{"])
)
def test_cuts_anywhere_change_nothing(cuts: list[int], text: str) -> None:
    whole = stream(*text)  # a chunk a character
    asked = wanted(**WANTED)
    assert run(asked, whole, cuts) == run(asked, whole)


TEXTS = st.text(alphabet='{}[]:,"\\0123456789.eE+-aunltrfs \n\ud800é', max_size=30) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(json.dumps)


@given(TEXTS, st.integers(1, 5))
def test_what_breaks_along_the_way_is_no_strict_json_in_the_end(text: str, step: int) -> None:
    along = JsonAlong()
    try:
        for start in range(0, len(text), step):
            along.feed(text[start : start + step])
    except BrokenJson:
        with pytest.raises(Malformed):
            parse(text)


def test_an_event_without_end_ends_the_stream() -> None:
    check = LiveCheck(wanted(response_format={"type": "json_object"}))
    for _ in range(40):
        assert check.feed(b"data: " + b"x" * 2**15) == b""
    assert check.over and [found.keyword for found in check.violations] == ["stream"]
