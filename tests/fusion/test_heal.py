"""Healing a tiny merge of drifted experts: what may change, what is written, and that the merge can be had back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion import heal as healing
from fusion import healed, road
from fusion.architecture import gate_tensor, part_of
from fusion.branch import train_expert
from fusion.checkpoint import Checkpoint, file_hash, read_json
from fusion.data import load_examples
from fusion.errors import UserError
from fusion.evaluation.alternatives import compare
from fusion.evaluation.answer_loss import by_domain
from fusion.evaluation.dense import DENSE
from fusion.evaluation.ways import held_out, own_gates, ways
from fusion.heal import ROWS
from fusion.healed import as_merged, is_healed
from fusion.merge import gates_are_trained, merge
from fusion.recipe import Recipe
from fusion.sections.data import DataSource
from fusion.sections.fusing import Loading
from fusion.sections.training import BranchSettings, HealSettings
from gate_training.trainer import METHODS
from tests.conftest import DOMAINS
from tests.recipes import make_recipe

STEPS = {"rows": 6, "held_out_rows": 3, "score_rows": 1, "max_new_tokens": 2, "steps": 8, "batch_rows": 6}
EXPERT = {**STEPS, "steps": 20, "learning_rate": 1e-2, "warmup_steps": 0, "evaluate_every": 20, "max_length": 128}
STEPS |= {"learning_rate": 1e-2, "warmup_steps": 0, "evaluate_every": 4, "max_length": 128, "lora_rank": 4}


def rows(folder: Path, domain: str, numbers: range) -> dict[str, str]:
    """A file of questions of one domain, told apart by their numbers."""
    path = folder / f"{domain}-{numbers.start}.jsonl"
    chats = [
        {"messages": [{"role": "user", "content": f"{domain} {i}?"}, {"role": "assistant", "content": domain}]}
        for i in numbers
    ]
    path.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    return {"path": str(path)}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, anchor: Path) -> dict[str, Path]:
    """Three experts of which each has learnt, with every weight, to answer with its domain's name."""
    folder = tmp_path_factory.mktemp("experts")
    settings = BranchSettings(data=DataSource(path="-"), trainable="all", allow_no_gain=True, **EXPERT)
    for name in DOMAINS:
        learnt = load_examples(DataSource(**rows(folder, name, range(6))), name)
        train_expert(anchor, folder / name, learnt, learnt, settings)
    return {name: folder / name for name in DOMAINS}


@pytest.fixture
def recipe(tmp_path: Path, anchor: Path, experts: dict[str, Path]) -> Recipe:
    """A recipe whose merge is in place, its gates trained."""
    domains = {
        name: {"train": rows(tmp_path, name, range(6)), "held_out": rows(tmp_path, name, range(6, 9))}
        for name in experts
    }
    gates = {"method": "ridge", "rows": 6, "held_out_rows": 3}
    recipe = make_recipe(tmp_path, anchor, experts, domains=domains, gate_training=gates, heal=STEPS)
    road.merge(recipe)
    road.train_gates(recipe)
    return recipe


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.weight_map}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in folder.iterdir() if path.suffix not in (".md", ".yaml")}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(60).reshape(3, 20), use_cache=False).logits
    return found


def test_experts_and_embeddings_stay_and_attention_norms_and_gates_move(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, files = tensors(recipe.fused), hashes(recipe.fused)
    in_memory: list[Any] = []
    written = healing._healed_tensors

    def watched(model: Any, saved: torch.dtype) -> dict[str, torch.Tensor]:
        in_memory.append(model)
        return written(model, saved)

    monkeypatch.setattr(healing, "_healed_tensors", watched)
    road.heal(recipe)
    after = tensors(recipe.fused)
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    gates = {gate_tensor(layer) for layer in range(3)}
    weights = {n for n in before if n.endswith("proj.weight") and ".self_attn." in n}
    norms = {n for n in before if ".mlp." not in n and part_of(n) == "norms"}
    assert changed == gates | weights | norms and len(norms) == 7
    assert {name for name, digest in hashes(recipe.fused).items() if files[name] != digest} == {
        "shared.safetensors",
        "gates.safetensors",
        "fusion.json",
    }
    manifest = read_json(recipe.fused / "fusion.json")
    assert manifest["sha256"]["shared.safetensors"] == file_hash(recipe.fused / "shared.safetensors")
    assert gates_are_trained(recipe.fused) and is_healed(recipe.fused)
    assert "attention and norms healed after the merge" in (recipe.fused / "README.md").read_text()

    model, info = AutoModelForCausalLM.from_pretrained(recipe.fused, dtype=torch.float32, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all(model.get_parameter(name).numel() == 0 for name in info["missing_keys"])
    assert torch.allclose(logits(model), logits(in_memory[0]), atol=1e-5)

    result = read_json(recipe.folder / "healing.json")
    assert set(result["figures"]) == set(ROWS) and result["best_step"] > 0
    assert min(loss for _, loss in result["curve"]) < result["curve"][0][1]
    table = (recipe.folder / "healing.md").read_text()
    assert f"{result['figures']['healed']['math']['loss']:.3f}" in table
    assert not list(recipe.folder.glob(".*"))


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def in_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, calls = healing._mean, 0

    def dies(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:  # two limits, the start, step 4, step 8
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(healing, "_mean", dies)


def while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healed, "write_papers", killed)


@pytest.mark.parametrize("kill", [in_the_steps, while_writing])
def test_killed_in_the_middle_the_merge_is_whole_and_the_next_call_goes_on(
    recipe: Recipe, kill: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hashes(recipe.fused)
    kill(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        road.heal(recipe)
    assert hashes(recipe.fused) == files
    AutoModelForCausalLM.from_pretrained(recipe.fused)
    monkeypatch.undo()
    road.heal(recipe)
    assert is_healed(recipe.fused)
    resumed = tensors(recipe.fused)
    road.heal(recipe, force=True)  # from the merge anew, in one go
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors(recipe.fused).items())
    assert not list(recipe.folder.glob(".*"))


def test_steps_are_skipped_and_the_merge_comes_back(recipe: Recipe) -> None:
    plain = hashes(recipe.fused)
    road.heal(recipe)
    files = hashes(recipe.fused)
    stamps = {path: path.stat().st_mtime_ns for path in recipe.fused.iterdir()}
    road.merge(recipe)
    road.train_gates(recipe)
    road.heal(recipe)
    assert stamps == {path: path.stat().st_mtime_ns for path in recipe.fused.iterdir()}

    road.train_gates(recipe.model_copy(update={"heal": None}))
    assert hashes(recipe.fused) == plain and not is_healed(recipe.fused)
    assert not (recipe.folder / "unhealed").exists()
    road.heal(recipe)
    assert hashes(recipe.fused) == files
    road.merge(recipe, force=True)
    assert not is_healed(recipe.fused) and not gates_are_trained(recipe.fused)
    road.train_gates(recipe)
    assert hashes(recipe.fused) == plain


def test_a_recipe_without_the_section_is_a_user_error(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="no 'heal' section"):
        road.heal(recipe.model_copy(update={"heal": None}))
    merge(recipe)
    with pytest.raises(UserError, match="random ones"):
        road.heal(recipe)


def test_rows_that_are_trained_on_do_not_judge(recipe: Recipe) -> None:
    domain = recipe.domains["math"].model_copy(update={"held_out": recipe.domains["math"].train})
    with pytest.raises(UserError, match="every held-out row of 'math'"):
        road.heal(recipe.model_copy(update={"domains": {**recipe.domains, "math": domain}}))


def test_what_is_to_be_healed_cannot_be_offloaded(recipe: Recipe) -> None:
    files = hashes(recipe.fused)
    loading = Loading(device_map="auto", max_memory={"cpu": "500KB"})
    with pytest.raises(UserError, match="is to be healed but offloaded"):
        road.heal(recipe.model_copy(update={"loading": loading}))
    assert hashes(recipe.fused) == files
    road.heal(recipe.model_copy(update={"loading": Loading(device_map="auto")}))
    assert is_healed(recipe.fused)


def test_bfloat16_weights_heal_through_float32_norms(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion.sources.compute_dtype", lambda: torch.bfloat16)
    settings = HealSettings(**{**STEPS, "steps": 4})
    result = healing.heal(recipe.model_copy(update={"heal": settings}), recipe.fused, recipe.folder / "unhealed")
    assert all(loss == loss for _, loss in result.curve) and is_healed(recipe.fused)


def test_healed_gates_are_not_rolled_back(recipe: Recipe) -> None:
    def by(method: str) -> Recipe:
        settings = recipe.gate_training.model_copy(update={"method": method})
        return recipe.model_copy(update={"gate_training": settings})

    first = file_hash(recipe.fused / "gates.safetensors")
    road.train_gates(by("regression"), force=True)
    road.heal(recipe)
    files = hashes(recipe.fused)
    with pytest.raises(UserError, match="was healed since, its gates together with its attention"):
        road.rollback(recipe)
    with pytest.raises(UserError, match="is healed, its gates together with its attention"):
        road.train_gates(recipe, force=True, with_feedback=True)
    assert hashes(recipe.fused) == files
    road.train_gates(by("cross-entropy"), force=True)  # takes healing back first
    road.rollback(recipe)
    note = read_json(recipe.fused / "fusion.json")["gates"]
    assert note["method"] == "regression" and file_hash(recipe.fused / "gates.safetensors") != first
    road.heal(recipe)
    road.train_gates(recipe)  # skipped, and healing stays
    assert is_healed(recipe.fused)


def test_the_healed_model_is_measured_beside_its_merge(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """The other ways are of the merge as it was, and all of them are kept."""
    road.heal(recipe)
    found, domains = compare(recipe)
    healed, merged = (by_domain(found[way], domains) for way in ("fused, healed", own_gates(recipe.routing.top_k)))
    assert sum(healed.values()) < sum(merged.values())
    with as_merged(recipe.fused, recipe.folder / "unhealed") as folder:
        [again] = [way for way in ways(recipe, held_out(recipe), folder) if way.name == own_gates(recipe.routing.top_k)]
        assert again.measure() == found[again.name]
    capsys.readouterr()
    assert compare(recipe) == (found, domains)
    assert capsys.readouterr().err.count("unchanged, skipped") == len(found) + len(DENSE) + len(METHODS)
