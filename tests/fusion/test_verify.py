"""Verify: each way in which a checkpoint can be wrong, made one at a time, is found and named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fusion import merge as merge_module
from fusion.architecture import GATES_FILE, MANIFEST, expert_tensor, gate_tensor
from fusion.checkpoint import INDEX, Checkpoint, file_hash, read_json, write_json
from fusion.cli import app
from fusion.errors import UserError
from fusion.layers import checkpoint_gates
from fusion.merge import merge, record_gates
from fusion.verify import verify
from gate_training.trainer import install_gates
from tests.families import write_model
from tests.recipes import make_recipe

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def fused(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> Path:
    """A fused checkpoint whose experts a test may change."""
    copies = {n: Path(shutil.copytree(path, tmp_path / n)) for n, path in anchored_experts.items()}
    return merge(make_recipe(tmp_path, anchor, copies))


def change(path: Path, name: str, to: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Writes a shard again with one tensor changed, or without it."""
    tensors = load_file(path)
    changed = to(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, path, metadata={"format": "pt"})


def forgive(folder: Path, file: str) -> None:
    """Makes the manifest say that a file is meant to be as it is, so that other checks have to find it."""
    manifest = read_json(folder / MANIFEST)
    if file == GATES_FILE:
        manifest["gates"]["sha256"] = file_hash(folder / file)
    else:
        manifest["sha256"][file] = file_hash(folder / file)
    write_json(folder / MANIFEST, manifest)


def test_a_merge_is_found_right(fused: Path) -> None:
    found = verify(fused)
    assert (found.problems, found.not_compared) == ([], {})
    assert found.equal == ["shared", "general", "math", "coding"]
    assert found.bytes == sum(path.stat().st_size for path in fused.glob("*.safetensors"))


@pytest.mark.parametrize("shared_expert", [None, "anchor", "math"])
@pytest.mark.parametrize("moe_layers", [None, [1]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_shape_of_merge_is_found_right(
    tmp_path: Path,
    anchored_experts: dict[str, Path],
    shared_expert: str | None,
    moe_layers: list[int] | None,
    dtype: str,
) -> None:
    anchor = write_model(tmp_path / "anchor", seed=1, dtype=dtype)
    routing = {"shared_expert": shared_expert, "moe_layers": moe_layers}
    fused = merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": anchored_experts["math"]}, routing=routing))
    found = verify(fused)
    assert (found.problems, found.not_compared) == ([], {})
    assert len(found.equal) == 3 + (shared_expert is not None)


def flip(data: bytearray) -> bytearray:
    data[-1] ^= 1
    return data


@pytest.mark.parametrize("file", ["shared.safetensors", "expert-math.safetensors", GATES_FILE])
def test_a_flipped_bit_is_found(fused: Path, file: str) -> None:
    (fused / file).write_bytes(flip(bytearray((fused / file).read_bytes())))
    assert any(problem.startswith(f"{file}: its SHA-256") for problem in verify(fused).problems)


def test_an_expert_that_is_not_its_source_is_found(fused: Path, tmp_path: Path) -> None:
    change(tmp_path / "math" / "model.safetensors", UP, lambda tensor: tensor + 1e-3)
    found = verify(fused)
    assert found.problems == [
        f"{expert_tensor(UP, 1)}: is not what {tmp_path / 'math'} holds, from which 'math' was merged"
    ]
    assert found.equal == ["shared", "general", "coding"]


def test_two_experts_in_each_others_place_are_found(fused: Path) -> None:
    first, second = fused / "expert-general.safetensors", fused / "expert-math.safetensors"
    for dense in (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down", "gate")):
        ours, theirs = load_file(first)[expert_tensor(dense, 0)], load_file(second)[expert_tensor(dense, 1)]
        change(first, expert_tensor(dense, 0), lambda _, tensor=theirs: tensor)
        change(second, expert_tensor(dense, 1), lambda _, tensor=ours: tensor)
    for file in ("expert-general.safetensors", "expert-math.safetensors"):
        forgive(fused, file)
    assert len(verify(fused).problems) == 2


def test_an_expert_that_only_seemed_anchored_is_found(
    tmp_path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(anchor, tmp_path / "other"))
    change(other / "model.safetensors", "model.norm.weight", lambda tensor: tensor.index_fill(0, torch.tensor(9), 2.0))
    monkeypatch.setattr(merge_module, "PAGE", 2)
    monkeypatch.setattr(merge_module, "STRIDE", 16)
    monkeypatch.setattr(merge_module, "TAIL", 4)
    folder = merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": other}))
    assert [row["anchored"] for row in read_json(folder / MANIFEST)["experts"]] == [True, True]
    assert verify(folder).problems == ["model.norm.weight: is not 'math's own, though the manifest calls that anchored"]


def test_nan_is_found(fused: Path) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[2, 3] = float("nan")
        return tensor

    change(fused / GATES_FILE, gate_tensor(1), spoil)
    forgive(fused, GATES_FILE)
    assert verify(fused).problems == [f"{gate_tensor(1)}: holds NaN or infinity"]


@pytest.mark.parametrize("whose", ["anchor", "expert"])
@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_nan_is_not_merged(tmp_path: Path, anchor: Path, whose: str, name: str) -> None:
    broken = Path(shutil.copytree(anchor, tmp_path / "broken"))
    change(broken / "model.safetensors", name, lambda tensor: torch.full_like(tensor, float("nan")))
    models = (broken, anchor) if whose == "anchor" else (anchor, broken)
    recipe = make_recipe(tmp_path, models[0], {"general": models[0], "math": models[1]})
    if whose == "expert" and name != UP:  # its norms are not merged
        assert read_json(merge(recipe) / MANIFEST)["experts"][1]["differs_at"] == name
        return
    with pytest.raises(UserError, match=f"broken: {name} holds NaN or infinity"):
        merge(recipe)
    assert not recipe.folder.exists() or not list(recipe.folder.iterdir())


def test_a_file_that_is_gone_is_found(fused: Path) -> None:
    (fused / "expert-math.safetensors").unlink()
    assert any("expert-math.safetensors cannot be read" in problem for problem in verify(fused).problems)


def test_a_file_that_is_cut_is_found(fused: Path) -> None:
    path = fused / "expert-math.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert any("expert-math.safetensors cannot be read" in problem for problem in verify(fused).problems)


def test_a_file_too_many_is_found(fused: Path) -> None:
    save_file({"x": torch.ones(1)}, fused / "expert-law.safetensors")
    problems = verify(fused).problems
    assert "expert-law.safetensors: the manifest does not know this file" in problems
    assert "expert-law.safetensors: holds x, which the index does not say" in problems


def test_a_wrong_index_is_found(fused: Path) -> None:
    index = read_json(fused / INDEX)
    name = expert_tensor(UP, 1)
    index["weight_map"][name] = "expert-general.safetensors"
    index["metadata"]["total_size"] += 1
    write_json(fused / INDEX, index)
    problems = verify(fused).problems
    assert f"expert-general.safetensors: lacks {name}, which the index says it holds" in problems
    assert f"expert-math.safetensors: holds {name}, which the index does not say" in problems
    assert any(problem.startswith(INDEX) for problem in problems)


def test_a_tensor_that_transformers_misses_or_does_not_expect_is_found(fused: Path) -> None:
    gates, index = load_file(fused / GATES_FILE), read_json(fused / INDEX)
    name, odd = gate_tensor(1), "model.layers.1.mlp.router.weight"
    save_file({odd if key == name else key: tensor for key, tensor in gates.items()}, fused / GATES_FILE)
    index["weight_map"][odd] = index["weight_map"].pop(name)
    write_json(fused / INDEX, index)
    forgive(fused, GATES_FILE)
    problems = verify(fused).problems
    assert {f"{name}: transformers misses it", f"{odd}: transformers does not expect it"} <= set(problems)


@pytest.mark.parametrize("key", ["moe_intermediate_size", "num_experts", "hidden_size", "vocab_size"])
def test_a_config_of_another_model_is_found(fused: Path, key: str) -> None:
    config = read_json(fused / "config.json")
    write_json(fused / "config.json", {**config, key: config[key] * 2})
    assert verify(fused).problems


def test_trained_gates_are_meant(fused: Path) -> None:
    install_gates(fused, {layer: gate + 1 for layer, gate in checkpoint_gates(Checkpoint(fused)).items()})
    assert [p.split(":")[0] for p in verify(fused).problems] == [GATES_FILE]
    record_gates(fused, "ridge", "data", 10, None)
    assert not verify(fused).problems


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_config_or_tokenizer_is_found(fused: Path, file: str) -> None:
    (fused / file).write_text((fused / file).read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert verify(fused).problems == [f"{file}: is not what the merge has written"]
    if file != "config.json":
        (fused / file).unlink()
        assert verify(fused).problems == [f"{file}: is not there, though the manifest knows it"]


@pytest.mark.parametrize("damage", ["no weights", "truncated"])
def test_a_source_that_is_broken_is_not_compared(fused: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "math" / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-5])
    found = verify(fused)
    assert not found.problems
    assert str(tmp_path / "math") in found.not_compared["math"]


def test_a_manifest_that_is_none_is_refused(fused: Path) -> None:
    write_json(fused / MANIFEST, {})
    with pytest.raises(UserError, match="is not what `merge` writes"):
        verify(fused)


def test_a_source_that_is_not_here_is_not_compared(fused: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "math")
    found = verify(fused)
    assert not found.problems
    assert found.equal == ["shared", "general", "coding"]
    assert "neither a folder nor a hub id" in found.not_compared["math"]


def test_a_folder_that_is_no_fused_checkpoint_is_refused(anchor: Path) -> None:
    with pytest.raises(UserError, match=r"has no fusion\.json"):
        verify(anchor)


def test_the_command_says_what_it_found(fused: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(fused), "-q", "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0
    assert read_json(tmp_path / "found.json")["equal"] == ["shared", "general", "math", "coding"]
    (fused / "expert-math.safetensors").unlink()
    done = CliRunner().invoke(app, ["verify", str(fused), "-q"])
    assert isinstance(done.exception, UserError)


def test_shared_parts_that_were_healed_are_nobodys(fused: Path) -> None:
    change(fused / "shared.safetensors", "model.norm.weight", lambda tensor: tensor + 1)
    forgive(fused, "shared.safetensors")
    assert verify(fused).problems
    write_json(fused / MANIFEST, {**read_json(fused / MANIFEST), "healed": {}})
    found = verify(fused)
    assert found.problems == [] and found.not_compared["shared"] == "healed"
