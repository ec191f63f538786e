"""The road as a user walks it, on a demo family trained for seconds: a sixth domain, work done once, kills survived."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.checkpoint import Checkpoint
from fusion.evaluation.benchmarks import benchmark
from fusion.evaluation.evaluate import held_out_rows
from fusion.recipe_file import load_recipe
from fusion.steps import STATE
from tests.fusion.evaluation.test_benchmarks import greedy

FINANCE = {
    "description": "prices and interest",
    "train": {"generated": "demo.finance"},
    "held_out": {"generated": "demo.finance", "split": "held_out"},
    "rules": [{"words": ["price", "interest", "tax"]}],
}
OFFLINE = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
STEPS = ("anchor", "branch general", "branch structured", "branch finance", "merge", "train-gates", "evaluate")
KILLED = ("anchor", "branch finance", "merge", "train-gates", "evaluate")
UNDER_WAY = {
    "anchor": ".anchor.pretrain/rendezvous",
    "branch finance": "experts/.*.branch/before.json",
    "merge": ".fused.partial/*.safetensors",
}


def recipe(folder: Path, expert: bool = True) -> Path:
    """The demo's recipe with `finance` as a sixth domain and next to no training, in `folder`."""
    data: dict[str, Any] = yaml.safe_load(Path("configs/demo.yaml").read_text(encoding="utf-8"))
    data["output"] = str(folder / "run")
    data["anchor"]["pretrain"] |= {"steps": 6, "rows": 200}
    data["domains"] = {"finance": dict(FINANCE)} | data["domains"]
    small = {"rows": 64, "steps": 2, "batch_rows": 8, "evaluate_every": 2, "held_out_rows": 4, "score_rows": 2}
    small |= {"warmup_steps": 0, "max_new_tokens": 4, "allow_no_gain": True}
    kept = ("general", "structured")
    data["experts"] = [expert_ for expert_ in data["experts"] if expert_["name"] in kept]
    for expert_ in data["experts"]:
        expert_["branch"] |= small
    if expert:
        branch = data["experts"][0]["branch"] | {"data": {"generated": "demo.finance"}}
        data["experts"].append({"name": "finance", "domain": "finance", "branch": branch})
    else:
        data["domains"]["finance"]["fallback"] = "general"
    for name in ("coding", "math", "multilingual"):
        data["domains"][name]["fallback"] = "general"
    data["gate_training"] |= {"rows": 8, "held_out_rows": 4}
    data["evaluation"] |= {"rows": 4, "max_new_tokens": 4, "cross_domains": False, "extra": {}}
    data["serving"]["questions"] = []
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fusion.cli", "run", str(path), "--quiet"]
    return subprocess.Popen(command, env=OFFLINE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(path: Path) -> str:
    process = start(path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out + err


def check(folder: Path) -> dict[str, Any]:
    """The fused checkpoint is whole and every artefact is there; returns the evaluation."""
    run = folder / "run"
    checkpoint = Checkpoint(run / "fused")
    for name in checkpoint.weight_map:
        checkpoint.shape(name)
    assert not list(run.rglob(".*"))  # everything is written aside under a name with a dot
    for name in ("report.md", "routing.png", "gates.png", "gates.json", "answers.json"):
        assert (run / name).stat().st_size > 0
    result: dict[str, Any] = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert result["made"]["versions"]["qwen-fusion"]
    for domain in result["domains"].values():
        if (share := domain["retained_share_by_loss"]) is not None:
            low, high = domain["retained_share_by_loss_interval"]
            assert low <= share <= high
    manifest = json.loads((run / "fused" / "fusion.json").read_text(encoding="utf-8"))
    assert list(result["moved"]) == [expert["name"] for expert in manifest["experts"]]
    assert "How far each expert has moved" in (run / "report.md").read_text(encoding="utf-8")
    served = {name: domain["fused_trained"]["loss"] for name, domain in result["domains"].items()}
    assert result["ways"][f"top-{Checkpoint(run / 'fused').config['num_experts_per_tok']}"] == pytest.approx(
        served, rel=1e-3
    )
    assert "perfect routing" in (run / "report.md").read_text(encoding="utf-8")
    return result


def check_benchmark(path: Path) -> None:
    """What the harness makes of the run is what transformers answers to the same rows, scored here."""
    sets = ["benchmark.backend=transformers", "benchmark.against=[anchor]", "benchmark.limit=3", "evaluation.rows=8"]
    recipe = load_recipe(path, sets)
    result = benchmark(recipe)
    answers: list[str] = []
    for name in recipe.domains:
        rows = held_out_rows(recipe, [name])[name]
        for model, folder in (("fused", recipe.fused), ("anchor", recipe.folder / "anchor")):
            lines = (recipe.folder / "benchmark" / "samples" / model / f"own_{name}.jsonl").read_text().splitlines()
            samples = [json.loads(line) for line in lines]
            asked = [rows[sample["doc_id"]] for sample in samples]
            wanted = greedy(folder, [list(row.prompt) for row in asked])
            told = [sample["resps"][0][0] for sample in samples]
            assert len(told) == 3 and all(map(str.startswith, told, wanted))
            answers += wanted
            right = [float(answer.strip() == row.answer.strip()) for answer, row in zip(told, asked, strict=True)]
            assert result["tasks"][name]["scores"][model]["value"] == sum(right) / 3
    assert any(answers)  # most are silent after so little training


def test_a_sixth_domain_with_an_expert_of_its_own_and_work_done_once(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    finish(path)
    result = check(tmp_path)
    assert set(result["domains"]) == {"finance", "structured", "multilingual", "coding", "math", "general"}
    assert result["domains"]["finance"]["expert"] == "finance"
    assert result["domains"]["math"]["expert"] == "general"
    assert set(json.loads((tmp_path / "run" / "gates.json").read_text())["layers"][0]["share_by_expert"]) == {
        "general",
        "structured",
        "finance",
    }
    check_benchmark(path)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "fused").iterdir()}
    again = finish(path)
    for step in (*STEPS, "ask"):
        assert f"{step}: unchanged, skipped" in again
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "fused").iterdir()}

    changed = path.read_text(encoding="utf-8").replace("held_out_rows: 4\nevaluation", "held_out_rows: 3\nevaluation")
    assert changed != path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    partly = finish(path)
    assert "merge: unchanged, skipped" in partly
    assert "train-gates: unchanged" not in partly and "evaluate: unchanged" not in partly


def test_a_sixth_domain_served_by_its_fallback_and_asked(tmp_path: Path) -> None:
    path = recipe(tmp_path, expert=False)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    question = "Interest on 100 euros at 5%?"
    data["serving"]["questions"] = [{"domain": "finance", "question": question, "max_tokens": 4}]
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    log = tmp_path / "run" / "logs" / "vllm.log"
    process = start(path)
    while not log.exists():  # killed while vLLM starts
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # ends once vLLM, which holds the pipes too, has ended with its parent
    assert not (tmp_path / "run" / "answers.json").exists()
    assert "evaluate: unchanged, skipped" in finish(path)
    result = check(tmp_path)
    assert result["domains"]["finance"]["expert"] == "general"
    (answer,) = json.loads((tmp_path / "run" / "answers.json").read_text(encoding="utf-8"))
    assert answer["question"] == question and answer["completion_tokens"] <= 4
    assert set(answer["experts"]) == {"general", "structured"}
    assert sum(answer["experts"].values()) == pytest.approx(1, abs=1e-4)
    assert not (tmp_path / "run" / "server.json").exists()  # the server that was started is gone
    command = [sys.executable, "-m", "fusion.cli", "evaluate", str(path), "--json", "-"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=OFFLINE).stdout
    assert json.loads(printed) == result


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe(tmp_path_factory.mktemp("killed"))


def shot_at(path: Path, step: str) -> None:
    """Starts a run and kills it while it is at work on `step`, or right behind it."""
    run = path.parent / "run"
    process, said = start(path), ""
    assert process.stderr is not None
    try:
        for line in process.stderr:
            said += line
            if step in line.strip().split(", "):  # steps side by side share a line
                break
        while step in UNDER_WAY and not list(run.glob(UNDER_WAY[step])):
            assert process.poll() is None, said
            if (run / STATE).exists() and f'"{step}"' in (run / STATE).read_text(encoding="utf-8"):
                break
            time.sleep(0.002)
        if step != "merge":
            time.sleep(0.4)
        assert process.poll() in (None, 0), said
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # ends once no worker holds the pipes any more


@pytest.mark.parametrize("step", KILLED)
def test_killed_in_the_middle_the_next_call_goes_on(killed: Path, step: str) -> None:
    """One recipe, killed in one step after the other: every call resumes where the one before was shot."""
    run = killed.parent / "run"
    for _ in range(20):  # a step of milliseconds may be over before this test, on a busy machine, has seen it begin
        shot_at(killed, step)
        records = json.loads((run / STATE).read_text(encoding="utf-8")) if (run / STATE).exists() else {}
        if step not in records:
            break
        shutil.rmtree(run / "fused")  # so that it is done again
    assert step not in records
    done = STEPS[: STEPS.index(step)] if step != "branch finance" else STEPS[:1]
    assert set(done) <= set(records)
    for folder in (run / "fused", *(run / "experts").glob("[a-z]*")):
        if folder.exists():
            checkpoint = Checkpoint(folder)  # whole, or not there
            assert all(checkpoint.shape(name) for name in checkpoint.weight_map)
    if step == KILLED[-1]:
        finish(killed)
        check(killed.parent)
