"""The guard's own field of a request: YAML, XML, and streams that are checked as they pass."""

import json
import time
from typing import Any

import openai
import pytest

from tests.serving.test_asgi import FORMAT, GOOD, USER, Start, ask, client
from tests.serving.upstream import Cut, Status, completion

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("form", "wrong", "right"),
    [("yaml", "a: one", "a: 1"), ("xml", "<record><a>one</a></record>", "<record><a>1</a></record>")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_other_formats_are_told_checked_and_repaired(
    guarded: Start, form: str, wrong: str, right: str, stream: bool
) -> None:
    guard = guarded(completion(wrong), completion(right))
    answer = ask(guard, extra_body={"guard": {"format": form, "schema": SCHEMA}}, stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
        (first, _) = answer.model_extra["guard"]["attempts"]
        assert (first["constrained"], first["errors"][0]["path"]) == (False, "/a")
    assert text == right
    for sent in guard.upstream.requests:
        assert "guard" not in sent and "response_format" not in sent
        assert json.dumps(SCHEMA) in sent["messages"][-1]["content"] and form.upper() in sent["messages"][-1]["content"]
    assert f"```{form}\n{wrong}\n```" in guard.upstream.requests[1]["messages"][-2]["content"]


def test_a_fenced_document_is_unwrapped_where_that_is_switched_on(guarded: Start) -> None:
    guard = guarded(completion("```yaml\na: 1\n```"), unwrap=True)
    answer = ask(guard, extra_body={"guard": {"format": "yaml", "schema": SCHEMA}})
    assert answer.choices[0].message.content == "a: 1" and answer.model_extra["guard"]["unwrapped"] == 1
    assert ask(guarded(completion("- 1")), extra_body={"guard": {"format": "yaml"}}).choices[0].message.content == "- 1"


@pytest.mark.parametrize(
    "field",
    [{"format": "toml"}, {"live": "yes"}, {"other": 1}, "yaml", {"format": "yaml", "schema": {"type": "dict"}}],
)
def test_what_the_field_does_not_know_is_400(guarded: Start, field: Any) -> None:
    guard = guarded(GOOD)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(guard, extra_body={"guard": field})
    assert caught.value.param == "guard" and guard.upstream.requests == []
    with pytest.raises(openai.BadRequestError, match="ask for two things"):
        ask(guard, response_format=FORMAT, extra_body={"guard": {"format": "yaml"}})


def test_a_live_stream_arrives_as_it_is_made(guarded: Start) -> None:
    guard = guarded(completion('{"a": 1, "b": "two words"}'))
    arrivals: list[float] = []
    text = ""
    for chunk in ask(guard, response_format=FORMAT, stream=True, extra_body={"guard": {"live": True}}):
        arrivals.append(time.monotonic())
        text += chunk.choices[0].delta.content or ""
    assert json.loads(text) == {"a": 1, "b": "two words"}
    assert arrivals[-1] - arrivals[0] > 0.2 and len(guard.upstream.requests) == 1
    assert guard.upstream.requests[0]["stream"] is True


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (completion('{"a": "x"}'), "json_guard_live"),
        (completion('{"a": 1, "a": 2, "b": 3, "c": 4}'), "json_guard_live"),
        (completion('{"a": [1,', finish_reason="length"), "output_truncated"),
        (Cut(completion('{"a": 1, "b": 2}'), 2), "json_guard_live"),
        (Cut(completion('{"a": 1, "b": 2}'), 2, drop=True), "upstream_unavailable"),
    ],
)
def test_a_live_stream_that_goes_wrong_ends_with_an_error(guarded: Start, script: Any, code: str) -> None:
    guard = guarded(script)
    with pytest.raises(openai.APIError) as caught:
        list(ask(guard, response_format=FORMAT, stream=True, extra_body={"guard": {"live": True}}))
    assert caught.value.code == code and len(guard.upstream.requests) == 1


def test_a_live_stream_has_one_choice_and_the_engines_own_errors(guarded: Start) -> None:
    guard = guarded(Status(404, '{"error": {"message": "no such model"}}'))
    live = {"response_format": FORMAT, "stream": True, "extra_body": {"guard": {"live": True}}}
    with pytest.raises(openai.BadRequestError, match="one choice"):
        ask(guard, n=2, **live)
    with pytest.raises(openai.NotFoundError, match="no such model"):
        ask(guard, **live)


@pytest.mark.parametrize("drop", [False, True])
def test_an_unguarded_stream_that_breaks_off_ends_with_an_error(guarded: Start, drop: bool) -> None:
    guard = guarded(Cut(completion("one two three"), 2, drop))
    text = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in client(guard).chat.completions.create(model="m", messages=USER, stream=True):  # type: ignore[call-overload]
            text += chunk.choices[0].delta.content or ""
    assert text == "one two " and caught.value.code == "upstream_unavailable"
