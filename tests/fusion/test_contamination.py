"""A held-out question that was trained on is found, whatever stands around it; a task's wording is no such thing."""

import json
from pathlib import Path

import pytest

from fusion.contamination import WORD, shared_runs
from fusion.errors import UserError
from fusion.evaluation.evaluate import held_out_rows
from fusion.recipe import Recipe
from tests.recipes import recipe_data

PLANTED = "A farmer sells seven dozen brown eggs to a baker who lives beside the old stone bridge."
OTHER = [f"Question {i}: how many boxes does shop number {i} sell on day {i * 7} of the year?" for i in range(40)]


def test_a_planted_overlap_is_found() -> None:
    trained = [*OTHER, f"Please think. {PLANTED.upper()}  How many are left?"]
    assert shared_runs(trained, ["What is the sky?", f"{PLANTED} What does she earn?"], 13) == {
        1: "a farmer sells seven dozen brown eggs to a baker who lives beside"
    }
    assert shared_runs(trained, [PLANTED], 8)
    assert shared_runs(OTHER, [PLANTED], 8) == {}


def test_a_text_with_fewer_words_than_a_run_is_looked_for_as_a_whole() -> None:
    short = " ".join(PLANTED.split()[:12])
    assert shared_runs([PLANTED], [short], 13) == shared_runs([PLANTED], [short], 12) == {0: short.lower()}
    assert shared_runs([PLANTED], [f"{short} else"], 14) == {}
    assert shared_runs([PLANTED], [" ".join(PLANTED.split()[:4])], 13) == {}


def test_copies_of_a_row_are_one() -> None:
    assert shared_runs([*OTHER, *[PLANTED] * 30], [PLANTED], 13)


def test_marks_belong_to_their_letters() -> None:
    assert WORD.findall("हिन्दी में") == ["हिन्दी", "में"]


def test_the_wording_of_a_task_is_none() -> None:
    wording = "Answer the following question about the town with one number and write nothing else at all: {}"
    trained = [wording.format(f"town {i}") for i in range(30)]
    held_out = [wording.format(f"village {i}") for i in range(30)]
    assert shared_runs(trained, held_out, 13) == {}
    held_out[7] = wording.format(PLANTED)
    assert list(shared_runs([*trained, PLANTED], held_out, 13)) == [7]


def test_a_question_that_many_rows_teach_is_no_wording() -> None:
    trained = [f"{PLANTED} How many are left? Answer {i}" for i in range(30)]
    assert list(shared_runs([*OTHER, *trained], [OTHER[0][:30], PLANTED], 13)) == [1]
    short = " ".join(PLANTED.split()[:7])
    assert list(shared_runs(trained, [short], 13)) == [0]


def test_numbers_alone_are_none() -> None:
    numbers = " ".join(map(str, range(40)))
    assert shared_runs([f"sort {numbers}"], [f"add {numbers}"], 13) == {}


def test_chinese_has_no_spaces() -> None:
    text = "小明有二十三个苹果他给了小红七个又买了十一个现在一共有多少个"
    assert list(shared_runs(["问题：" + text], [text + "？"], 13)) == [0]


def rows(path: Path, questions: list[str]) -> dict[str, str]:
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "7"}]} for q in questions]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return {"path": str(path)}


@pytest.fixture
def recipe(tmp_path: Path, anchor: Path) -> Recipe:
    """One of math's forty held-out questions holds one that was trained on."""
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    data["domains"]["math"] = {
        "train": rows(tmp_path / "train.jsonl", [*OTHER[:20], PLANTED]),
        "held_out": rows(tmp_path / "held_out.jsonl", [f"{PLANTED} Think.", *OTHER[20:]]),
    }
    data["gate_training"]["rows"] = 100
    data["evaluation"] = {"contamination_ngram": 13}
    return Recipe.model_validate(data)


def test_a_run_refuses_contaminated_rows(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"13 words in a row with 1 of 21 held-out rows of 'math' \(\"a farmer sells"):
        held_out_rows(recipe, ["math"])


def test_a_run_leaves_them_out_where_the_recipe_says_so(recipe: Recipe) -> None:
    settings = recipe.evaluation.model_copy(update={"contaminated": "leave_out"})
    kept = held_out_rows(recipe.model_copy(update={"evaluation": settings}), ["math"])["math"]
    assert len(kept) == 20 and not any("farmer" in row.question for row in kept)


def test_without_an_n_gram_equal_prompts_alone_count(recipe: Recipe) -> None:
    settings = recipe.evaluation.model_copy(update={"contamination_ngram": None})
    assert len(held_out_rows(recipe.model_copy(update={"evaluation": settings}), ["math"])["math"]) == 21
