"""Public data in their own files: what becomes of a row, and which part of it is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusion.data import ChatExample, load_examples, source_files, split_of
from fusion.errors import UserError
from fusion.evaluation.harness_metrics import is_valid
from fusion.evaluation.scores import score
from fusion.recipe import Recipe
from fusion.sandbox import Done
from fusion.sections.data import DataSource
from fusion.tasks import public
from fusion.tasks.public import LANGUAGES
from tests.recipes import recipe_data

FUNCTION = {
    "name": "ride",
    "description": "Orders a ride.",
    "parameters": {
        "type": "dict",
        "properties": {
            "to": {"type": "string"},
            "price": {"type": "float", "optional": True},
            "seats": {"type": "tuple", "items": {"type": "any"}},
        },
        "required": ["to"],
    },
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture
def bfcl(tmp_path: Path) -> Path:
    folder = tmp_path / "bfcl"
    for name in ("simple_python", "multiple", "live_simple", "live_multiple"):
        rows = [
            {"id": f"{name}_{i}", "question": [[{"role": "user", "content": f"{name} {i}?"}]], "function": [FUNCTION]}
            for i in range(2)
        ]
        rows[1]["function"] = [FUNCTION, {**FUNCTION, "name": "drive"}]
        answers = [
            {"id": f"{name}_0", "ground_truth": [{"ride": {"to": ["A", "a town"], "price": ["", 1.5]}}]},
            {"id": f"{name}_1", "ground_truth": [{"ride": {"to": ["A"], "seats": [[1, 2]], "price": []}}]},
        ]
        write_lines(folder / f"BFCL_v4_{name}.json", rows)
        write_lines(folder / "possible_answer" / f"BFCL_v4_{name}.json", answers)
    return folder


def read(path: Path, form: str, split: str = "train", **fields: Any) -> list[ChatExample]:
    return load_examples(DataSource.model_validate({"path": str(path), "form": form, "split": split, **fields}), "d")


def test_function_calls_become_rows_whose_own_answers_are_right(bfcl: Path) -> None:
    train, held_out = read(bfcl, "bfcl"), read(bfcl, "bfcl", "held_out")
    assert sorted(row.question.split("\n")[-1] for row in train) == ["multiple 0?", "simple_python 0?"]
    assert sorted(row.question.split("\n")[-1] for row in held_out) == ["live_multiple 0?", "live_simple 0?"]
    for row in train + held_out:
        assert json.loads(row.answer) == [{"name": "ride", "arguments": {"to": "A"}}]
        assert score(row.answer, row) == 1.0 and is_valid(row.answer, row)
        assert row.schema is not None
        described = json.loads(row.question.split("\n")[1])["parameters"]
        assert described["type"] == "object" and described["properties"]["price"] == {"type": "number"}
        assert described["properties"]["seats"] == {"type": "array", "items": {}}


def test_a_schema_refuses_other_calls(bfcl: Path) -> None:
    row = read(bfcl, "bfcl")[0]
    for answer in ('[{"name": "walk", "arguments": {"to": "A"}}]', '[{"name": "ride", "arguments": {}}]', "[]", "A"):
        assert not is_valid(answer, row)


@pytest.fixture
def xquad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(public, "XQUAD_TRAIN", 3)
    folder = tmp_path / "xquad"
    folder.mkdir()
    for code in LANGUAGES:
        paragraphs = [
            {
                "context": f"{code} paragraph {i}",
                "qas": [{"id": "1", "question": f"{code} who {i}?", "answers": [{"text": f"{code} {i}"}]}],
            }
            for i in range(5)
        ]
        paragraphs[0]["context"] = f"{code} long" * 300
        (folder / f"xquad.{code}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return folder


def test_paragraphs_are_translated_and_asked_about(xquad: Path) -> None:
    train, held_out = read(xquad, "xquad"), read(xquad, "xquad", "held_out")
    numbers = [{int(row.answer.split()[-1]) for row in rows if "long" not in row.answer} for rows in (train, held_out)]
    assert numbers == [{0, 1, 2}, {3, 4}]
    translations = [row for row in train if "paragraph" in row.answer]
    assert len(translations) == 2 * public.XQUAD_PAIRS
    assert not any("long" in row.answer for row in train)
    for row in translations:
        target = row.answer.split()[0]
        assert LANGUAGES[target] in row.question and f"{target} paragraph" not in row.question
    assert read(xquad, "xquad") == train


def test_files_of_different_lengths_are_refused(xquad: Path) -> None:
    (xquad / "xquad.de.json").write_text(json.dumps({"data": []}))
    with pytest.raises(UserError, match="different numbers of paragraphs"):
        read(xquad, "xquad")


PROBLEMS = {
    "add two numbers": ("def main_solution(a, b):\n    return a + b", "return {'a': rng.randint(0, 99), 'b': 1}"),
    "never answers": ("def main_solution(a):\n    while True: pass", "return {'a': rng.randint(0, 99)}"),
    "answers another way each time": (
        "import random\ndef main_solution(a):\n    return random.random()",
        "return {'a': rng.randint(0, 99)}",
    ),
    "fails": ("def main_solution(a):\n    return 1 / 0", "return {'a': rng.randint(0, 99)}"),
    "has one input": ("def main_solution(a):\n    return a", "return {'a': 7}"),
}


@pytest.fixture
def codeio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(public, "CODEIO_SECONDS", 1)
    rows = [
        {
            "task_description": name,
            "input_output_spec": "Input: numbers.",
            "code_sample": code,
            "input_generator": f"def generate_inputs(rng: Random) -> dict:\n    {body}",
        }
        for name, (code, body) in PROBLEMS.items()
    ]
    path = tmp_path / "codeio.jsonl"
    write_lines(path, rows)
    return path


def test_problems_are_kept_where_their_solution_passes_its_own_tests(
    codeio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [row for split in ("train", "held_out") for row in _or_none(codeio, split)]
    [row] = found
    assert row.question.startswith("add two numbers") and len(row.reference) == 3
    assert score(row.answer, row) == 1.0
    assert score("def main_solution(a, b):\n    return a - b", row) == 0.0
    assert split_of("add two numbers") in ("train", "held_out")
    monkeypatch.setattr(public, "run_python", lambda *_: Done(False, "", timed_out=True))
    assert [again for split in ("train", "held_out") for again in _or_none(codeio, split)] == found  # remembered


def _or_none(path: Path, split: str) -> list[ChatExample]:
    try:
        return read(path, "codeio", split)
    except UserError:
        return []


def test_other_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("not JSON")
    for form in ("bfcl", "xquad"):
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path, form)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "data.jsonl", "codeio")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "missing", "bfcl")


def test_parts_give_their_rows_and_share_what_is_left(bfcl: Path) -> None:
    parts = [{"path": str(bfcl), "form": "bfcl", "rows": 1}, {"generated": "demo.math"}]
    source = DataSource.model_validate({"parts": parts})
    rows = load_examples(source, "structured", 7)
    assert [row.score for row in rows].count("function_calls") == 1 and len(rows) == 5
    assert {row.domain for row in rows} == {"structured"}
    assert [path.name for path in source_files(source)][-1].endswith(".py")
    assert source.describe() == f"{bfcl}, train and demo.math, train"


def test_lines_of_a_file_are_a_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "answer": "a"} for i in range(1, 11)])
    source = DataSource.model_validate({"path": str(tmp_path / "rows.jsonl"), "lines": [4, 6]})
    assert sorted(row.question for row in load_examples(source, "d")) == ["q4", "q5", "q6"]


def test_a_file_of_the_data_folder_stands_in_for_the_hub(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("")
    data = recipe_data(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path})
    data["domains"]["math"] = {
        "train": {"file": "there.jsonl", "hub": "some/set"},
        "held_out": {"file": "missing.jsonl", "hub": "some/set"},
    }
    data["domains"]["general"]["held_out"] = {"file": "missing.jsonl"}
    found = Recipe.model_validate(data | {"data_folder": str(tmp_path)}).domains
    assert found["math"].train.path == str(tmp_path / "there.jsonl")
    assert found["math"].held_out.path is None
    assert found["general"].held_out.path == str(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="data_folder, which is not set"):
        Recipe.model_validate(data)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "x", "lines": [3, 2]}, "'lines' are the first and the last"),
        ({"path": "x", "form": "bfcl", "split": "test"}, "has the splits 'train' and 'held_out'"),
        ({"generated": "demo.math", "parts": [{"generated": "demo.math"}]}, "name a 'generated' task"),
    ],
)
def test_sources_that_contradict_themselves_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataSource.model_validate(fields)
