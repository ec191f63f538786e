"""Growing: what changes is what a fresh merge would write, what does not is the same file, and gate rows stay."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion import grow, road
from fusion.architecture import GATES_FILE, MANIFEST, gate_tensor
from fusion.checkpoint import INDEX, Checkpoint, file_hash, read_json
from fusion.errors import UserError
from fusion.grow import add_expert, remove_expert
from fusion.layers import LayerStream, checkpoint_gates, gated, make_batches
from fusion.merge import gates_are_trained, merge
from fusion.recipe import Recipe
from fusion.steps import is_current
from fusion.verify import verify
from gate_training.examples import routing_data
from tests.families import write_model
from tests.recipes import make_recipe

NAMES = ("general", "math", "coding")


@pytest.fixture
def experts(tmp_path: Path, anchored_experts: dict[str, Path]) -> dict[str, Path]:
    """Experts that a test may change."""
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in anchored_experts.items()}


def recipe_of(folder: Path, anchor: Path, experts: dict[str, Path], names: tuple[str, ...], **gates: Any) -> Recipe:
    """A recipe of some of the experts; the domains of the others fall back to the general one."""
    whole = make_recipe(folder, anchor, experts, gate_training={"rows": 4, "held_out_rows": 4, **gates})
    domains = {
        name: domain if name in names else domain.model_copy(update={"fallback": "general"})
        for name, domain in whole.domains.items()
    }
    kept = tuple(expert for expert in whole.experts if expert.name in names)
    return whole.model_copy(update={"experts": kept, "domains": domains})


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def hashes(folder: Path) -> dict[str, str]:
    papers = (GATES_FILE, MANIFEST, "README.md", "recipe.yaml")
    return {path.name: file_hash(path) for path in folder.iterdir() if path.name not in papers}


def routed(recipe: Recipe) -> dict[str, float]:
    """The share of each domain's training tokens that the first sparse layer's gate sends to the domain's expert."""
    data, folder = routing_data(recipe, recipe.fused), recipe.fused
    stream = LayerStream(Checkpoint(folder), data.train_batches())
    layer = next(iter(stream))
    layer.attend()
    found: dict[str, list[bool]] = {}
    for batch in stream.batches:
        chosen = (stream.inputs(batch) @ checkpoint_gates(Checkpoint(folder))[0].T).argmax(dim=1)
        for label, expert in zip(batch.token_labels().tolist(), chosen.tolist(), strict=True):
            found.setdefault(recipe.experts[label].name, []).append(label == expert)
    return {name: sum(rows) / len(rows) for name, rows in found.items()}


@pytest.mark.parametrize("settings", [{}, {"method": "ridge", "propagation": "labels"}], ids=["cross-entropy", "sums"])
def test_an_expert_joins(tmp_path: Path, anchor: Path, experts: dict[str, Path], settings: dict[str, Any]) -> None:
    before = recipe_of(tmp_path, anchor, experts, ("general", "math"), **settings)
    road.merge(before)
    road.train_gates(before)
    gates, old = checkpoint_gates(Checkpoint(before.fused)), inodes(before.fused)
    recipe = recipe_of(tmp_path, anchor, experts, NAMES, **settings)
    add_expert(recipe, "coding")
    for layer, rows in checkpoint_gates(Checkpoint(recipe.fused)).items():
        assert torch.equal(rows[:2], gates[layer])
        assert rows[2].norm() > 0
    new = inodes(recipe.fused)
    assert new.keys() - old.keys() == {"expert-coding.safetensors"}
    assert {name for name in old if old[name] == new[name]} == old.keys() - {GATES_FILE}
    assert not verify(recipe.fused).problems and len(verify(recipe.fused).equal) == 4
    assert hashes(recipe.fused) == hashes(merge(recipe, tmp_path / "fresh"))
    manifests = [read_json(folder / MANIFEST) for folder in (recipe.fused, tmp_path / "fresh")]
    assert manifests[0]["experts"] == manifests[1]["experts"]
    assert gates_are_trained(recipe.fused)
    shares = routed(recipe)
    assert shares["coding"] > 0.7 and min(shares.values()) > 0.5  # prompts begin alike in every domain
    assert is_current(road.merge_step(recipe), recipe.folder)
    stamps = {path.name: path.stat().st_mtime_ns for path in recipe.fused.glob("*.safetensors")}
    road.merge(recipe)
    road.train_gates(recipe)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in recipe.fused.glob("*.safetensors")}


def test_only_the_new_experts_examples_are_run_where_sums_are_kept(
    tmp_path: Path, anchor: Path, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "ridge", "propagation": "labels"}
    before = recipe_of(tmp_path, anchor, experts, ("general", "math"), **settings)
    before = before.model_copy(update={"domains": {n: d for n, d in before.domains.items() if n != "coding"}})
    road.merge(before)
    road.train_gates(before)
    from gate_training import statistics

    seen: list[set[int]] = []
    sums = statistics._label_sums
    monkeypatch.setattr(
        statistics, "_label_sums", lambda tokens, experts: (seen.append(experts), sums(tokens, experts))[1]
    )
    add_expert(recipe_of(tmp_path, anchor, experts, NAMES, **settings), "coding")
    assert seen and all(experts == {2} for experts in seen)


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_leaves(tmp_path: Path, anchor: Path, experts: dict[str, Path], name: str) -> None:
    recipe = recipe_of(tmp_path, anchor, experts, NAMES)
    domains = {
        n: d.model_copy(update={"fallback": "math" if n == "general" else "general"}) for n, d in recipe.domains.items()
    }
    recipe = recipe.model_copy(update={"domains": domains})
    road.merge(recipe)
    road.train_gates(recipe)
    gates, old, index = checkpoint_gates(Checkpoint(recipe.fused)), inodes(recipe.fused), NAMES.index(name)
    remove_expert(recipe, name)
    left = [other for other in NAMES if other != name]
    for layer, rows in checkpoint_gates(Checkpoint(recipe.fused)).items():
        assert torch.equal(rows, gates[layer][[NAMES.index(other) for other in left]])
    new = inodes(recipe.fused)
    assert new.keys() == old.keys() - {f"expert-{name}.safetensors"}
    same = {"shared.safetensors", *(f"expert-{other}.safetensors" for other in NAMES[:index])}
    assert {file for file in new if old[file] == new[file]} == same
    assert not verify(recipe.fused).problems and verify(recipe.fused).equal == ["shared", *left]
    smaller = grow._without(recipe, name)
    assert hashes(recipe.fused) == hashes(merge(smaller, tmp_path / "fresh"))
    assert gates_are_trained(recipe.fused)
    road.train_gates(smaller)  # nothing has changed since
    assert torch.equal(checkpoint_gates(Checkpoint(recipe.fused))[0], gates[0][[NAMES.index(other) for other in left]])


def test_one_that_leaves_and_joins_again_is_where_it_was(
    tmp_path: Path, anchor: Path, experts: dict[str, Path]
) -> None:
    recipe = recipe_of(tmp_path, anchor, experts, NAMES)
    domains = {
        n: d.model_copy(update={"fallback": "general" if n != "general" else None}) for n, d in recipe.domains.items()
    }
    recipe = recipe.model_copy(update={"domains": domains})
    road.merge(recipe)
    before = hashes(recipe.fused)
    remove_expert(recipe, "math")
    add_expert(recipe, "math")  # into the middle: the one behind it is written again
    assert hashes(recipe.fused) == before
    assert not verify(recipe.fused).problems


def test_random_gates_stay_random(tmp_path: Path, anchor: Path, experts: dict[str, Path]) -> None:
    road.merge(recipe_of(tmp_path, anchor, experts, ("general", "math")))
    recipe = recipe_of(tmp_path, anchor, experts, NAMES)
    before = checkpoint_gates(Checkpoint(recipe.fused))
    add_expert(recipe, "coding")
    assert not gates_are_trained(recipe.fused)
    for layer, rows in checkpoint_gates(Checkpoint(recipe.fused)).items():
        assert torch.equal(rows[:2], before[layer]) and rows[2].norm() > 0


def test_interrupted_before_its_row_is_fitted_it_goes_on(
    tmp_path: Path, anchor: Path, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipe_of(tmp_path, anchor, experts, ("general", "math"))
    road.merge(before)
    road.train_gates(before)
    gates = checkpoint_gates(Checkpoint(before.fused))
    recipe = recipe_of(tmp_path, anchor, experts, NAMES)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(road, "gates_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        add_expert(recipe, "coding")
    assert not gates_are_trained(recipe.fused)  # so that nothing is evaluated by half a gate
    add_expert(recipe, "coding")
    assert gates_are_trained(recipe.fused)
    for layer, rows in checkpoint_gates(Checkpoint(recipe.fused)).items():
        assert torch.equal(rows[:2], gates[layer]) and rows[2].norm() > 0
    with pytest.raises(UserError, match="has expert 'coding' already"):
        add_expert(recipe, "coding")


class Stop(BaseException):
    """As a kill."""


@pytest.mark.parametrize("change", ["join", "leave"])
def test_killed_while_shards_are_written_it_goes_on(
    tmp_path: Path, anchor: Path, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    whole, part = (recipe_of(tmp_path, anchor, experts, names) for names in (NAMES, ("general", "coding")))
    domains = {
        n: d.model_copy(update={"fallback": "general" if n == "math" else None}) for n, d in whole.domains.items()
    }
    whole, part = (recipe.model_copy(update={"domains": domains}) for recipe in (whole, part))
    before, after = (part, whole) if change == "join" else (whole, part)
    road.merge(before)
    road.train_gates(before)
    gates = checkpoint_gates(Checkpoint(before.fused))
    step = (lambda: add_expert(whole, "math")) if change == "join" else (lambda: remove_expert(whole, "math"))

    def stop(*_: object) -> str:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("fusion.merge.write_shard", stop)
        step()
    assert not verify(before.fused).problems  # still the one of before
    step()
    assert not verify(after.fused).problems and gates_are_trained(after.fused)
    kept = [0, 2] if change == "join" else [0, 1]
    rows = [0, 1] if change == "join" else [0, 2]
    assert torch.equal(checkpoint_gates(Checkpoint(after.fused))[0][kept], gates[0][rows])


def test_a_drifted_expert_that_joins_is_noted_as_such(tmp_path: Path, anchor: Path, experts: dict[str, Path]) -> None:
    drifted = {**experts, "coding": write_model(tmp_path / "drifted", seed=7, anchor=anchor, drift=True)}
    road.merge(recipe_of(tmp_path, anchor, drifted, ("general", "math")))
    recipe = recipe_of(tmp_path, anchor, drifted, NAMES)
    add_expert(recipe, "coding")
    assert [row["anchored"] for row in read_json(recipe.fused / MANIFEST)["experts"]] == [True, True, False]


def test_what_has_changed_otherwise_is_refused(tmp_path: Path, anchor: Path, experts: dict[str, Path]) -> None:
    road.merge(recipe_of(tmp_path, anchor, experts, ("general", "math")))
    recipe = recipe_of(tmp_path, anchor, experts, NAMES)
    before = hashes(recipe.fused)
    with pytest.raises(UserError, match="the recipe has no expert 'law'"):
        add_expert(recipe, "law")
    with pytest.raises(UserError, match="has expert 'math' already"):
        add_expert(recipe, "math")
    with pytest.raises(UserError, match="has no expert 'coding'"):
        remove_expert(recipe, "coding")
    with pytest.raises(UserError, match="only one is left"):
        remove_expert(recipe_of(tmp_path, anchor, experts, ("general", "math")), "general")
    renamed = recipe.experts[1].model_copy(update={"name": "sums"})
    other = recipe.model_copy(update={"experts": (recipe.experts[0], renamed, recipe.experts[2])})
    with pytest.raises(UserError, match="change one at a time"):
        add_expert(other, "coding")
    means = recipe.model_copy(update={"shared": recipe.shared.model_copy(update={"method": "mean"})})
    with pytest.raises(UserError, match="made of all experts"):
        add_expert(means, "coding")
    sparse = recipe.model_copy(update={"routing": recipe.routing.model_copy(update={"moe_layers": (1,)})})
    with pytest.raises(UserError, match="moe_layers is"):
        add_expert(sparse, "coding")
    elsewhere = recipe.experts[1].model_copy(update={"model": str(experts["coding"])})
    moved = recipe.model_copy(update={"experts": (recipe.experts[0], elsewhere, recipe.experts[2])})
    with pytest.raises(UserError, match="says of expert 'math' something else"):
        add_expert(moved, "coding")
    shutil.copy(anchor / "model.safetensors", experts["math"] / "model.safetensors")
    with pytest.raises(UserError, match=r"the model of 'math' in .* has changed since it was merged"):
        add_expert(recipe, "coding")
    assert hashes(recipe.fused) == before


def test_a_domain_that_nobody_serves_any_more_is_refused(
    tmp_path: Path, anchor: Path, experts: dict[str, Path]
) -> None:
    recipe = recipe_of(tmp_path, anchor, experts, NAMES)
    road.merge(recipe)
    with pytest.raises(UserError, match="domain 'math' has neither an expert nor a fallback"):
        remove_expert(recipe, "math")
    assert [row["name"] for row in read_json(recipe.fused / MANIFEST)["experts"]] == list(NAMES)


def test_the_index_is_of_what_is_there(tmp_path: Path, anchor: Path, experts: dict[str, Path]) -> None:
    before = recipe_of(tmp_path, anchor, experts, ("general", "math"))
    road.merge(before)
    recipe = recipe_of(tmp_path, anchor, experts, NAMES)
    add_expert(recipe, "coding")
    weight_map = read_json(recipe.fused / INDEX)["weight_map"]
    assert weight_map[gate_tensor(0)] == GATES_FILE
    stream = LayerStream(Checkpoint(recipe.fused), make_batches([[1, 2, 3]]))
    stream.run(gated(checkpoint_gates(Checkpoint(recipe.fused)), 1))


def test_figures_of_the_experts_before_are_taken_away(
    tmp_path: Path, anchor: Path, experts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, anchor, experts, NAMES)
    merge(recipe)
    for name in ("evaluation.json", "long.md", "gates.json"):
        (recipe.folder / name).write_text("{}")
    remove_expert(recipe_of(tmp_path, anchor, experts, ("general", "coding")), "math")
    assert [(recipe.folder / name).exists() for name in ("evaluation.json", "long.md")] == [False, False]
    assert "evaluation.json, long.md told of the experts before" in capsys.readouterr().err
