"""Function calls: the values that count, and none beside them."""

import json
from typing import Any

import pytest

from fusion.data import chat
from fusion.evaluation.function_calls import right
from fusion.evaluation.scores import score

WANTED = [{"ride": {"to": ["Main Street, 5", "Main St 5"], "seats": [2], "kind": ["", "plus"], "pets": [True]}}]


def call(**arguments: Any) -> list[dict[str, Any]]:
    return [{"name": "ride", "arguments": arguments}]


@pytest.mark.parametrize(
    ("found", "is_right"),
    [
        (call(to="Main Street, 5", seats=2, pets=True), True),
        (call(to="main street 5", seats=2.0, kind="PLUS", pets=True), True),
        (call(to="Main St 5", seats=2, kind="plus", pets=True), True),
        (call(to="Main Street, 6", seats=2, pets=True), False),
        (call(to="Main Street, 5", seats="2", pets=True), False),
        (call(to="Main Street, 5", seats=2, pets=1), False),
        (call(to="Main Street, 5", pets=True), False),
        (call(to="Main Street, 5", seats=2, kind="other", pets=True), False),
        (call(to="Main Street, 5", seats=2, pets=True, more=1), False),
        ([*call(to="Main St 5", seats=2, pets=True)] * 2, False),
        ([], False),
        ({"name": "ride"}, False),
        ([{"name": "drive", "arguments": {}}], False),
        ([{"name": "ride", "arguments": [], "id": 1}], False),
        ("ride", False),
    ],
)
def test_a_call_is_right_where_every_value_counts(found: Any, is_right: bool) -> None:
    assert right(found, WANTED) is is_right


def test_values_within_lists_and_objects_have_alternatives_too() -> None:
    wanted = [{"f": {"points": [[1, 2]], "at": [{"lat": [1.5], "name": ["A", ""]}], "rows": [[{"x": [1, 2]}]]}}]
    assert right([{"name": "f", "arguments": {"points": [1, 2], "at": {"lat": 1.5}, "rows": [{"x": 2}]}}], wanted)
    assert not right([{"name": "f", "arguments": {"points": [2, 1], "at": {"lat": 1.5}, "rows": [{"x": 2}]}}], wanted)
    assert not right([{"name": "f", "arguments": {"points": [1, 2], "at": {}, "rows": [{"x": 2}]}}], wanted)


def test_several_calls_may_come_in_any_order_and_each_once() -> None:
    wanted = [{"f": {"x": [1]}}, {"f": {"x": [2]}}]
    one, two = ({"name": "f", "arguments": {"x": x}} for x in (1, 2))
    assert right([two, one], wanted)
    assert not right([one, one], wanted)


@pytest.mark.parametrize(("around", "found"), [("{}", 1.0), ("```json\n{}\n```", 1.0), ("Sure: {}", 0.0)])
def test_the_score_reads_an_answer(around: str, found: float) -> None:
    answer = json.dumps(call(to="Main St 5", seats=2, pets=True))
    row = chat("", "", "structured", score="function_calls", reference=WANTED)
    assert score(around.replace("{}", answer), row) == found
