"""The extraction tasks: disjoint splits, answers that score as right, every form and language."""

import random

import jsonschema_rs
import pytest

from fusion.data import load_examples
from fusion.evaluation.scores import score
from fusion.sections.data import DataSource
from fusion.tasks.extraction import GENERATORS, RECORDS, ZHANG_SAN


def rows(split: str, count: int, seed: int = 0):
    return load_examples(DataSource(generated="extraction.structured", split=split), "structured", count, seed)


def test_every_taught_answer_is_right():
    for row in rows("train", 300):
        assert score(row.answer, row) == 1.0


def test_splits_share_no_subject():
    train, held_out = rows("train", 3000), rows("held_out", 300)
    assert not {row.question for row in train} & {row.question for row in held_out}
    assert not any(ZHANG_SAN in row.question for row in train)
    for record in RECORDS:
        for lang in ("zh", "en"):
            subjects = [
                {str(next(iter(record(random.Random(seed), split, lang)[1].values()))) for seed in range(300)}
                for split in ("train", "held_out")
            ]
            if record.__name__ != "meeting":  # its first value is the topic; its attendees are the subjects
                assert not subjects[0] & subjects[1], record


def test_the_design_example_is_among_a_few_held_out_rows():
    wanted = {"name": "张三", "age": 28, "occupation": "软件工程师", "city": "上海"}
    found = [row for row in rows("held_out", 24) if row.reference["value"] == wanted]
    assert len(found) == 1
    assert found[0].question.startswith("张三，28岁，软件工程师，住在上海。返回 JSON\n")


def test_every_form_language_and_kind_of_value_occurs():
    drawn = rows("train", 400)
    assert {row.reference["format"] for row in drawn} == {"json", "yaml", "xml"}
    assert {row.question.isascii() for row in drawn if "€" not in row.question} == {True, False}
    text = repr([row.reference["value"] for row in drawn])
    assert "None" in text and "[" in text and "'currency'" in text and "-0" in text


def test_deterministic_per_seed():
    assert rows("train", 20, seed=3) == rows("train", 20, seed=3)
    assert rows("train", 20, seed=3) != rows("train", 20, seed=4)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_json_rows_carry_the_schema_their_value_meets(split: str):
    rng = random.Random(0)
    drawn = [GENERATORS["structured"](rng, split) for _ in range(200)]
    for row in drawn:
        if row.reference["format"] == "json":
            assert jsonschema_rs.is_valid(row.schema, row.reference["value"])
        else:
            assert row.schema is None
