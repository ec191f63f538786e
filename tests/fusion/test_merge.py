"""The merge: what is in the checkpoint, in which files, against plain mergekit, and nothing at all where it fails."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.moe.config import MoEMergeConfig
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fusion import merge as merge_module
from fusion import road
from fusion.architecture import GATES_FILE, MANIFEST, expert_tensor, is_mlp, layer_of, shared_expert_tensor
from fusion.checkpoint import INDEX, Checkpoint, file_hash, read_json, write_json
from fusion.errors import UserError
from fusion.merge import _looked_at, merge
from tests.families import byte_tokenizer, write_model
from tests.recipes import make_recipe

IDS = torch.arange(3, 35)[None]  # (1, length)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, anchor: Path, anchored_experts: dict[str, Path]) -> Path:
    """Three anchored experts, merged; read only."""
    return merge(make_recipe(tmp_path_factory.mktemp("fused"), anchor, anchored_experts))


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model, info


def test_tensors_are_those_of_plain_mergekit(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], drifted_experts: dict[str, Path]
) -> None:
    experts = {"general": anchor, "math": anchored_experts["math"], "coding": drifted_experts["coding"]}
    ours = Checkpoint(merge(make_recipe(tmp_path, anchor, experts, routing={"top_k": 2, "shared_expert": "math"})))
    config = {
        "base_model": str(anchor),
        "gate_mode": "random",
        "dtype": "float32",
        "experts": [{"source_model": str(path), "positive_prompts": [name]} for name, path in experts.items()],
        "shared_experts": [{"source_model": str(experts["math"]), "positive_prompts": ["math"]}],
    }
    build(MoEMergeConfig.model_validate(config), str(tmp_path / "mergekit"), MergeOptions())
    theirs = Checkpoint(tmp_path / "mergekit")
    assert set(ours.weight_map) == set(theirs.weight_map)
    routers = {name for name in ours.weight_map if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))}
    assert len(routers) == 6
    for name in ours.weight_map.keys() - routers:
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name


def test_transformers_loads_it_without_unexpected_keys(fused: Path) -> None:
    model, info = loaded(fused)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    parameters = dict(model.named_parameters())
    for name in info["missing_keys"]:
        assert ".mlp.shared_expert." in name
        assert parameters[name].numel() == 0
    assert not [name for name in Checkpoint(fused).weight_map if ".mlp.shared_expert." in name]


def test_tied_embeddings_stay_tied(fused: Path) -> None:
    assert "lm_head.weight" not in Checkpoint(fused)
    model, _ = loaded(fused)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_head_that_a_tied_anchor_stores_all_the_same_is_left_out(tmp_path: Path, anchor: Path) -> None:
    copy = Path(shutil.copytree(anchor, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / "model.safetensors")
    assert "lm_head.weight" not in Checkpoint(merge(make_recipe(tmp_path, copy, {"general": anchor, "math": anchor})))


def test_an_untied_head_is_the_anchors(tmp_path: Path) -> None:
    anchor = write_model(tmp_path / "anchor", seed=1, tie_word_embeddings=False)
    expert = write_model(tmp_path / "expert", seed=2, tie_word_embeddings=False)
    folder = merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": expert}))
    model, info = loaded(folder)
    assert not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, Checkpoint(anchor).tensor("lm_head.weight"))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_every_group_has_its_own_file(fused: Path) -> None:
    assert {path.name for path in fused.glob("*.safetensors")} == {
        "shared.safetensors",
        "expert-general.safetensors",
        "expert-math.safetensors",
        "expert-coding.safetensors",
        GATES_FILE,
    }
    weight_map = read_json(fused / INDEX)["weight_map"]
    for name, file in weight_map.items():
        if ".mlp.experts." in name:
            number = int(name.split(".mlp.experts.")[1].split(".")[0])
            assert file == f"expert-{('general', 'math', 'coding')[number]}.safetensors"
        else:
            assert file == (GATES_FILE if "gate.weight" in name else "shared.safetensors")
    stored = {name for path in fused.glob("*.safetensors") for name in load_file(path)}
    assert stored == set(weight_map)


def test_a_large_group_is_split_and_still_its_own(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    recipe = make_recipe(tmp_path, anchor, anchored_experts)
    small = make_recipe(tmp_path, anchor, anchored_experts, merging={"shard_bytes": 60_000})
    whole, split = merge(recipe, tmp_path / "whole"), merge(small, tmp_path / "split")
    assert len(list(split.glob("expert-math.0000?.safetensors"))) == 5  # nine tensors of 24,576 bytes, two a shard
    ours, theirs = Checkpoint(whole), Checkpoint(split)
    assert list(ours.weight_map) == list(theirs.weight_map)
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.weight_map)
    assert read_json(split / INDEX)["metadata"] == read_json(whole / INDEX)["metadata"]


def test_the_config_spells_rope_both_ways(fused: Path) -> None:
    config = read_json(fused / "config.json")
    assert config["rope_theta"] == 1e6
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert config["shared_expert_intermediate_size"] == 0
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert "auto_map" not in config


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_yarn_of_the_anchor_reaches_transformers(tmp_path: Path, anchor: Path, spelling: str) -> None:
    copy = Path(shutil.copytree(anchor, tmp_path / "yarn"))
    config = read_json(copy / "config.json")
    yarn = {"factor": 4.0, "original_max_position_embeddings": 128}
    del config["rope_parameters"]
    if spelling == "old":
        config |= {"rope_theta": 1e5, "rope_scaling": {"type": "yarn", **yarn}}
    else:
        config |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, **yarn}}
    write_json(copy / "config.json", config)
    fused = merge(make_recipe(tmp_path, copy, {"general": copy, "math": copy}))
    found = AutoConfig.from_pretrained(fused).rope_parameters
    assert (found["rope_type"], found["rope_theta"], found["factor"]) == ("yarn", 1e5, 4.0)
    with torch.no_grad():
        difference = loaded(fused)[0](IDS).logits - loaded(copy)[0](IDS).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("given", [None, {"max_new_tokens": 20, "max_length": 30, "temperature": 0.7}])
def test_the_generation_config_limits_no_length(tmp_path: Path, anchor: Path, given: dict[str, Any] | None) -> None:
    copy = Path(shutil.copytree(anchor, tmp_path / "copy"))
    (copy / "generation_config.json").unlink(missing_ok=True)
    if given:
        write_json(copy / "generation_config.json", {**given, "eos_token_id": 258})
    config = read_json(merge(make_recipe(tmp_path, copy, {"general": copy, "math": copy})) / "generation_config.json")
    assert not {"max_new_tokens", "max_length"} & set(config)
    assert config["eos_token_id"] == 258
    assert config.get("temperature") == (0.7 if given else None)


def test_layers_that_are_left_out_keep_the_anchors_mlp(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    folder = merge(make_recipe(tmp_path, anchor, anchored_experts, routing={"moe_layers": [1]}))
    assert read_json(folder / "config.json")["mlp_only_layers"] == [0, 2]
    fused, dense = Checkpoint(folder), Checkpoint(anchor)
    for name in filter(is_mlp, dense.weight_map):
        assert (name in fused) == (layer_of(name) != 1)
        assert (expert_tensor(name, 2) in fused) == (layer_of(name) == 1)
        if name in fused:
            assert torch.equal(fused.tensor(name), dense.tensor(name))
    model, info = loaded(folder)
    assert not info["unexpected_keys"]
    assert all(model.get_parameter(name).numel() == 0 for name in info["missing_keys"])


@pytest.mark.parametrize("layers", [[3], [0, 7]])
def test_layers_that_the_anchor_lacks_are_refused(tmp_path: Path, anchor: Path, layers: list[int]) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor}, routing={"moe_layers": layers})
    for step in (road.plan, road.merge, merge):
        with pytest.raises(UserError, match=r"routing\.moe_layers"):
            step(recipe)
    assert not recipe.fused.exists()


@pytest.mark.parametrize("named", ["anchor", "math", "another"])
def test_a_named_shared_expert(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], drifted_experts: dict[str, Path], named: str
) -> None:
    other = drifted_experts["coding"]
    source = {"anchor": anchor, "math": anchored_experts["math"], "another": other}[named]
    shared_expert = str(other) if named == "another" else named
    folder = merge(make_recipe(tmp_path, anchor, anchored_experts, routing={"shared_expert": shared_expert}))
    fused, dense = Checkpoint(folder), Checkpoint(source)
    assert fused.config["shared_expert_intermediate_size"] == 96
    for name in filter(is_mlp, dense.weight_map):
        assert torch.equal(fused.tensor(shared_expert_tensor(name)), dense.tensor(name))
    _, info = loaded(folder)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


def test_the_manifest_tells_anchored_from_drifted(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], drifted_experts: dict[str, Path]
) -> None:
    experts = {"general": anchor, "math": anchored_experts["math"], "coding": drifted_experts["coding"]}
    folder = merge(make_recipe(tmp_path, anchor, experts))
    manifest = read_json(folder / MANIFEST)
    assert [expert["anchored"] for expert in manifest["experts"]] == [True, True, False]
    first, second, third = (expert["differs_at"] for expert in manifest["experts"])
    assert first is None and second is None and third in Checkpoint(anchor).weight_map and not is_mlp(third)
    for file, digest in manifest["sha256"].items():
        assert file_hash(folder / file) == digest
    assert len(manifest["sha256"]) == 4
    assert manifest["versions"].keys() == {"qwen-fusion", "mergekit", "torch", "transformers"}


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), tail=st.integers(1, 30))
def test_of_a_shared_tensor_pages_and_the_end_are_compared(sizes: list[int], tail: int) -> None:
    page, stride, count = 3, 10, sum(sizes)
    with patch.multiple(merge_module, PAGE=page, STRIDE=stride, TAIL=tail):
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        spans = [span for b, size in zip(begins, sizes, strict=True) for span in _looked_at(b, b + size, count)]
    seen = [number for first, last in spans for number in range(first, last)]
    assert seen == sorted(set(seen)) and set(seen) <= set(range(count))
    assert set(range(max(0, count - tail), count)) <= set(seen)
    for begin, size in zip(begins, sizes, strict=True):
        for start in range(begin, begin + size, stride):
            assert start in seen


def test_a_changed_row_of_the_embeddings_is_found(tmp_path: Path, anchor: Path) -> None:
    other = Path(shutil.copytree(anchor, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1, 3] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    folder = merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": other}))
    assert read_json(folder / MANIFEST)["experts"][1]["differs_at"] == "model.embed_tokens.weight"


def test_the_model_card_names_each_expert_with_its_own_hash(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": write_model(tmp_path / "b", 2, anchor)})
    second = recipe.experts[1].model_copy(
        update={"name": "general-2", "model": str(write_model(tmp_path / "c", 3, anchor)), "license": "mit"}
    )
    folder = merge(recipe.model_copy(update={"experts": (*recipe.experts, second), "license": "apache-2.0"}))
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"
    assert all(f"- {name}: " in card for name in recipe.domains)
    rows = {line.split("|")[1].strip(): line for line in card.splitlines() if line.startswith("| ")}
    for name in ("general", "math", "general-2"):
        assert file_hash(folder / f"expert-{name}.safetensors")[:16] in rows[name]
    assert "mit" in rows["general-2"]
    assert "not stated" in rows["math"]


def test_the_equivalent_mergekit_config_parses(fused: Path, anchor: Path, anchored_experts: dict[str, Path]) -> None:
    config = MoEMergeConfig.model_validate(yaml.safe_load((fused / "mergekit_moe_config.yml").read_text()))
    assert config.base_model.model.path == str(anchor)
    assert [e.source_model.model.path for e in config.experts] == [str(p) for p in anchored_experts.values()]
    assert (config.gate_mode, config.dtype, config.experts_per_token) == ("random", "float32", 1)


def test_the_tokenizer_and_its_template_come_along(fused: Path) -> None:
    messages = [{"role": "user", "content": "Wie geht's? 你好"}]
    ours, theirs = AutoTokenizer.from_pretrained(fused), byte_tokenizer()
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours("你好")["input_ids"] == theirs("你好")["input_ids"]


def test_merging_again_gives_the_same_bytes(
    tmp_path: Path, fused: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    again = merge(make_recipe(tmp_path, anchor, anchored_experts))
    for path in fused.glob("*.safetensors"):
        assert file_hash(path) == file_hash(again / path.name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_anchors_dtype_is_kept(tmp_path: Path, dtype: str) -> None:
    anchor = write_model(tmp_path / "anchor", seed=1)
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=getattr(torch, dtype))
    model.save_pretrained(anchor)
    fused = Checkpoint(merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})))
    assert fused.config["torch_dtype"] == dtype
    assert {fused.tensor(name).dtype for name in fused.weight_map} == {getattr(torch, dtype)}


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_last_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [truncate, drop_last_tensor, drop_config])
@pytest.mark.parametrize("checked", [True, False], ids=["road", "merge"])
def test_a_failing_merge_leaves_nothing(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], damage: Any, checked: bool
) -> None:
    broken = Path(shutil.copytree(anchored_experts["math"], tmp_path / "broken"))
    damage(broken)
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": broken})
    # the road looks before it merges; the merge itself may only fail, and must clean up
    with pytest.raises(UserError if checked else Exception, match="broken" if checked else ""):
        (road.merge if checked else merge)(recipe)
    assert not recipe.folder.exists() or not [path for path in recipe.folder.iterdir() if path.is_dir()]


def test_a_failing_merge_leaves_the_one_before(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> None:
    broken = Path(shutil.copytree(anchored_experts["math"], tmp_path / "broken"))
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": broken})
    before = {path.name: file_hash(path) for path in merge(recipe).iterdir()}
    drop_last_tensor(broken)
    with pytest.raises(UserError):
        merge(recipe)
    assert {path.name: file_hash(path) for path in recipe.fused.iterdir()} == before
    assert [path.name for path in recipe.folder.iterdir()] == ["fused"]


@pytest.mark.parametrize(
    "shape",
    [{"hidden_size": 128}, {"intermediate_size": 128}, {"num_hidden_layers": 2}, {"num_key_value_heads": 1}],
    ids=str,
)
def test_an_expert_of_another_shape_is_refused(tmp_path: Path, anchor: Path, shape: dict[str, int]) -> None:
    other = write_model(tmp_path / "other", seed=3, **shape)
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": other})
    key = next(iter(shape))
    for step in (road.plan, road.merge):
        with pytest.raises(UserError, match=f"expert 'math': {key} is {shape[key]}, the anchor's is"):
            step(recipe)
    assert not recipe.fused.exists()


@pytest.mark.parametrize("damage", [None, truncate], ids=["shape", "truncated"])
def test_a_shared_expert_that_does_not_fit_is_refused(tmp_path: Path, anchor: Path, damage: Any) -> None:
    other = write_model(tmp_path / "other", seed=3, intermediate_size=96 if damage else 128)
    if damage:
        damage(other)
    experts = {"general": anchor, "math": anchor}
    recipe = make_recipe(tmp_path, anchor, experts, routing={"shared_expert": str(other)})
    with pytest.raises(UserError):
        road.merge(recipe)
    assert not recipe.fused.exists()


def test_a_model_of_another_architecture_is_refused(tmp_path: Path, anchor: Path) -> None:
    other = Path(shutil.copytree(anchor, tmp_path / "other"))
    write_json(other / "config.json", {**read_json(other / "config.json"), "model_type": "llama"})
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": other})
    for step in (road.merge, merge):
        with pytest.raises(UserError):
            step(recipe)
    assert not recipe.fused.exists()


def test_experts_in_folders_with_odd_names(tmp_path: Path, anchor: Path) -> None:
    odd = write_model(tmp_path / "a+b@c d 数学", seed=5, anchor=anchor)
    folder = merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": odd}))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(Checkpoint(folder).tensor(expert_tensor(name, 1)), Checkpoint(odd).tensor(name))


def test_experts_are_read_from_index_and_shards(tmp_path: Path, anchor: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    byte_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    folder = merge(make_recipe(tmp_path, anchor, {"general": anchor, "math": tmp_path / "sharded"}))
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [expert["anchored"] for expert in manifest["experts"]] == [True, True]
