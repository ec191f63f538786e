"""Requests and answers at the edges: what is odd is answered, never let through unchecked, and not told of."""

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

import openai
import pytest

from serving.guard import upstream
from serving.guard.ladder import Done, Limits, Send, ladder_for
from serving.guard.live import JsonAlong
from serving.guard.schema import Checker, CheckerCache, SchemaError
from serving.guard.strict_json import unwrapped
from serving.guard.wanted import wanted_of
from tests.serving.test_asgi import BAD, FORMAT, GOOD, Start, ask, client, metrics_of
from tests.serving.upstream import USAGE, Slow, Status, completion

SECRET = "alice@example.com"


def test_several_prompts_have_one_answer_each_or_are_refused(guarded: Start) -> None:
    choices = [{"index": place, "text": text, "finish_reason": "stop"} for place, text in enumerate("ab")]
    free = ladder_for({"prompt": ["x", "y"]}, CheckerCache().get, Limits(), every=True)
    assert free is not None
    step = free.receive({"choices": choices, "usage": USAGE})
    assert isinstance(step, Done) and [choice["text"] for choice in step.answer["choices"]] == ["a", "b"]
    guard = guarded(GOOD)
    with pytest.raises(openai.BadRequestError, match="one prompt at a time"):
        client(guard).completions.create(model="m", prompt=["a", "b"], extra_body={"response_format": FORMAT})


def test_errors_after_an_attempt_are_not_tried_again_and_tell_of_it(guarded: Start) -> None:
    busy = Status(503, '{"error": {"message": "busy", "code": "busy"}}')
    for script, settings, status in (
        ([BAD, busy], {}, 503),
        ([BAD, Status(200, "no json")], {}, 502),
        ([BAD, Slow(3, GOOD)], {"deadline_s": 0.5}, 504),
    ):
        guard = guarded(*script, **settings)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(guard, response_format=FORMAT)
        assert caught.value.status_code == status and caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.response.headers["x-qwen-fusion-attempts"] == "1"
        assert len(guard.upstream.requests) == 2
        if status != 503:
            (attempt,) = caught.value.response.json()["error"]["attempts"]
            assert attempt["errors"][0]["path"] == "/a"


def called(function: Any) -> dict[str, Any]:
    answer = completion(None)
    answer["choices"][0]["message"]["tool_calls"] = [{"id": "1", "type": "function", "function": function}]
    return answer


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]


@pytest.mark.parametrize("function", [{"name": "f", "arguments": {}}, {"name": ["f"], "arguments": "{}"}])
def test_an_odd_tool_call_is_no_completion(guarded: Start, function: Any) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client(guarded(called(function))).with_options(max_retries=0).chat.completions.create(  # type: ignore[call-overload]
            model="m", messages=[{"role": "user", "content": "?"}], tools=TOOLS
        )
    assert caught.value.status_code == 502


def test_a_call_without_a_function_and_another_tool_than_the_named_one_are_wrong() -> None:
    free = wanted_of({"response_format": {"type": "json_object"}, "tools": TOOLS}, CheckerCache().get)
    assert free is not None
    assert [found.keyword for found in free.violations(called(None)["choices"][0])] == ["unknown_tool"]
    named = {"type": "function", "function": {"name": "f"}}
    one = wanted_of({"tools": TOOLS, "tool_choice": named}, CheckerCache().get)
    assert one is not None
    assert one.violations(called({"name": "f", "arguments": "{}"})["choices"][0]) == []
    assert one.violations(called({"name": "g", "arguments": "{}"})["choices"][0])


@pytest.mark.parametrize(
    "fields",
    [
        {"guard": {"format": ["json"]}},
        {"guard": {"schema": True}, "response_format": FORMAT},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": None}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"$ref": "#/a/" + "9" * 5000, "a": [1]}},
            }
        },
    ],
)
def test_odd_requests_are_400(guarded: Start, fields: dict[str, Any]) -> None:
    guard = guarded(GOOD)
    with pytest.raises(openai.BadRequestError):
        ask(guard, extra_body=fields)
    assert guard.upstream.requests == []


def test_odd_schemas_and_numbers_are_taken() -> None:
    draft7 = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"format": []}}}
    with suppress(SchemaError):  # a validator may refuse it; what counts is that it says so
        assert Checker(draft7).left_out == []
    JsonAlong().feed("[" + "9" * 400 + "]")
    assert Checker({"type": "string", "format": "date"}).violations("abc")[0].keyword == "format"


def test_nothing_of_an_answer_is_in_reports_metrics_or_errors(guarded: Start) -> None:
    schema = {"type": "object", "properties": {"ok": False}, "additionalProperties": {"type": "integer"}}
    (found,) = Checker(schema).violations({"ok": 1})
    assert found.keyword == "false"
    closed = {"type": "object", "properties": {"a": {}}, "additionalProperties": False}
    (found,) = Checker(closed).violations({SECRET: 1})
    assert SECRET not in found.message and SECRET in found.detail
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": closed}}
    rules = {"rules": [{"find": ["email"], "side": "output"}]}
    for settings in ({}, {"policy": rules}):
        guard = guarded(completion(json.dumps({SECRET: 1})), **settings)
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ask(guard, response_format=wanted)
        assert SECRET not in caught.value.response.text
        assert SECRET in guard.upstream.requests[1]["messages"][-1]["content"]  # the model is told
        assert SECRET not in asyncio.run(metrics_of(guard.url))
    open_ = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    guard = guarded(completion(json.dumps({SECRET: "x"})), GOOD, policy=rules)  # a path is a key of the answer
    assert SECRET not in ask(guard, response_format=open_).to_json()


def test_a_completion_without_max_tokens_gets_more_where_the_engines_few_do_not_do() -> None:
    request = {"prompt": "a:", "response_format": FORMAT}
    climb = ladder_for(request, CheckerCache().get, Limits(budget=1000))
    assert climb is not None
    cut = {"choices": [{"index": 0, "text": '{"a"', "finish_reason": "length"}], "usage": {"completion_tokens": 16}}
    budgets = []
    for _ in range(2):
        step = climb.receive(cut)
        assert isinstance(step, Send)
        budgets.append(step.body["max_tokens"])
    assert budgets == [256, 512]


def test_a_model_that_repeats_itself_stalls_nothing() -> None:
    began = time.monotonic()
    assert unwrapped("```json\n" * 20_000) is None
    assert unwrapped("[" * 20_000) is None
    assert time.monotonic() - began < 2


def test_the_deadline_within_a_stream_is_its_last_event(guarded: Start) -> None:
    guard = guarded(completion("one two three four five six seven eight nine ten"), deadline_s=0.6)
    text = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in ask(guard, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text.startswith("one two ") and caught.value.code == "deadline"


def test_a_refused_thing_in_a_tool_or_a_schema_is_found(guarded: Start) -> None:
    guard = guarded(GOOD, policy={"rules": [{"words": ["apollo"], "side": "input", "action": "refuse"}]})
    described = [
        {"type": "function", "function": {"name": "f", "description": "Of Apollo", "parameters": {"type": "object"}}}
    ]
    for fields in ({"tools": described}, {"extra_body": {"guard": {"schema": {"description": "Apollo"}}}}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(guard, **fields)
        assert caught.value.code == "content_policy"
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client(guard).completions.create(model="m", prompt="", extra_body={"prompt_embeds": "AAAA"})


def test_an_answer_without_end_is_no_answer(guarded: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "MAX_ANSWER_BYTES", 1000)
    guard = guarded(completion("x" * 2000), GOOD)
    once = client(guard).with_options(max_retries=0).chat.completions
    with pytest.raises(openai.APIStatusError) as caught:
        once.create(model="m", messages=[{"role": "user", "content": "hi"}], response_format=FORMAT)
    assert caught.value.status_code == 502 and caught.value.code == "upstream_unavailable"
    assert ask(guard, response_format=FORMAT).choices[0].message.content == '{"a": 1}'
