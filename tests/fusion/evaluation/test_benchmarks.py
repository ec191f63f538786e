"""Benchmarks: the harness's figures against the same figures computed here, and what they are put beside."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fusion.checkpoint import write_lines
from fusion.cli import app
from fusion.errors import UserError
from fusion.evaluation import harness
from fusion.evaluation.benchmark_table import draw, markdown
from fusion.evaluation.benchmarks import benchmark, models, picked_experts, routed_scores, summary
from fusion.evaluation.dense import folder_of
from fusion.evaluation.harness import Measured, TaskFile
from fusion.evaluation.intervals import retained_share
from fusion.merge import merge
from fusion.recipe import Recipe
from serving.ask import engine_settings
from tests.families import write_model
from tests.recipes import make_recipe, recipe_data
from tests.serving.apart import serve_apart

TOKENS = 24
PRINTABLE = 94  # the byte tokenizer's first ids: ! to ~


def greedy(folder: Path, prompts: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers of a model, one at a time, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.fixture
def short_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task files with answers of TOKENS tokens."""
    configs = tmp_path / "benchmarks"
    configs.mkdir()
    text = (harness.CONFIGS / "domains.yaml").read_text(encoding="utf-8")
    (configs / "domains.yaml").write_text(text.replace("max_gen_toks: 256", f"max_gen_toks: {TOKENS}"))
    monkeypatch.setattr(harness, "CONFIGS", configs)


PROMPTS: dict[str, list[list[dict[str, str]]]] = {
    "general": [[{"role": "user", "content": f"Who is number {i}?"}] for i in range(4)],
    "math": [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2="}],
        [{"role": "user", "content": "30*4="}],
        [{"role": "user", "content": "5"}, {"role": "assistant", "content": "6"}, {"role": "user", "content": "7"}],
        [{"role": "user", "content": "100-7="}],
    ],
}


def with_answers(folder: Path, recipe: Recipe, fused: Path, anchor: Path) -> Recipe:
    """The recipe with held-out rows: right are the fused model's answers to the first two of each, the anchor's to the
    third (unless both answer alike), nobody's to the last."""
    data = recipe.model_dump(mode="json")
    for name, prompts in PROMPTS.items():
        ours, theirs = greedy(fused, prompts), greedy(anchor, prompts)
        answers = [ours[0], ours[1], theirs[2], "nobody says this"]
        rows = [{"messages": [*p, {"role": "assistant", "content": a}]} for p, a in zip(prompts, answers, strict=True)]
        path = folder / f"{name}-held-out.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        data["domains"][name]["held_out"] = {"path": str(path)}
    return Recipe.model_validate(data)


@pytest.mark.usefixtures("short_answers")
def test_scores_are_those_of_greedy_answers(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> None:
    experts = {"general": anchor, "math": anchored_experts["math"]}
    recipe = make_recipe(tmp_path, anchor, experts, benchmark={"backend": "transformers"})
    fused = merge(recipe)
    recipe = with_answers(tmp_path, recipe, fused, anchor)
    result = benchmark(recipe)
    models = {"fused": fused, "anchor": anchor, "own_expert": experts["math"]}
    goldens: dict[str, list[float]] = {}
    for name, own in (("general", anchor), ("math", experts["math"])):
        row, path = result["tasks"][name], tmp_path / f"{name}-held-out.jsonl"
        wanted = [json.loads(line)["messages"][-1]["content"] for line in path.read_text().splitlines()]
        for column, folder in (models | {"own_expert": own}).items():
            answers = greedy(folder, PROMPTS[name])
            golden = sum(a.strip() == w.strip() for a, w in zip(answers, wanted, strict=True)) / len(wanted)
            assert row["scores"][column]["value"] == golden, (name, column)
            goldens.setdefault(column, []).append(golden)
        assert row["scores"]["fused"]["value"] >= 0.5 and row["rows"] == 4
    assert len(set(map(tuple, goldens.values()))) == 3  # a model in another's place would be seen
    assert result["made"]["versions"].keys() >= {"lm-eval", "qwen-fusion"} and result["seed"] == 0
    logged = (recipe.folder / "benchmark" / "samples" / "fused" / "own_math.jsonl").read_text().split("\n")
    assert [json.loads(line)["doc_id"] for line in logged if line] == [0, 1, 2, 3]
    assert (recipe.folder / "benchmark" / "benchmark.png").stat().st_size > 1000
    assert "| math (score, 4) |" in (recipe.folder / "benchmark" / "benchmark.md").read_text()


@pytest.mark.usefixtures("short_answers")
def test_vllm_and_a_running_server_score_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, in float32: an engine of the benchmark's own, and a server behind the guard."""
    anchor = write_model(tmp_path / "anchor", seed=1)
    weights = anchor / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][PRINTABLE:] = 0  # no broken UTF-8, which detokenizers read differently
    save_file(tensors, weights, {"format": "pt"})
    experts = {"general": anchor, "math": write_model(tmp_path / "math", seed=2, anchor=anchor)}
    serving = {"dtype": "float32", "max_model_len": 256, "cpu_kv_cache_bytes": 64 << 20}
    settings = {"backend": "transformers", "against": []}
    recipe = make_recipe(tmp_path, anchor, experts, benchmark=settings, serving=serving)
    recipe = with_answers(tmp_path, recipe, merge(recipe), anchor)
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))

    def told(*options: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["benchmark", str(path), *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads((recipe.folder / "benchmark" / "benchmark.json").read_text())
        return found

    wanted = told()
    assert wanted["tasks"]["math"]["scores"]["fused"]["value"] >= 0.5
    by_vllm = told("--backend", "vllm")
    assert (by_vllm["through"], by_vllm["tasks"]) == ("vllm", wanted["tasks"])
    with monkeypatch.context() as patched:  # every answer is kept: no engine is started
        patched.setattr("serving.engine.Engine", None)
        assert told("--backend", "vllm")["tasks"] == wanted["tasks"]
    folder = tmp_path / "served"
    folder.mkdir()
    process, url = serve_apart(engine_settings(recipe), folder, within_s=400)
    try:
        by_server = told("--url", url)
        with pytest.raises(UserError, match=f"the server at {url} has {recipe.name}, not 'other'"):
            told("--url", url, "--set", "name=other")
    finally:
        process.terminate()
        process.communicate(timeout=40)
    assert (by_server["through"], by_server["tasks"]) == (url, wanted["tasks"])


@pytest.mark.usefixtures("short_answers")
def test_a_run_that_was_stopped_asks_for_the_rest_alone(
    tmp_path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    data["benchmark"] = {"backend": "transformers", "against": []}
    for name, domain in data["domains"].items():
        data["domains"][name] = domain | {"train": {"generated": f"demo.{name}"}}
    recipe = Recipe.model_validate(data)
    merge(recipe)
    first = benchmark(recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update={"limit": 2})}))
    from lm_eval.models.huggingface import HFLM

    asked: list[int] = []
    real = HFLM.generate_until

    def counted(self: Any, requests: list[Any], **kwargs: Any) -> Any:
        asked.append(len(requests))
        return real(self, requests, **kwargs)

    monkeypatch.setattr(HFLM, "generate_until", counted)
    second = benchmark(recipe)
    assert first["tasks"]["math"]["rows"] == 2 and second["tasks"]["math"]["rows"] == 4
    assert sum(asked) == 4  # of eight
    assert benchmark(recipe) == second and sum(asked) == 4


def test_questions_that_were_trained_on_are_not_asked(
    tmp_path: Path, anchor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    data["benchmark"] = {"backend": "transformers", "against": [], "tasks": ["gsm8k"]}
    data["evaluation"] = {"contamination_ngram": 13, "contaminated": "leave_out"}
    data["data_folder"] = str(tmp_path)
    planted = "what is the sum of one and two and three and four, in words?"
    questions = ["How many legs have two cats?", f"Let us see, {planted}", "Half of ten?"]
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = [{"question": question, "answer": "#### 8"} for question in questions]
        write_lines(tmp_path / "gsm8k" / f"{split}.jsonl", rows)
    messages = [{"role": "user", "content": f"Now tell me: {planted}"}, {"role": "assistant", "content": "ten"}]
    write_lines(tmp_path / "lessons.jsonl", [{"messages": messages}])
    data["domains"]["math"]["train"] = {"path": str(tmp_path / "lessons.jsonl")}
    recipe = Recipe.model_validate(data)
    merge(recipe)
    result = benchmark(recipe)
    assert result["tasks"]["gsm8k"]["rows"] == 2 and result["rows_trained_on"] == {"local_gsm8k": 1}
    assert "1 of 3 rows of local_gsm8k left out" in capsys.readouterr().err
    asked = "".join(path.read_text("utf-8") for path in (recipe.folder / "benchmark" / "samples" / "fused").iterdir())
    assert questions[0] in asked and planted not in asked


ROWS = tuple(range(6))
TASK = TaskFile("gsm", "gsm", "math", "exact_match")
QUESTIONS = ("1+1=", "who?", "2+2=", "3+3=", "where?", "4+4=")


def test_a_task_for_several_experts_is_compared_with_the_best_and_with_a_router(tmp_path: Path) -> None:
    data = recipe_data(tmp_path, tmp_path, {"math": tmp_path, "general": tmp_path})
    data["domains"]["math"]["rules"] = [{"pattern": r"\d"}]
    data["domains"]["general"]["rules"] = [{"words": ["who", "where"]}]
    recipe = Recipe.model_validate(data)
    task = TaskFile("mixed", "mixed", "math", "score", None, tmp_path, mixed=True)
    asked = SimpleNamespace(eval_docs=QUESTIONS, doc_to_text=lambda question: question)
    loaded = harness.Loaded(None, {"mixed": asked}, {"mixed": task})
    picked = picked_experts(recipe, loaded, {"mixed": list(ROWS)})
    assert list(picked["mixed"].values()) == ["math", "general", "math", "math", "general", "math"]
    scores = {"anchor": [0, 1, 0, 0, 1, 0], "math": [1, 0, 1, 0, 0, 1], "fused": [1, 1, 1, 0, 0, 1]}
    measured = {
        model: {"mixed": Measured(task, "score", ROWS, tuple(map(float, row)), {}, [])}
        for model, row in {**scores, "general": scores["anchor"]}.items()
    }
    experts = {"math": "math", "general": "general"}
    measured["router"] = routed_scores(measured, {model: {} for model in measured}, picked, experts)
    row = summary(recipe, [task], measured, experts)["tasks"]["mixed"]
    assert {name: score["value"] for name, score in row["experts"].items()} == {"math": 3 / 6, "general": 2 / 6}
    assert row["best_expert"] == "math" and row["scores"]["router"]["value"] == 5 / 6
    assert row["fused_minus_best"]["value"] == pytest.approx(1 / 6)
    assert row["fused_minus"]["router"]["value"] == pytest.approx(-1 / 6)
    assert "less the router: -0.167" in markdown(summary(recipe, [task], measured, experts))
    assert "experts" not in summary(recipe, [task], measured, {"math": "math"})["tasks"]["mixed"]  # not all were asked


def test_for_a_router_every_expert_is_asked(tmp_path: Path, anchor: Path) -> None:
    data = recipe_data(tmp_path, anchor, {"math": anchor, "general": anchor})
    recipe = Recipe.model_validate({**data, "benchmark": {"against": ["router"]}})
    assert set(models(recipe, [TASK])) == {"fused", "math", "general"}


def test_a_router_is_scored_by_what_the_picked_experts_answer() -> None:
    def answers(rows: tuple[int, ...], scores: tuple[float, ...]) -> dict[str, Measured]:
        return {"gsm": Measured(TASK, "exact_match", rows, scores, {"valid": tuple(-s for s in scores)}, [])}

    scores = {"fused": answers((1, 4, 7), (0.0, 0.0, 0.0)), "math": answers((1, 4, 7), (0.1, 0.4, 0.7)), "coding": {}}
    strays = {"fused": {}, "math": {}, "coding": answers((4,), (0.9,))}
    picked = {"gsm": {1: "math", 4: "coding", 7: "math"}}
    found = routed_scores(scores, strays, picked, {"math": "math", "coding": "coding"})["gsm"]
    assert found.scores == (0.1, 0.9, 0.7) and found.rows == (1, 4, 7)
    assert found.others == {"valid": (-0.1, -0.9, -0.7)}


def test_dense_models_are_asked_beside_the_others(tmp_path: Path, anchor: Path) -> None:
    data = recipe_data(tmp_path, anchor, {"math": anchor, "general": anchor})
    recipe = Recipe.model_validate({**data, "benchmark": {"against": ["anchor", "TIES"]}})
    with pytest.raises(UserError, match=r"fusion\.evaluation\.alternatives` first"):
        models(recipe, [TASK])
    place = folder_of(recipe, "TIES")
    place.mkdir(parents=True)
    assert {name: source.folder for name, source in models(recipe, [TASK]).items()} == {
        "fused": recipe.fused,
        "anchor": anchor,
        "TIES": place,
    }
    measured = {
        model: {"gsm": Measured(TASK, "exact_match", ROWS, (score,) * len(ROWS), {}, [])}
        for model, score in {"fused": 1.0, "anchor": 0.0, "TIES": 0.5}.items()
    }
    found = summary(recipe, [TASK], measured, {"math": "anchor", "general": "anchor"})
    assert found["tasks"]["gsm"]["scores"]["TIES"]["value"] == 0.5
    assert found["tasks"]["gsm"]["fused_minus"]["TIES"]["value"] == 0.5
    table = markdown(found)
    assert "| anchor | own expert | fused | dense, TIES | fused less anchor | less own expert |" in table
    assert "| 0.500 [0.50, 0.50] |" in table


def test_figures_are_paired_by_row(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path})
    scores = {"anchor": [0, 0, 1, 0, 0, 1], "math": [1, 1, 1, 0, 1, 1], "fused": [1, 1, 1, 0, 0, 1]}
    measured = {
        model: {"gsm": Measured(TASK, "exact_match", ROWS, tuple(map(float, row)), {"valid": (1.0,) * 6}, [])}
        for model, row in scores.items()
    }
    result = summary(recipe, [TASK], measured, {"math": "math"})
    row = result["tasks"]["gsm"]
    assert [row["scores"][c]["value"] for c in ("anchor", "own_expert", "fused")] == [2 / 6, 5 / 6, 4 / 6]
    share = retained_share(*(list(map(float, scores[m])) for m in ("anchor", "fused", "math")))
    assert share is not None and row["retained_share"]["value"] == pytest.approx(share.value) == pytest.approx(2 / 3)
    assert row["fused_minus"]["anchor"]["value"] == pytest.approx(1 / 3)
    (line,) = (line for line in markdown(result).splitlines() if line.startswith("| gsm"))
    assert [cell.split(" [")[0] for cell in line.split(" | ")[4:6]] == ["+0.333", "-0.167"]
    assert row["others"]["fused"] == {"valid": 1.0}
    text = markdown(result)
    assert "| gsm (exact_match, 6) | 0.333" in text and "fused valid 1.000" in text
    draw(result, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_sentence(tmp_path: Path, anchor: Path) -> None:
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    merge(Recipe.model_validate(data))
    for arguments, said in (
        (
            ["--tasks", "no_such_task", "--backend", "transformers"],
            "benchmark.tasks names 'no_such_task', which is no task",
        ),
        (
            ["--tasks", "general,no_such_task", "--backend", "transformers"],
            "benchmark.tasks names 'no_such_task', which is no task",
        ),
        (["--url", "http://127.0.0.1:9"], "no OpenAI server answers at http://127.0.0.1:9 .*: start one with"),
        (["--url", "ftp://x"], "--url ftp://x: give the address of a server"),
        (["--url", "http://127.0.0.1:9/"], "no OpenAI server answers at http://127.0.0.1:9 "),
        (["--json", str(tmp_path / "nowhere" / "out.json")], "nowhere/out.json: no such place for a file"),
        (["--backend", "guess"], "benchmark.backend"),
        (["--against", "friends"], "benchmark.against"),
    ):
        with pytest.raises(UserError, match=said):
            CliRunner().invoke(app, ["benchmark", str(path), *arguments], catch_exceptions=False)
