"""Rows from where a recipe says: the forms they come in, and that nothing scored was trained on."""

import json
from pathlib import Path

import pytest

from fusion.data import chat, choosing_rows, load_examples, trained_on
from fusion.errors import UserError
from fusion.recipe_file import load_recipe
from fusion.sections.data import DataSource, Domain

CONFIGS = Path(__file__).parents[2] / "configs"


def written(folder: Path, *rows: dict) -> DataSource:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return DataSource(path=str(path))


def test_three_forms_of_one_conversation(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "1+1="), ("assistant", "2")]
    openai = {"messages": [{"role": role, "content": text} for role, text in turns]}
    named = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = {"conversations": [{"from": named[role], "value": text} for role, text in turns]}
    first, second = load_examples(written(tmp_path, openai, sharegpt), "math")
    assert first == second
    (columns,) = load_examples(written(tmp_path, {"prompt": "1+1=", "answer": "2"}), "math")
    assert (columns.question, columns.answer) == (first.question, first.answer) == ("1+1=", "2")


@pytest.mark.parametrize(
    "row", [{"conversations": [{"from": "tool", "value": "x"}]}, {"messages": [{"role": "user", "content": "x"}]}, {}]
)
def test_a_row_of_another_form_is_named_with_its_line(tmp_path: Path, row: dict) -> None:
    source = written(tmp_path, {"prompt": "a", "answer": "b"}, row)
    with pytest.raises(UserError, match="line 2: not a chat row"):
        load_examples(source, "math")


def test_what_was_trained_on_is_known_by_its_prompt(tmp_path: Path) -> None:
    rows = load_examples(written(tmp_path, *({"prompt": f"{i}+1=", "answer": f"{i + 1}"} for i in range(4))), "math")
    assert [trained_on(rows[:2])(row) for row in rows] == [True, True, False, False]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}, "not text"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}], "score": "?"},
            "none of",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],
                "score": "exact_values",
                "reference": {"value": 1},
            },
            "'format'",
        ),
        *(
            (
                {
                    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],
                    "score": score,
                    "reference": reference,
                },
                words,
            )
            for score, reference, words in (
                ("exact_values", {"format": "json"}, "'format'"),
                ("exact_values", [1], "'format'"),
                ("exact_values", "{not JSON", "'format'"),
                ("tests_passed", 3, "assertions"),
                ("tests_passed", None, "assertions"),
                ("tests_passed", [], "assertions"),
            )
        ),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused_on_loading(tmp_path: Path, row: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_examples(written(tmp_path, row), "math")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_examples(DataSource(path=str(path)), "math")


def test_the_column_of_references_counts_for_conversations_too(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}], "tests": "assert a"}
    source = written(tmp_path, row).model_copy(update={"reference": "tests", "score": "tests_passed"})
    assert load_examples(source, "coding")[0].reference == "assert a"


def test_what_chooses_does_not_judge_where_there_are_other_rows(tmp_path: Path) -> None:
    numbers = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
    source = written(tmp_path, *numbers)
    domain = Domain(train=source, held_out=source)
    recipe = load_recipe(CONFIGS / "demo.yaml", ["evaluation.rows=4"])
    recipe = recipe.model_copy(update={"domains": {**recipe.domains, "math": domain}})
    judged = {row.question for row in load_examples(source, "math", 4, recipe.evaluation.seed)}
    assert not judged & {row.question for row in choosing_rows(recipe, "math", 2, 1)}
    found = [row.question for row in choosing_rows(recipe, "math", 5, 1)]
    assert len(found) == 5 and not judged & set(found[:2]) and set(found[2:]) < judged


@pytest.mark.parametrize("name", ["coding", "general"])
def test_the_demos_choosing_rows_are_not_judged(name: str) -> None:
    recipe = load_recipe(CONFIGS / "demo.yaml")
    judged = trained_on(load_examples(recipe.domains[name].held_out, name, recipe.evaluation.rows))
    assert not any(map(judged, choosing_rows(recipe, name, 40, 1)))


def test_a_prompt_is_trained_on_whatever_its_capitals_and_spaces() -> None:
    seen = trained_on([chat("What is  this?", "x", "general")])
    assert seen(chat("what is THIS?\n", "y", "general")) and not seen(chat("What is this", "x", "general"))
