"""Benchmarks: each task file against upstream's own, and its scoring on a right and a wrong answer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml

from fusion.data import ChatExample, chat
from fusion.errors import UserError
from fusion.evaluation import harness
from fusion.evaluation.benchmark_data import write_split
from fusion.evaluation.harness import (
    TaskFile,
    known_groups,
    known_tasks,
    load_tasks,
    question_of,
    rows_of,
    task_files,
)
from fusion.evaluation.harness_metrics import (
    CodeEval,
    example_of,
    german_comments,
    is_valid,
    pass_at_k,
    row_of,
    structured_score,
    unpacked,
)
from fusion.recipe import Recipe
from tests.recipes import make_recipe, recipe_data

OURS = {"task", "dataset_path", "dataset_name", "dataset_kwargs", "metadata", "custom_dataset"}
OURS |= {"training_split", "validation_split"}


def write_copy(data: Path, given: dict[str, Any], word: str, text: str) -> None:
    """A local copy of a benchmark, every file of it `text`, where the task file `given` looks for that of `word`."""
    for split, name in given["prepare"].items():
        if split != "as":
            path = data / name.replace("${each}", word)
            path = path / "one.json" if given["prepare"]["as"] == "schemas" else path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def prepared(tmp_path: Path, group: str) -> tuple[Recipe, list[TaskFile]]:
    """A recipe with local copies of the benchmark (no more than a row), and its task files."""
    given = yaml.load((harness.CONFIGS / f"{group}.yaml").read_text(), Loader=harness._Plain)
    rows: dict[str, Any] = {
        "json_lines": {
            "question": "1+1?",
            "answer": "#### 2",
            "prompt": "def f():\n",
            "test": "",
            "entry_point": "f",
            "problem": "Find x.",
            "solution": r"$\boxed{1}$",
        },
        "ifeval": {"key": 1, "prompt": "p", "instruction_id_list": ["en:punctuation:no_comma"], "kwargs": [{}]},
        "mbpp": {"task_id": 11, "text": "Add.", "test_list": ["assert True"] * 3, "code": "pass"},
    }
    texts = {
        "mgsm": "Wie viel?\t1,000\n",
        "xquad": json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": []}] * 201}]}),
        "bbh": json.dumps({"examples": [{"input": "not True is", "target": "False"}]}),
        "mmlu": '"Which, if any?",a,b,c,d,C\n',
        "csv": "id,question,A,B,C,D,answer\n0,哪个？,甲,乙,丙,丁,B\n",
        "schemas": '{"type": "object"}',
    }
    data = tmp_path / "data"
    form = given["prepare"]["as"]
    for word in given.get("each", [""]):
        write_copy(data, given, word, texts.get(form) or json.dumps(rows[form]))
    recipe = Recipe.model_validate(recipe_data(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path}))
    recipe = recipe.model_copy(update={"data_folder": str(data)})
    return recipe, task_files(recipe, [group], tmp_path / "tasks")


UPSTREAM = {
    "bbh": "bbh/zeroshot",
    "mgsm": "mgsm/native_cot",
    "mmlu": "mmlu/default",
    "hendrycks_math500": "hendrycks_math",
}
INCLUDING = [name for name in known_tasks() if "include:" in (harness.CONFIGS / f"{name}.yaml").read_text()]


@pytest.mark.parametrize("group", INCLUDING)
def test_task_files_are_upstreams_tasks_with_other_data(
    tmp_path: Path, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setattr(harness, "_nltk_has", lambda resource: True)
    _, tasks = prepared(tmp_path, group)
    upstream_of = {
        load_yaml(path, resolve_func=False)["task"]: path
        for path in Path(harness._tasks()).joinpath(UPSTREAM.get(group, group)).glob("*.yaml")
        if isinstance(yaml.load(path.read_text(), Loader=harness._Plain).get("task"), str)
    }
    assert tasks
    for task in tasks:
        assert task.file is not None
        ours = load_yaml(task.file, resolve_func=False)
        theirs = load_yaml(upstream_of[ours["metadata"]["upstream"]], resolve_func=False)
        said = OURS | ({"filter_list"} if group == "mbpp" else set())  # upstream's loses code (its file says how)
        assert {k: v for k, v in ours.items() if k not in said} == {k: v for k, v in theirs.items() if k not in said}
        for path in ours["dataset_kwargs"]["data_files"].values():
            assert Path(path).is_file()


@pytest.mark.parametrize(
    ("group", "asked"),
    [
        ("humaneval", "Write a solution to the following problem"),
        ("mbpp", "assert True"),
        ("mgsm", "Wie viel?"),
        ("hendrycks_math500", "Find x."),
    ],
)
def test_a_router_sees_what_a_model_is_asked(tmp_path: Path, group: str, asked: str) -> None:
    """Not a column of the row: the instruction, the tests and the choices say what kind of question it is."""
    _, tasks = prepared(tmp_path, group)
    loaded = load_tasks(tasks[:1])
    [task] = loaded.objects.values()
    assert asked in question_of(task, task.eval_docs[0])


def test_of_a_conversation_a_router_sees_the_last_question() -> None:
    turns = [{"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "1?"), ("assistant", "1"))]
    packed = row_of(chat("2?", "2", "math"))["prompt"]
    example = ChatExample(messages=(*turns, *chat("2?", "2", "math").messages), domain="math")
    whole = row_of(example)["prompt"]
    assert whole != packed
    assert [question_of(SimpleNamespace(doc_to_text=str), doc) for doc in (packed, whole)] == ["2?", "2?"]


def test_a_domains_group_is_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_nltk_has", lambda resource: True)
    recipe = make_recipe(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path})
    for name, tasks in known_groups().items():
        assert set(tasks) & set(known_tasks()), name
        if name not in ("structured", "mixed"):  # which read rows of ours
            found = task_files(recipe, [name], tmp_path / "tasks")
            assert {task.group for task in found} == set(tasks) and all(task.optional for task in found)
    [task] = task_files(recipe, ["arc_easy"], tmp_path / "tasks")
    assert (task.name, task.domain, task.score, task.optional) == ("arc_easy", "general", None, False)


def test_without_a_copy_the_hubs_task_is_taken(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path})
    [task] = task_files(recipe.model_copy(update={"data_folder": str(tmp_path)}), ["gsm8k"], tmp_path / "tasks")
    assert (task.name, task.group, task.domain, task.file) == ("gsm8k_cot_zeroshot", "gsm8k", "math", None)


def test_benchmarks_without_nltk_data_are_left_out_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "_nltk_has", lambda resource: False)
    assert prepared(tmp_path, "ifeval")[1] == []
    assert "ifeval left out: nltk's tokenizers/punkt_tab is not here" in capsys.readouterr().err


def test_mgsms_numbers_are_read(tmp_path: Path) -> None:
    (tmp_path / "mgsm_de.tsv").write_text('Sie sagt "ja". Wie viel?\t1,234\nWie viel?\t-2.5\n', encoding="utf-8")
    write_split("mgsm", tmp_path / "mgsm_de.tsv", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["answer_number"] for row in rows] == [1234, -2.5]
    assert rows[0]["question"] == 'Sie sagt "ja". Wie viel?'
    (tmp_path / "mgsm_de.tsv").write_text("Wie viel?\tviel\n")
    with pytest.raises(UserError, match="not the benchmark's own file"):
        write_split("mgsm", tmp_path / "mgsm_de.tsv", tmp_path / "out.jsonl")


def test_programs_are_judged_in_the_sandbox(tmp_path: Path) -> None:
    left = tmp_path / "left behind"
    programs = ["def f(x):\n    return x + 1", f"open({str(left)!r}, 'w')\ndef f(x):\n    return x + 1", "exit(0)"]
    found, _ = CodeEval().compute(references=["assert f(1) == 2"] * 3, predictions=[[p] for p in programs], k=[1])
    assert found == {"pass@1": pytest.approx(1 / 3)}
    assert not left.exists()


def test_upstreams_code_metric_is_the_sandboxed_one(tmp_path: Path) -> None:
    _, [task] = prepared(tmp_path, "humaneval")
    loaded = load_tasks([task]).objects[task.name]
    doc = {"prompt": "def f(x):\n", "test": "def check(g):\n    assert g(1) == 2", "entry_point": "f"}
    for body, right in (("    return x + 1\n", 1.0), ("    return x\n", 0.0)):
        assert loaded.process_results(doc, [[doc["prompt"] + body]])["pass@1"] == right


PARAGRAPH = {
    "context": "Sie wohnt in Bern.",
    "qas": [{"id": "1", "question": "Wo?", "answers": [{"text": "in Bern", "answer_start": 10}]}],
}
ROWS_OF: dict[
    str, tuple[dict[str, Any], Any, Any]
] = {  # a row of the benchmark's own file, a right answer, a wrong one
    "gsm8k": ({"question": "1+1?", "answer": "1+1=2\n#### 2"}, "So it is 2.", "So it is 3."),
    "mbpp": (
        {"task_id": 11, "text": "Add one.", "test_list": ["assert f(1) == 2"] * 3, "code": "", "test_setup_code": ""},
        "def f(x):\n    return x + 1\n```\nThat is all.",
        "def f(x):\n    return x\n```",
    ),
    "humaneval": (
        {"prompt": "def f(x):\n", "test": "def check(g):\n    assert g(1) == 2", "entry_point": "f"},
        "    return x + 1\n```",
        "    return x\n```",
    ),
    "ifeval": (
        {"key": 1, "prompt": "No commas.", "instruction_id_list": ["en:punctuation:no_comma"], "kwargs": [{}]},
        "None here",
        "One, here",
    ),
    "mgsm": ("Wie viel?\t1,200\n", "Also 1200.", "Also 12."),
    "bbh": ({"examples": [{"input": "not True is", "target": "False"}]}, "So the answer is False.", "So it is True."),
    "xquad": (
        {"data": [{"paragraphs": [PARAGRAPH] * 201}]},
        "in Bern",
        "Genf",
    ),
    "hendrycks_math500": (
        {"problem": "Half of one?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}"},
        r"That is $\frac12$.",
        r"That is $\frac13$.",
    ),
    "jsonschema_bench": ({"type": "object", "required": ["a"]}, '{"a": 1}', '{"b": 1}'),
}
BY_LIKELIHOOD: dict[str, tuple[Any, int]] = {  # a row of the benchmark's own file, which of its answers is right
    "mmlu": ('"Which, if any?",a,b,c,d,C\n', 2),
    "ceval": ("id,question,A,B,C,D,answer\n0,哪个？,甲,乙,丙,丁,B\n", 1),
    "xcopa": (
        {"premise": "Ta sai kutse.", "choice1": "Ta tuli.", "choice2": "Ta sõi.", "question": "effect", "label": 0},
        0,
    ),
}


@pytest.mark.parametrize("group", ROWS_OF)
def test_a_right_answer_scores_and_a_wrong_one_does_not(
    tmp_path: Path, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's own scoring of the file as it is given: the harness loads it, filters an answer, judges it."""
    if group == "ifeval":
        monkeypatch.setattr("nltk.data.find", lambda resource: True)  # the one instruction needs no sentences
    row, right, wrong = ROWS_OF[group]
    task, object_ = _local_task(tmp_path, group, row)
    for answer, score in ((right, 1.0), (wrong, 0.0)):
        assert _scored(object_, task, [answer]) == score


@pytest.mark.parametrize("group", BY_LIKELIHOOD)
def test_the_likelier_answer_counts(tmp_path: Path, group: str) -> None:
    row, right = BY_LIKELIHOOD[group]
    task, object_ = _local_task(tmp_path, group, row)
    count = 2 if group == "xcopa" else 4
    for picked in range(count):
        likelihoods = [(-1.0 if choice == picked else -2.0, False) for choice in range(count)]
        assert _scored(object_, task, likelihoods) == float(picked == right)


def _local_task(tmp_path: Path, group: str, row: Any) -> tuple[TaskFile, Any]:
    """A task of a group (the first of several) on a local copy with one row, and the harness's own object for it."""
    given = yaml.load((harness.CONFIGS / f"{group}.yaml").read_text(), Loader=harness._Plain)
    text = row if isinstance(row, str) else json.dumps(row)
    write_copy(tmp_path / "data", given, given.get("each", [""])[0], text)
    recipe = Recipe.model_validate(recipe_data(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path}))
    recipe = recipe.model_copy(update={"data_folder": str(tmp_path / "data")})
    [task] = [task for task in task_files(recipe, [group], tmp_path / "tasks") if task.file]
    loaded = load_tasks([task])
    assert rows_of(loaded, {}, None) == {task.name: [0]}
    return task, loaded.objects[task.name]


def _scored(object_: Any, task: TaskFile, answers: list[Any]) -> float:
    object_.build_all_requests(limit=1, rank=0, world_size=1)
    for instance, answer in zip(object_.instances, answers, strict=True):
        instance.resps = [answer]
    object_.apply_filters()
    name = task.filter or list(object_.instances[0].filtered_resps)[-1]
    found = object_.process_results(object_.instances[0].doc, [i.filtered_resps[name] for i in object_.instances])
    return harness._number(found[task.score])


def test_a_task_with_an_executor_of_its_own_is_refused() -> None:
    class Unsafe:
        UNSAFE_CODE = True
        _metric_fn_list: ClassVar = {"pass": print}

    with pytest.raises(UserError, match="an executor of its own"):
        harness._refuse_unsafe("other", Unsafe())


def test_rows_that_were_trained_on_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Task:
        eval_docs: ClassVar = [{"q": str(i)} for i in range(9)]

        def doc_to_text(self, doc: dict[str, str]) -> str:
            return doc["q"]

    owner = TaskFile("t", "t", "math")
    loaded = harness.Loaded(None, {"t": Task()}, {"t": owner})
    assert rows_of(loaded, {}, None, lambda name, questions: [0, 3]) == {"t": [1, 2, 4, 5, 6, 7, 8]}
    drawn = rows_of(loaded, {"t": 3}, None, lambda name, questions: [0, 3])["t"]
    assert len(drawn) == 3 and not {0, 3} & set(drawn)
    assert rows_of(loaded, {}, 2, lambda name, questions: range(9)) == {}
    assert "t left out" in capsys.readouterr().err


def test_pass_at_k_is_the_share_of_draws_with_one_that_is_right() -> None:
    from itertools import combinations

    for samples, right, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (6, 3, 4)):
        draws = list(combinations([i < right for i in range(samples)], k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_a_row_travels_through_the_harness_unchanged() -> None:
    row = chat(
        "你好?",
        "[1]",
        "structured",
        system="Be brief.",
        score="exact_values",
        reference={"format": "json", "value": [1]},
    )
    doc = row_of(row)
    assert example_of(doc) == row
    assert unpacked([{"role": "user", "content": doc["prompt"]}]) == row.prompt
    plain = chat("q", "a", "general")
    assert row_of(plain)["prompt"] == "q" and unpacked(plain.prompt) == plain.prompt
    assert structured_score(doc, ["```json\n[1]\n```"]) == {"score": 1.0, "valid": 1.0}
    assert structured_score(doc, ["[2]"]) == {"score": 0.0, "valid": 1.0}
    assert structured_score(doc, ["[2"]) == {"score": 0.0, "valid": 0.0}


@pytest.mark.parametrize(
    ("form", "answer", "valid"),
    [("yaml", "a: 1", True), ("yaml", "a: [1", False), ("xml", "<a>1</a>", True), ("xml", "<a>1</b>", False)],
)
def test_validity_is_that_of_the_rows_own_format(form: str, answer: str, valid: bool) -> None:
    row = chat("", "", "structured", score="exact_values", reference={"format": form, "value": {"a": 1}})
    assert is_valid(answer, row) is valid


@pytest.mark.parametrize(
    ("code", "passed", "german"),
    [
        ("def f():\n    # Wir geben die Zahl eins zurück\n    return 1", 1.0, 1.0),
        ("def f():\n    # We give back the number one\n    return 1", 1.0, 0.0),
        ("def f():\n    return 1", 1.0, 0.0),
        ("def f():\n    # Wir geben die Zahl zwei zurück\n    return 2", 0.0, 1.0),
    ],
)
def test_comments_have_their_language_and_code_its_tests(code: str, passed: float, german: float) -> None:
    doc = row_of(chat("", "", "coding", score="tests_passed", reference=["assert f() == 1"]))
    found = german_comments(doc, [f"```python\n{code}\n```"])
    assert found == {"score": passed * german, "passed": passed, "german": german}
