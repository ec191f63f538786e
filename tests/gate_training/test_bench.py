"""The benchmark's figures: what is quoted is what the weights have, and the peers' way trains gates alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from fusion import road
from fusion.checkpoint import Checkpoint
from fusion.errors import UserError
from fusion.evaluation import evaluate as module
from fusion.evaluation.evaluate import ROWS, evaluate
from fusion.layers import checkpoint_gates
from fusion.recipe_file import load_recipe
from gate_training import bench, other_texts
from gate_training.bench import Run, quality
from gate_training.compare import HIDDEN
from gate_training.examples import routing_data
from gate_training.peer import routing_accuracy
from gate_training.trainer import fit_gates, install_gates
from tests.recipes import QUESTIONS, recipe_data


@pytest.fixture
def path(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> Path:
    """A recipe whose held-out rows are not its training rows."""
    short = {"rows": 4, "max_new_tokens": 4, "batch_rows": 8, "hidden_prompts": 2}
    data = recipe_data(tmp_path, anchor, anchored_experts, evaluation=short)
    for name, domain in data["domains"].items():
        file = tmp_path / f"{name}-held-out.jsonl"
        rows = [{"prompt": f"{question} Well?", "answer": f"{name}"} for question in QUESTIONS[name]]
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        domain["held_out"] = {"path": str(file)}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(data), encoding="utf-8")
    return recipe


def test_what_is_retained_is_quoted_only_where_the_weights_still_have_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "RUNS", {"demo": Run(str(path))})
    assert quality() == {"demo_mean": None, "demo_worst": None, "demo_hidden": None}
    assert f"qwen-fusion run {path}" in capsys.readouterr().out
    recipe = load_recipe(path)
    road.merge(recipe)
    road.train_gates(recipe)
    result = road.evaluate(recipe)
    shares = [d["retained_share_by_loss"] for d in result["domains"].values()]
    shares = [share for share in shares if share is not None]
    assert shares
    found = quality()
    assert found["demo_mean"] == pytest.approx(sum(shares) / len(shares)) and found["demo_worst"] == min(shares)
    assert "changed since" not in capsys.readouterr().out
    monkeypatch.setattr(bench, "RUNS", {"demo": Run(str(path), ("evaluation.batch_rows=4",))})
    assert quality() == found
    assert "demo (recipe or files changed since)" in capsys.readouterr().out
    monkeypatch.setattr(bench, "RUNS", {"demo": Run(str(path))})
    monkeypatch.setattr(bench, "code_hash", lambda: "of other code")
    assert quality() == found
    assert "demo (code changed since)" in capsys.readouterr().out
    gates = checkpoint_gates(Checkpoint(recipe.fused))
    install_gates(recipe.fused, {layer: gate.roll(1, 0) for layer, gate in gates.items()})  # every token elsewhere
    with pytest.raises(UserError, match="evaluate --force"):
        quality()


def test_evaluated_from_disk_the_figures_are_the_same(path: Path) -> None:
    """Whole models spread by accelerate over memory and disk, sparse ones included."""
    recipe = load_recipe(path)
    road.merge(recipe)
    road.train_gates(recipe)
    spread = load_recipe(path, ["loading.device_map=auto", "loading.max_memory.cpu=500KB"])
    whole, spread_out = evaluate(recipe), evaluate(spread)
    for name, domain in whole["domains"].items():
        for row in ROWS:
            found = spread_out["domains"][name][row]
            assert found["loss"] == pytest.approx(domain[row]["loss"], rel=1e-5)
            assert found["score"] == domain[row]["score"]


def test_an_interrupted_evaluation_goes_on_with_the_models_that_are_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(path)
    road.merge(recipe)
    road.train_gates(recipe)
    whole = evaluate(recipe)
    asked: list[str] = []
    cut = ["fused_random"]

    def scored(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        if asked[-1] in cut:
            cut.clear()
            raise KeyboardInterrupt
        return score_model(*arguments)

    score_model = module._score_model
    monkeypatch.setattr(module, "_score_model", scored)
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe)
    asked.clear()
    assert evaluate(recipe) == whole
    assert asked == ["fused_random", "fused_hidden", "fused_trained"]
    assert not (recipe.folder / ".evaluation").exists()
    asked.clear()
    assert evaluate(load_recipe(path, ["gate_training.seed=7"]))["domains"] != whole["domains"]
    assert asked[0] == "anchor"


def test_other_texts_are_measured_beside_answers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="does not exist yet"):
        other_texts.main(str(path))
    recipe = load_recipe(path)
    road.merge(recipe)
    road.train_gates(recipe)
    evaluated = road.evaluate(recipe)["domains"]
    other_texts.main(str(path))
    printed = capsys.readouterr().out
    shares = json.loads(printed.splitlines()[-1])
    assert set(shares) == {"answers", "running text", "second answers"}
    for kind in shares:
        assert f"\n{kind}, " in printed
        assert set(shares[kind]) == {"trained", HIDDEN, "mergekit random"}
    for name, share in shares["answers"]["trained"].items():
        anchor, own, fused = (evaluated[name][row]["loss"] for row in ("anchor", "own_expert", "fused_trained"))
        assert share == pytest.approx((anchor - fused) / (anchor - own), rel=1e-3)


def test_routing_accuracy_is_the_layer_reports(path: Path) -> None:
    recipe = load_recipe(path)
    road.merge(recipe)
    data = routing_data(recipe, recipe.fused)
    gates, report = fit_gates(recipe, recipe.fused, data, "ridge")
    install_gates(recipe.fused, gates)
    model = AutoModelForCausalLM.from_pretrained(recipe.fused, dtype=torch.float32)
    found = routing_accuracy(model, data.held_out_batches())
    assert found == pytest.approx(sum(layer.accuracy for layer in report.layers) / len(report.layers), abs=1e-4)
