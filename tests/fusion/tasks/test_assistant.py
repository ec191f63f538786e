"""The generated assistant tasks: their answers are right by their own scores, and the splits share nothing."""

import random

import pytest

from fusion.data import ChatExample
from fusion.evaluation.scores import SCORES, score
from fusion.tasks.assistant import GENERATORS
from fusion.tasks.assistant_code import FUNCTIONS
from fusion.tasks.assistant_texts import PAIRS

TASKS = ("general", "coding", "math", "multilingual")


def rows(task: str, split: str, count: int, seed: int = 0) -> list[ChatExample]:
    rng = random.Random(seed)
    return [GENERATORS[task](rng, split) for _ in range(count)]


def test_there_is_variety() -> None:
    assert set(GENERATORS) == set(TASKS)
    assert len(FUNCTIONS) >= 25
    assert len(PAIRS) >= 60


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_reproducible_and_well_formed(task: str) -> None:
    assert rows(task, "train", 20, seed=3) == rows(task, "train", 20, seed=3)
    for row in rows(task, "train", 200) + rows(task, "held_out", 200):
        assert [m["role"] for m in row.messages] == ["user", "assistant"]
        assert row.domain == task
        assert not any(blank in row.question + row.answer for blank in ("{f}", "{n}", "{g}", "{t}", "{s}"))


@pytest.mark.parametrize("task", TASKS)
def test_both_languages_and_many_rows(task: str) -> None:
    questions = {row.question for row in rows(task, "train", 400)}
    chinese = {q for q in questions if any("\u4e00" <= c <= "\u9fff" for c in q)}
    assert len(questions) > 100
    assert 0.2 < len(chinese) / len(questions) < 0.8
    assert len({row.question for row in rows(task, "held_out", 400)}) >= 20


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_question(task: str) -> None:
    train = {row.question for row in rows(task, "train", 3000)}
    assert not train & {row.question for row in rows(task, "held_out", 1000)}


def test_splits_share_no_function_name() -> None:
    names = {
        split: {str(row.reference[0]).split("(")[0] for row in rows("coding", split, 1500)}
        for split in ("train", "held_out")
    }
    assert len(names["held_out"]) >= 10
    assert not names["train"] & names["held_out"]


@pytest.mark.parametrize("split", ("train", "held_out"))
def test_sampled_solutions_pass_their_tests(split: str) -> None:
    for row in rows("coding", split, 50):
        assert SCORES["tests_passed"](row.answer, row) == 1.0, row.answer


def test_every_solution_passes_its_tests() -> None:
    for function in FUNCTIONS:
        scope: dict[str, object] = {}
        exec("\n".join((function.code, *function.tests)).replace("{f}", "solution"), scope)


@pytest.mark.parametrize("split", ("train", "held_out"))
def test_math_answers_end_with_the_number(split: str) -> None:
    for row in rows("math", split, 500):
        assert row.score == "number"
        assert score(row.answer, row) == 1.0, row.answer


@pytest.mark.parametrize("split", ("train", "held_out"))
def test_math_steps_are_right(split: str) -> None:
    for row in rows("math", split, 500):
        for line in row.answer.replace("×", "*").replace("÷", "/").splitlines():
            left, equals, right = line.rpartition(" = ")
            sides = [_arithmetic(left), right.split()[0] if right else ""]
            value = sides[1].rstrip("。.,（元").split("（")[0]
            if equals and sides[0] and value.isdigit() and "%" not in line:
                assert eval(sides[0]) == int(value), line


def _arithmetic(text: str) -> str:
    """The longest end of `text` that is digits and operators only, e.g. `3 * 4` of `The books cost 3 * 4`."""
    start = len(text)
    while start and text[start - 1] in "0123456789 +-*/()":
        start -= 1
    expression = text[start:].strip()
    return expression if expression[:1].isdigit() and expression[-1:].isdigit() else ""


def test_wrong_code_fails() -> None:
    row = rows("coding", "train", 1)[0]
    assert SCORES["tests_passed"]("```python\npass\n```", row) == 0.0


@pytest.mark.parametrize("task", ("general", "multilingual"))
def test_answers_score_one_by_chrf(task: str) -> None:
    for row in rows(task, "held_out", 50):
        assert score(row.answer, row) == pytest.approx(1.0)
