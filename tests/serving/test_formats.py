"""YAML and XML as strictly as JSON, and typed by the schema where the format has no types."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.tasks import extraction
from serving.guard.formats import parse, parse_xml, parse_yaml, unfenced
from serving.guard.schema import Checker
from serving.guard.strict_json import Malformed


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("", "empty"),
        ("\ufeffa: 1", "byte_order_mark"),
        ("a: 1\na: 2", "duplicate_key"),
        ("1: a", "key_not_text"),
        ("[a, b]: c", "key_not_text"),
        ("a: &x 1\nb: *x", "alias"),
        ("a: &a [x]", "alias"),
        ("!!python/object/apply:os.system [ls]", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("[" * 200 + "]" * 200, "too_deep"),
        ("1e999", "number_overflow"),
        ("9" * 4001, "number_too_long"),
        ("a: [1, 2", "syntax"),
        ("a: 1\n---\nb: 2", "syntax"),
        ("a: \x07", "syntax"),
        ("Here it is:\na: 1\nb", "syntax"),
    ],
)
def test_what_is_wrong_with_yaml_has_a_name(text: str, violation: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse(text, "yaml")
    assert caught.value.violation == violation


def test_yaml_is_read_by_the_core_types() -> None:
    text = "a: no\nb: 14:30\nc: 2026-01-01\nd: 012\ne: 1.5\nf: ~\ng: true\nh: '1'\ni: .inf\n<<: x"
    assert parse_yaml(text) == {
        "a": "no", "b": "14:30", "c": "2026-01-01", "d": 12, "e": 1.5, "f": None, "g": True, "h": "1", "i": ".inf",
        "<<": "x",
    }  # fmt: skip
    assert parse_yaml("---\n- 123456789012345678901234\n...") == [123456789012345678901234]


WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\ufeff"), max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_json_is_yaml_with_the_same_value(value: Any) -> None:
    assert same(parse_yaml(json.dumps(value, ensure_ascii=False)), value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("", "empty"),
        ("<a><b>1</a>", "syntax"),
        ("<a>1</a><b/>", "syntax"),
        ("text", "syntax"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>', "document_type"),
        ('<!DOCTYPE a SYSTEM "http://169.254.169.254/"><a/>', "document_type"),
        ('<a b="1"/>', "attribute"),
        ("<a>text<b/></a>", "mixed_content"),
        ("<a><b/>text</a>", "mixed_content"),
        ("<a><b>1</b><c/><b>2</b></a>", "duplicate_key"),
        ("<a>" * 200 + "</a>" * 200, "too_deep"),
    ],
)
def test_what_is_wrong_with_xml_has_a_name(text: str, violation: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse(text, "xml", {"type": "object"})
    assert caught.value.violation == violation


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"additionalProperties": {"type": "integer"}}, "<r><a>1</a></r>", {"a": 1}),
        ({"patternProperties": {"^n": {"type": "number"}}}, "<r><n1>1.5</n1><m>2</m></r>", {"n1": 1.5, "m": "2"}),
        (
            {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": {"type": "boolean"}},
            "<r><i>1</i><i>2</i><i>true</i></r>",
            [1, "2", True],
        ),
    ],
)
def test_xml_takes_the_types_of_what_is_not_among_the_properties(schema: Any, text: str, value: Any) -> None:
    found = parse(text, "xml", schema)
    assert found == value and Checker(schema).violations(found) == []


@pytest.mark.parametrize(("text", "violation"), [(r'a: "\ud800"', "lone_surrogate"), (r'a: "\U00110000"', "syntax")])
def test_escapes_of_yaml_that_are_no_characters_have_a_name(text: str, violation: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse(text, "yaml")
    assert caught.value.violation == violation


def test_xml_takes_its_types_from_the_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "rate": {"type": ["number", "null"]},
            "ok": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "none": {"type": "array", "items": {"type": "string"}},
            "home": {"$ref": "#/$defs/place"},
            "code": {"enum": [1, 2]},
            "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
        "$defs": {"place": {"type": "object", "properties": {"zip": {"type": "string"}, "floor": {"type": "integer"}}}},
    }
    text = """<record><name>42</name><age>28</age><rate/><ok>true</ok><tags><item>1</item></tags><none/>
        <home><zip>01234</zip><floor>-1</floor></home><code>2</code><either></either></record>"""
    assert parse_xml(text, schema) == {
        "name": "42", "age": 28, "rate": None, "ok": True, "tags": ["1"], "none": [],
        "home": {"zip": "01234", "floor": -1}, "code": 2, "either": None,
    }  # fmt: skip
    assert parse_xml("<r><item>a</item><item>b</item></r>") == ["a", "b"]  # no schema: equal children are a list
    assert parse_xml("<r><age>many</age></r>", schema) == {"age": "many"}  # and the schema says what is wrong with it


def test_the_structured_experts_records_are_as_their_schema_asks() -> None:
    for seed in range(60):
        example = extraction.structured(random.Random(seed), "train")
        form, value = example.reference["format"], example.reference["value"]  # type: ignore[index]
        line = next(line for line in example.messages[0]["content"].split("\n") if line.startswith("Schema: "))
        schema = extraction.json_schema(line.removeprefix("Schema: "))
        found = parse(example.answer, form, schema)
        assert same(found, value) or form == "xml", (form, found, value)
        assert Checker(schema).violations(found) == [], (example.answer, schema)


def test_a_fence_around_all_of_a_text_is_taken_off() -> None:
    assert unfenced("```yaml\na: 1\n```") == "a: 1"
    assert unfenced("Here:\n```yaml\na: 1\n```") is None
