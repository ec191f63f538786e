"""A schema in other words for the grammar: the same values satisfy it, and xgrammar permits what it should."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xgrammar import Grammar
from xgrammar.testing import _is_grammar_accept_string

from serving.bench.calls import hard_calls
from serving.guard.bodies import encoded
from serving.guard.grammar import MAX_BYTES, for_grammar
from serving.guard.ladder import Limits, Send, ladder_for
from serving.guard.schema import Checker, CheckerCache

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "mail": {"type": "string"}, "phone": {"type": "string"}},
    "required": ["name"],
}
REACHED = {**PERSON, "anyOf": [{"required": ["mail"]}, {"required": ["phone"]}]}
KINDS = {
    "type": "object",
    "properties": {"kind": {"type": "string"}, "size": {"type": "integer"}},
    "required": ["kind"],
    "additionalProperties": False,
    "oneOf": [
        {"properties": {"kind": {"const": "round"}}},
        {"properties": {"kind": {"const": "long"}}, "required": ["size"]},
    ],
}
NAMED = {"type": "object", "required": ["name"]}
WORDS = {  # as some of BFCL's are: nothing is both a list and one of the words
    "type": "object",
    "properties": {"a": {"type": "integer"}, "m": {"type": "array", "items": {"type": "string"}, "enum": ["x"]}},
    "required": ["a"],
}


def permits(schema: Any, value: Any) -> bool:
    grammar = Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
    return bool(_is_grammar_accept_string(grammar, json.dumps(value)))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (REACHED, [{"name": "Ann", "mail": "a"}, {"name": "Ann", "phone": "1"}], [{"name": "Ann"}, {"mail": "a"}, 3]),
        ({"$defs": {"a": REACHED}, "type": "array", "items": {"$ref": "#/$defs/a"}}, [[]], [[{"name": "Ann"}]]),
        (KINDS, [{"kind": "round"}, {"kind": "long", "size": 1}], [{"kind": "long"}, {"kind": "flat", "size": 1}]),
        (NAMED, [{"name": "Bob"}, {"name": 3}], [{}]),
        ({**NAMED, "additionalProperties": {"type": "integer"}}, [{"name": 3}], [{}, {"name": "Bob"}]),
        (WORDS, [{"a": 1}], [{"a": 1, "m": "x"}, {"a": 1, "m": []}]),
        ({"type": "object", "properties": {"m": {"type": "string", "enum": ["x", 1]}}}, [{"m": "x"}], [{"m": 1}]),
        ({**NAMED, "properties": {"age": {"type": "integer"}}}, [{"age": 1, "name": "Bob"}], [{"age": 1}]),
    ],
)
def test_the_grammar_permits_what_satisfies_the_schema_and_nothing_else(
    schema: Any, right: list[Any], wrong: list[Any]
) -> None:
    written = for_grammar(schema).schema
    assert [value for value in [*right, *wrong] if permits(written, value)] == right
    assert [value for value in [*right, *wrong] if not Checker(schema).violations(value)] == right
    assert [value for value in [*right, *wrong] if permits(schema, value)] != right  # as it is without


NAMES = st.sampled_from(["a", "b", "c"])
PARTS = st.sampled_from(
    [
        True,
        {},
        {"type": "integer"},
        {"type": "string"},
        {"const": 1},
        {"enum": [1, "x"]},
        {"type": "integer", "enum": [1]},
    ]
)
PROPERTIES = st.dictionaries(NAMES, PARTS, max_size=2)
REQUIRED = st.lists(NAMES, max_size=2, unique=True)
ALTERNATIVE = st.fixed_dictionaries(
    {}, optional={"properties": PROPERTIES, "required": REQUIRED, "type": st.sampled_from(["object", "array"])}
)
SCHEMA = st.fixed_dictionaries(
    {"type": st.sampled_from(["object", "object", "object", "integer"])},
    optional={
        "properties": PROPERTIES,
        "required": REQUIRED,
        "additionalProperties": st.sampled_from([True, False, {"type": "integer"}]),
        "patternProperties": st.just({"^c": {"type": "integer"}}),
        "minProperties": st.just(1),
        "anyOf": st.lists(ALTERNATIVE, min_size=1, max_size=3),
        "oneOf": st.lists(ALTERNATIVE, min_size=1, max_size=3),
        "unevaluatedProperties": st.just(False),
    },
)
VALUES = st.dictionaries(NAMES, st.sampled_from([1, 2, "x", None]), max_size=3) | st.just(1) | st.just([])


@given(SCHEMA, st.lists(VALUES, min_size=1, max_size=6), st.booleans())
def test_the_same_values_satisfy_both(schema: Any, values: list[Any], inner: bool) -> None:
    if inner:
        schema = {"properties": {"a": schema}, "$defs": {"b": schema}, "items": {"$ref": "#/$defs/b"}}
        values = [{"a": value} for value in values] + [values]
    written = for_grammar(schema).schema
    asked, given_ = Checker(schema), Checker(written)
    for value in values:
        assert bool(asked.violations(value)) == bool(given_.violations(value)), written


def test_what_is_said_in_other_words_is_not_reported_as_left_out() -> None:
    assert all(Checker(schema).left_out == [] for schema in (REACHED, NAMED, WORDS))
    assert [found.keyword for found in Checker(KINDS).left_out] == ["oneOf"]
    moved = {**REACHED, "properties": {**PERSON["properties"], "phone": {"$ref": "#/properties/mail"}}}  # type: ignore[dict-item]
    assert for_grammar(moved).schema is moved
    assert {found.keyword for found in Checker(moved).left_out} == {"anyOf", "required"}


def test_alternatives_that_would_multiply_are_left_alone() -> None:
    schema: Any = REACHED
    for _ in range(12):
        schema = {**REACHED, "properties": {**PERSON["properties"], "name": schema}}  # type: ignore[dict-item]
    assert for_grammar(schema).schema is schema
    wide = {**PERSON, "anyOf": [{"required": ["mail"]}] * 2000}
    assert len(encoded(wide)) * 100 > MAX_BYTES
    assert for_grammar(wide).schema is wide


@pytest.mark.parametrize("place", ["response_format", "structured_outputs", "text"])
def test_the_engine_gets_the_other_words_and_the_answer_is_judged_by_the_schema_itself(place: str) -> None:
    fields: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": NAMED}}}
    if place != "response_format":
        fields = {"structured_outputs": {"json": NAMED if place == "structured_outputs" else json.dumps(NAMED)}}
    request = {"messages": [{"role": "user", "content": "?"}], **fields}
    ladder = ladder_for(request, CheckerCache().get, Limits())
    assert ladder is not None and ladder.wanted.schema == NAMED
    step = ladder.start()
    assert isinstance(step, Send)
    sent = json.dumps(step.body)
    assert json.dumps({**NAMED, "properties": {"name": {}}}) in sent
    assert request["messages"] == step.body["messages"]


def test_a_small_schema_that_doubles_with_every_level_is_left_alone_at_once() -> None:
    schema: Any = {"type": "object", "required": ["z"]}
    for _ in range(14):
        schema = {"type": "object", "properties": {"n": schema}, "anyOf": [{}] * 6}
    both = {**schema, "anyOf": [{"properties": schema["properties"]}] * 6}
    assert for_grammar(both).schema is both


def test_texts_are_not_multiplied_beyond_the_limit() -> None:
    wide = {**PERSON, "properties": {"name": {"type": "string", "pattern": "a" * 5000}}}
    wide["anyOf"] = [{"required": ["mail"]}] * 100
    assert for_grammar(wide).schema is wide


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object", "anyOf": [NAMED], "unevaluatedProperties": False}, {"name": 1}),
        ({"type": "object", "allOf": [NAMED], "unevaluatedProperties": False}, {"name": 1}),
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "anyOf": [{"properties": {"a": {"const": True}}}]},
            {"a": True},
        ),
        (
            {"type": "object", "properties": {"a": {"enum": [0]}}, "anyOf": [{"properties": {"a": {"enum": [False]}}}]},
            {"a": False},
        ),
    ],
)
def test_what_would_be_another_schema_is_left_alone(schema: Any, value: Any) -> None:
    assert Checker(schema).violations(value) and Checker(for_grammar(schema).schema).violations(value)


def test_a_name_that_may_not_be_is_reported_still() -> None:
    schema = {**PERSON, "additionalProperties": False, "anyOf": [{"required": ["mail"]}, {"required": ["fax"]}]}
    found = {(left.path, left.keyword) for left in Checker(schema).left_out}
    assert ("/anyOf/1", "required") in found and ("/anyOf/0", "required") not in found


def test_a_described_property_that_a_described_alternative_narrows_is_joined() -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"type": "string", "description": "of shape"}},
        "anyOf": [{"properties": {"kind": {"const": "round", "description": "a circle"}}}],
    }
    (joined,) = for_grammar(schema).schema["anyOf"]
    assert joined["properties"]["kind"] == {"type": "string", "description": "a circle", "const": "round"}


@given(st.sampled_from([call.schema for call in hard_calls()]), st.lists(VALUES, min_size=1, max_size=4))
def test_the_hard_schemas_of_the_benchmark_keep_their_meaning(schema: Any, values: list[Any]) -> None:
    written = for_grammar(schema)
    for value in values:
        assert bool(Checker(schema).violations(value)) == bool(Checker(written.schema).violations(value))
    if schema == REACHED:
        assert written.mended
