"""Schemas that nothing satisfies are seen, and no other is taken for one."""

from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bench.calls import hard_calls
from serving.guard.satisfiable import impossible
from serving.guard.schema import Checker
from tests.serving.test_asgi import GOOD, Start, ask

LIST_OF_WORDS = {"type": "array", "items": {"type": "string"}, "enum": ["trust", "value"]}  # as one of BFCL's has it
IMPOSSIBLE: list[tuple[Any, str]] = [
    (False, "/: the schema is false"),
    (LIST_OF_WORDS, "/: no value of its enum is of type array"),
    ({"type": ["string", "null"], "const": 1}, "/: no value of its const is of type string or null"),
    ({"type": "integer", "enum": [1.5, True]}, "/: no value of its enum is of type integer"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "/: minimum is greater than maximum"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "/: minLength is greater than maxLength"),
    ({"type": "object", "properties": {"a/b": LIST_OF_WORDS}, "required": ["a/b"]}, "/properties/a~1b: no value"),
    ({"allOf": [{}, {"type": "object", "properties": {"a": False}, "required": ["a"]}]}, "/allOf/1/properties/a: the"),
    ({"anyOf": [False, LIST_OF_WORDS]}, "/anyOf/0: the schema is false"),
]
POSSIBLE: list[Any] = [
    True,
    {},
    {"type": "object", "properties": {"a": LIST_OF_WORDS}},  # without it
    {"properties": {"a": False}, "required": ["a"]},  # no object at all
    {"anyOf": [False, {"type": "null"}]},
    {"type": ["integer", "null"], "minimum": 3, "maximum": 2},
    {"type": "integer", "enum": [2.0]},
    {"type": "array", "minimum": 3, "maximum": 2},
    {"type": "array", "enum": [["a"]]},
    {"type": "string", "const": 1, "$schema": "http://json-schema.org/draft-04/schema#"},
    {
        "$ref": "#/$defs/a",
        "$defs": {"a": {}},
        "type": "string",
        "const": 1,
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.sampled_from(["", "trust", "value", "abc"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "a/b", "c"]), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(("schema", "said"), IMPOSSIBLE)
def test_what_nothing_satisfies_is_said(schema: Any, said: str) -> None:
    assert (impossible(schema) or "").startswith(said)


@given(value=JSON)
def test_nothing_indeed_satisfies_them(value: Any) -> None:
    for schema, _ in IMPOSSIBLE:
        assert Checker(schema).violations(value)


@pytest.mark.parametrize("schema", [*POSSIBLE, *(call.schema for call in hard_calls())])
def test_what_something_satisfies_is_left(schema: Any) -> None:
    assert impossible(schema) is None


def test_it_is_400_before_any_generation(guarded: Start) -> None:
    guard = guarded(GOOD)
    schema = {"type": "object", "properties": {"metrics": LIST_OF_WORDS}, "required": ["metrics"]}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(guard, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert caught.value.code == "unsatisfiable_schema" and "/properties/metrics: no value" in caught.value.message
    assert guard.upstream.requests == []
