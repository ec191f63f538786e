"""What schemas multiply to: counted as a validator would apply them, and nothing ordinary is refused."""

import time
from typing import Any

import pytest

from serving.guard.cost import MAX_SECONDS, evaluations
from serving.guard.schema import Checker, SchemaError


def recursive(a: dict[str, Any]) -> dict[str, Any]:
    return {"$defs": {"a": a}, "$ref": "#/$defs/a"}


TREE = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}}
LIST = {
    "$defs": {"a": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/a"}}]}},
    "$ref": "#/$defs/a",
}


@pytest.mark.parametrize(
    ("schema", "count"),
    [
        (True, 0),
        ({}, 1),
        ({"allOf": [{}, {"anyOf": [{}, {}]}]}, 5),
        ({"properties": {"a": {"not": {}}, "b": {}}, "additionalProperties": {"type": "null"}}, 3),
        ({"$ref": "#"}, 1),
        ({"$defs": {"a": {"$anchor": "x"}}, "allOf": [{"$ref": "#x"}, {"$ref": "#/$defs/a"}]}, 5),
        (TREE, 2),
        (LIST, 4),
    ],
)
def test_subschemas_at_one_place_are_counted(schema: Any, count: int) -> None:
    assert evaluations(schema) == count


def doubling(levels: int) -> dict[str, Any]:
    names = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(levels)}
    return {"$defs": {**names, f"a{levels}": {"type": "string"}}, "$ref": "#/$defs/a0"}


RECURSIVE = recursive({"items": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}})
TWO_WAYS = recursive({"anyOf": [{"items": {"$ref": "#/$defs/a"}}, {"items": {"$ref": "#/$defs/a"}}]})


@pytest.mark.parametrize("schema", [doubling(25), doubling(60), RECURSIVE, TWO_WAYS])
def test_what_multiplies_is_refused_at_once(schema: Any) -> None:
    began = time.monotonic()
    with pytest.raises(SchemaError, match="multiply"):
        Checker(schema)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("schema", [TREE, LIST, doubling(5), {"anyOf": [{"const": i} for i in range(5000)]}])
def test_what_does_not_is_taken(schema: Any) -> None:
    Checker(schema)


def test_what_takes_long_to_count_is_given_up() -> None:
    branches = [{"properties": {f"p{place}": {}}, "additionalProperties": {}} for place in range(3000)]
    began = time.thread_time()
    with pytest.raises(SchemaError, match="too long to count"):
        Checker({"anyOf": branches})
    assert time.thread_time() - began < 4 * MAX_SECONDS


def test_a_clock_that_jumps_refuses_no_small_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0])
    monkeypatch.setattr("serving.guard.cost.time.thread_time", lambda: next(times, 1e9))
    assert evaluations({"type": "object", "properties": {"a": {"allOf": [{}, {}]}}}) == 3
