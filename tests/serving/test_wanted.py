"""What a request asks for, and whether a choice is as asked."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.guard.schema import CheckerCache, SchemaError
from serving.guard.wanted import Wanted, wanted_of

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def wanted(**request: Any) -> Wanted:
    found = wanted_of(request, CheckerCache().get)
    assert found is not None
    return found


def keywords(asked: Wanted, text: str | None = None, calls: Any = None, reason: str = "stop") -> list[str]:
    message = {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}
    return [found.keyword for found in asked.violations({"index": 0, "message": message, "finish_reason": reason})]


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": "json"},
        {"structured_outputs": {"grammar": "root ::= 'a'"}},
        {"tools": []},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": "weather"},
    ],
)
def test_what_asks_for_nothing_that_can_be_checked_is_not_guarded(request_: dict[str, Any]) -> None:
    assert wanted_of(request_, CheckerCache().get) is None


@pytest.mark.parametrize(
    "request_",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"json": {"type": "object"}}},
        {"structured_outputs": {"json": '{"type": "object"}'}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}},
    ],
)
def test_json_is_asked_for_in_five_ways(request_: dict[str, Any]) -> None:
    asked = wanted(**request_)
    assert asked.schema == {"type": "object"}
    assert keywords(asked, "{}") == []
    assert keywords(asked, "[]") == ["type"]
    assert keywords(asked, "{} and more") == ["trailing_text"]
    assert keywords(asked, '{"a": ', reason="length") == ["output_truncated"]
    assert keywords(asked, "[]", reason="length") == ["type"]  # complete, and not what was asked for


@pytest.mark.parametrize(
    "request_",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
        {"structured_outputs": {"json": "{not JSON"}},
        {"structured_outputs": {"json": {"type": "dict"}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "dict"}}}]},
    ],
)
def test_an_unusable_schema_is_an_error(request_: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        wanted_of(request_, CheckerCache().get)


def test_choices_and_patterns_are_checked_whole() -> None:
    choice = wanted(structured_outputs={"choice": ["yes", "no"]})
    assert keywords(choice, "yes") == []
    assert keywords(choice, "yes!") == ["choice"]
    pattern = wanted(structured_outputs={"regex": "a|bc"})
    assert keywords(pattern, "bc") == []
    assert keywords(pattern, "abc") == ["pattern"]
    assert keywords(pattern, "b", reason="length") == ["output_truncated"]
    assert (
        wanted_of({"structured_outputs": {"regex": "(?<"}}, CheckerCache().get) is None
    )  # the engine has its own word


def test_tool_calls_are_checked_against_the_tools_parameters() -> None:
    asked = wanted(tools=[TOOL])
    assert keywords(asked, "no tool needed") == []
    assert keywords(asked, None, [call("weather", '{"city": "Paris"}')]) == []
    assert keywords(asked, None, [call("weather", "{}"), call("time", "{}")]) == ["required", "unknown_tool"]
    assert keywords(asked, None, [call("weather", '{"city": 1, "city": "x"}')]) == ["duplicate_key"]
    assert keywords(asked, None, [call("weather", '{"city": "Pa')], "length") == ["output_truncated"]
    message = {"tool_calls": [call("weather", '{"city": 1}')]}
    (found,) = asked.violations({"message": message})
    assert found.path == "/tool_calls/0/function/arguments/city"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_has_to_be_called_is(choice: Any) -> None:
    asked = wanted(tools=[TOOL], tool_choice=choice)
    assert keywords(asked, "Sunny.") == ["no_tool_call"]
    assert keywords(asked, None, [call("weather", '{"city": "Paris"}')]) == []


def test_a_tool_call_stands_for_json_that_is_asked_for_as_well() -> None:
    asked = wanted(tools=[TOOL], response_format={"type": "json_object"})
    assert keywords(asked, None, [call("weather", '{"city": "Paris"}')]) == []
    assert keywords(asked, "Sunny.") == ["syntax"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON, JSON, st.sampled_from(["stop", "length", "tool_calls", None]))
def test_any_choice_gets_a_verdict(content: Any, arguments: Any, reason: str | None) -> None:
    asked = wanted(tools=[TOOL], response_format={"type": "json_object"})
    text = content if isinstance(content, str) else json.dumps(content)
    calls = [call("weather", arguments if isinstance(arguments, str) else json.dumps(arguments))]
    for message in ({"content": text}, {"content": None, "tool_calls": calls}, {"content": content}, {}):
        for found in asked.violations({"message": message, "finish_reason": reason}):
            assert found.keyword and found.message
