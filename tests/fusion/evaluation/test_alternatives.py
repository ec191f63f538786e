"""What else experts can become: an average is one, a router of whole experts goes by the question, a union learns."""

import shutil
from pathlib import Path

import pytest
import torch

from fusion.checkpoint import Checkpoint, read_lines
from fusion.errors import UserError
from fusion.evaluation.alternatives import compare, main, markdown
from fusion.evaluation.answer_loss import Nats, by_domain
from fusion.evaluation.dense import DENSE, UNION, dense_step, folder_of, union_step
from fusion.evaluation.ways import held_out, ways
from fusion.merge import merge
from fusion.recipe import Recipe
from fusion.recipe_file import as_file
from fusion.shared import CANDIDATES
from fusion.sources import ModelSource, load_model, trained_expert
from fusion.steps import run_step
from gate_training.trainer import METHODS
from tests.recipes import recipe_data

RULES = {"math": [{"pattern": r"\d"}], "coding": [{"words": ["def", "class", "import", "for"]}]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, anchor: Path, anchored_experts: dict[str, Path]) -> Recipe:
    """Three anchored experts, merged, with held-out rows that nobody has trained on."""
    folder = tmp_path_factory.mktemp("alternatives")
    names = ("math", "coding", "general")
    data = recipe_data(folder, anchor, {name: anchored_experts[name] for name in names})
    for name in names:
        data["domains"][name]["train"] = {"generated": f"demo.{name}"}
        data["domains"][name]["rules"] = RULES.get(name, [])
    made = Recipe.model_validate(data)
    merge(made)
    return made


def test_the_average_is_the_mean_of_the_experts(recipe: Recipe, anchored_experts: dict[str, Path]) -> None:
    run_step(dense_step(recipe, "average"), recipe.folder)
    made = Checkpoint(folder_of(recipe, "average"))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        mean = torch.stack([Checkpoint(anchored_experts[e.name]).tensor(name) for e in recipe.experts]).mean(dim=0)
        assert torch.allclose(made.tensor(name), mean, atol=1e-6)
    assert not run_step(dense_step(recipe, "average"), recipe.folder)  # unchanged, skipped


@pytest.mark.parametrize("name", [name for name in DENSE if name != "average"])
def test_sums_of_task_vectors_are_models(recipe: Recipe, name: str) -> None:
    run_step(dense_step(recipe, name), recipe.folder)
    model = load_model(ModelSource(name, folder_of(recipe, name)))
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_every_way_has_its_losses_and_is_measured_once(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    rows, domains = compare(recipe)
    found = {way: by_domain(measured, domains) for way, measured in rows.items()}
    assert found.keys() == {
        "anchor",
        "own expert",
        "whole expert, by its question",
        "anchor with LoRA adapters of rank 32, by its question",
        "dense, average",
        "dense, TIES",
        "dense, DARE",
        "fused, perfect routing",
        "fused, by its question",
        "fused, mergekit random",
        "fused, mergekit cheap_embed",
        "fused, mergekit hidden, hidden_last",
        "fused, gates by ridge",
        "fused, gates by cross-entropy",
        "fused, gates by likelihood",
        "fused, gates by regression",
        "fused, its own gates, top-1",
        "fused, its own gates, top-2",
    }  # nothing drifted, nothing healed
    for name in recipe.domains:
        assert found["fused, perfect routing"][name] == pytest.approx(found["own expert"][name], rel=1e-4)
        assert found["dense, average"][name] != pytest.approx(found["own expert"][name], rel=1e-3)
    picked = held_out(recipe).picked
    assert picked[:8] == [0] * 4 + [1] * 4  # by rules; the others by a classifier
    for name in ("math", "coding"):
        assert found["whole expert, by its question"][name] == pytest.approx(found["own expert"][name], rel=1e-4)
        # noise has no low rank: adapters are somewhere between
        assert found["anchor with LoRA adapters of rank 32, by its question"][name] != found["anchor"][name]
    assert "| dense, average |" in markdown(rows, domains, "fused, its own gates, top-2")
    capsys.readouterr()
    assert compare(recipe) == (rows, domains)
    assert capsys.readouterr().err.count("unchanged, skipped") == len(found) + len(DENSE) + len(METHODS)


def test_every_rows_loss_is_left_beside_the_table(recipe: Recipe) -> None:
    rows, domains = compare(recipe)
    with as_file(recipe) as file:
        main(str(file))
    head, *ways = read_lines(folder_of(recipe, "losses.jsonl"))
    assert head["domains"] == domains
    for way in ways:
        assert [tuple(row) for row in zip(way["nats"], head["tokens"], strict=True)] == rows[way["way"]]
    table = folder_of(recipe, "losses.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == [way["way"] for way in ways] == list(rows)


def test_what_takes_long_can_be_left_out(tmp_path: Path, recipe: Recipe) -> None:
    without = ["TIES", "DARE", "ridge", "likelihood", "regression", "adapters"]
    shorter = recipe.model_copy(update={"output": str(tmp_path)})
    shutil.copytree(recipe.fused, shorter.fused)
    rows, _ = compare(shorter, without)
    assert compare(recipe)[0].keys() - rows.keys() == {f"dense, {name}" for name in without[:2]} | {
        f"fused, gates by {name}" for name in without[2:5]
    } | {"anchor with LoRA adapters of rank 32, by its question"}
    with as_file(recipe) as file, pytest.raises(UserError, match=r"--without TIS: what can be left out is average, "):
        main(str(file), "--without", "TIS,DARE")


def test_drifted_experts_are_measured_behind_every_candidate(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]
) -> None:
    data = recipe_data(tmp_path, anchor, drifted_experts)
    for name in drifted_experts:
        data["domains"][name]["train"] = {"generated": f"demo.{name}"}
    recipe = Recipe.model_validate(data)
    merge(recipe)
    rows = held_out(recipe)
    found = {way.name: way for way in ways(recipe, rows, recipe.fused)}

    def loss(way: str) -> dict[str, float]:
        return by_domain(found[way].measure(), rows.domains)

    losses = {method: loss(f"fused, perfect routing, shared parts by {method}") for method in CANDIDATES}
    assert losses["anchor"] == pytest.approx(loss("fused, perfect routing"), rel=1e-4)
    assert losses["mean"] != pytest.approx(losses["anchor"], rel=1e-3)
    assert not [path for path in recipe.folder.iterdir() if path.name.startswith("tmp")]


def test_shares_are_of_the_experts_gain() -> None:
    domains = ["math"] * 6 + ["general"] * 2
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]

    def rows(*nats: float) -> list[Nats]:
        """Each row's loss is that of its domain, in nats a token."""
        return [(nats[domain == "general"] * count, count) for domain, count in zip(domains, tokens, strict=True)]

    found = {"anchor": rows(2.0, 1.0), "own expert": rows(1.0, 1.0), "half": rows(1.5, 1.0)}
    table = markdown(found, domains, "own expert").splitlines()
    assert table[0].startswith("| way | math | general | mean | less that of *own expert* |")
    assert table[-1].startswith("| half | 1.500 | 1.000 | 1.250 | +0.250 [+0.") and table[-1].endswith(
        "| 0.500, 0.500 |"
    )
    assert table[-2] == "| own expert | 1.000 | 1.000 | 1.000 |  | 1.000, 1.000 |"
    noise = [(nats + (20.0 if row % 2 else -20.0), count) for row, (nats, count) in enumerate(found["own expert"])]
    found["own expert"] = noise
    assert markdown(found, domains, "anchor").splitlines()[-1].endswith("| no gain |")


def test_one_model_learns_from_all_the_data(tmp_path: Path, anchor: Path) -> None:
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    branch = {"rows": 16, "steps": 2, "batch_rows": 4, "max_length": 256, "held_out_rows": 2, "score_rows": 1}
    branch |= {"warmup_steps": 0, "max_new_tokens": 4, "allow_no_gain": True}
    for expert in data["experts"]:
        del expert["model"]
        expert["branch"] = branch | {"data": {"generated": f"demo.{expert['name']}"}}
    recipe = Recipe.model_validate(data)
    step = union_step(recipe)
    assert step.settings[0].steps == 4
    run_step(step, recipe.folder)
    made, start = Checkpoint(folder_of(recipe, UNION)), Checkpoint(anchor)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(made.tensor(name), start.tensor(name))
    assert not trained_expert(recipe, recipe.experts[0]).exists()
