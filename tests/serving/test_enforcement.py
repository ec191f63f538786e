"""The enforcement report: what the grammar leaves to validation, where it stands."""

from typing import Any

import pytest

from serving.guard.enforcement import unenforced


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1, 2]}}},
        {"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]}},
    ],
)
def test_what_the_grammar_enforces_is_not_reported(schema: Any) -> None:
    assert unenforced(schema) == []


@pytest.mark.parametrize(
    ("schema", "path", "keyword"),
    [
        ({"properties": {"a/b": {"not": {}}}}, "/properties/a~1b", "not"),
        ({"items": {"multipleOf": 3}}, "/items", "multipleOf"),
        ({"$defs": {"x": {"uniqueItems": True}}}, "/$defs/x", "uniqueItems"),
        ({"allOf": [{}, {"oneOf": [{}]}]}, "/allOf/1", "oneOf"),
        ({"required": ["a"]}, "", "required"),
        ({"type": "array", "enum": ["a"]}, "", "type"),
        ({"type": ["integer", "null"], "const": "a"}, "", "type"),
        ({"type": "string", "format": "iban"}, "", "format"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "", "maxLength"),
        ({"$ref": "#", "minimum": 3}, "", "$ref"),
        ({"anyOf": [{}], "properties": {}}, "", "anyOf"),
        ({"propertyNames": {}, "properties": {}}, "", "propertyNames"),
        ({"patternProperties": {"a": {}, "b": {}}}, "", "patternProperties"),
        ({"allOf": [{}, {}]}, "", "allOf"),
    ],
)
def test_what_it_does_not_is_found_wherever_it_stands(schema: Any, path: str, keyword: str) -> None:
    assert (path, keyword) in [(found.path, found.keyword) for found in unenforced(schema)]
