"""LoRA adapters applied while reading, against PEFT's own merge, and through the MoE merge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from fusion.adapter import Adapter
from fusion.architecture import MANIFEST, MLP_PARTS, expert_tensor, is_mlp
from fusion.checkpoint import Checkpoint, write_json
from fusion.errors import UserError
from fusion.merge import merge
from fusion.reader import Reader
from fusion.recipe import Recipe
from fusion.sources import ModelSource
from tests.families import write_model
from tests.recipes import recipe_data

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(folder: Path, base: Path, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Saves a random PEFT adapter of `base` in `folder`; returns the tensors that PEFT's own merge makes of the two."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [*MLP_PARTS, *ATTENTION_PARTS]}
    config = LoraConfig(**{**settings, **changes}, init_lora_weights=False)
    get_peft_model(Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32), config).save_pretrained(folder)
    model = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 1},
        {"r": 4, "lora_alpha": 16},
        {"r": 32, "lora_alpha": 3},
        {"r": 16, "lora_alpha": 8, "use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        {"alpha_pattern": {r"model\.layers\.[01]\.mlp\.down_proj": 40, "down_proj": 5}},
        {"target_modules": ["down_proj"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_every_tensor_equals_pefts_merge(tmp_path: Path, anchor: Path, changes: dict[str, Any]) -> None:
    expected = write_adapter(tmp_path / "adapter", anchor, **changes)
    read = Reader(ModelSource("own", anchor, tmp_path / "adapter"))
    plain = Checkpoint(anchor)
    touched = 0
    for name in plain.weight_map:
        assert torch.allclose(read.tensor(name), expected[name], atol=1e-6, rtol=0), name
        touched += not torch.equal(read.tensor(name), plain.tensor(name))
    assert touched == len(Adapter(tmp_path / "adapter").targets) > 0


def test_the_update_keeps_the_dtype_of_the_weight(tmp_path: Path, anchor: Path) -> None:
    expected = write_adapter(tmp_path / "adapter", anchor)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = Checkpoint(anchor).tensor(name).bfloat16()
    updated = Adapter(tmp_path / "adapter").apply(name, weight)
    assert updated.dtype == torch.bfloat16
    assert torch.allclose(updated.float(), expected[name], atol=0.02)
    assert Adapter(tmp_path / "adapter").apply("model.norm.weight", weight) is weight


def adapter_recipe(folder: Path, anchor: Path, adapters: dict[str, Path | None]) -> Recipe:
    """Experts that are all the anchor, each with its own adapter (None: without)."""
    data = recipe_data(folder, anchor, dict.fromkeys(adapters, anchor))
    for expert in data["experts"]:
        if adapters[expert["name"]]:
            expert["adapter"] = str(adapters[expert["name"]])
    return Recipe.model_validate(data)


def test_two_adapters_on_one_base_become_two_experts(tmp_path: Path, anchor: Path) -> None:
    merged = {
        "math": write_adapter(tmp_path / "first", anchor, seed=1, target_modules=list(MLP_PARTS)),
        "coding": write_adapter(tmp_path / "second", anchor, seed=2),
    }
    recipe = adapter_recipe(
        tmp_path, anchor, {"general": None, "math": tmp_path / "first", "coding": tmp_path / "second"}
    )
    fused = Checkpoint(merge(recipe))
    plain = Checkpoint(anchor)
    for number, (expert, adapter) in enumerate([("general", None), ("math", "first"), ("coding", "second")]):
        read = Reader(ModelSource("own", anchor, tmp_path / adapter if adapter else None))
        for name in filter(is_mlp, plain.weight_map):
            tensor = fused.tensor(expert_tensor(name, number))
            assert torch.equal(tensor, read.tensor(name)), name
            assert torch.allclose(tensor, merged[expert][name] if adapter else plain.tensor(name), atol=1e-6), name
    for name in plain.weight_map:
        if not is_mlp(name):
            assert torch.equal(fused.tensor(name), plain.tensor(name)), name
    manifest = json.loads((fused.folder / MANIFEST).read_text())
    named = [None, str(tmp_path / "first"), str(tmp_path / "second")]
    assert [e["anchored"] for e in manifest["experts"]] == [True, True, False]
    assert [e["adapter"] for e in manifest["experts"]] == named
    assert ".self_attn." in manifest["experts"][2]["differs_at"]


def test_an_adapter_on_an_expert_that_is_not_the_anchor(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    expected = write_adapter(tmp_path / "adapter", anchored_experts["math"], target_modules=list(MLP_PARTS))
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchored_experts["math"]})
    data["experts"][1]["adapter"] = str(tmp_path / "adapter")
    fused = Checkpoint(merge(Recipe.model_validate(data)))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(fused.tensor(expert_tensor(name, 1)), expected[name], atol=1e-6)


@pytest.mark.parametrize("shape", [{"hidden_size": 128}, {"intermediate_size": 128}, {"num_hidden_layers": 4}], ids=str)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, anchor: Path, shape: dict[str, int]) -> None:
    write_adapter(tmp_path / "adapter", write_model(tmp_path / "other", **shape))
    recipe = adapter_recipe(tmp_path, anchor, {"general": None, "math": tmp_path / "adapter"})
    with pytest.raises(UserError, match="adapter"):
        merge(recipe)
    assert not recipe.fused.exists()


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused(tmp_path: Path, anchor: Path, changes: dict[str, Any]) -> None:
    write_adapter(tmp_path / "adapter", anchor, **changes)
    with pytest.raises(UserError, match="merge it with PEFT first"):
        Reader(ModelSource("own", anchor, tmp_path / "adapter"))


def test_an_adapter_with_half_a_pair_is_refused(tmp_path: Path, anchor: Path) -> None:
    write_adapter(tmp_path / "adapter", anchor)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path)
    with pytest.raises(UserError, match=f"holds no {gone}"):
        Reader(ModelSource("own", anchor, tmp_path / "adapter"))


def test_a_broken_adapter_folder_is_a_user_error(tmp_path: Path, anchor: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(UserError, match=r"adapter_config\.json does not exist"):
        Adapter(folder)
    write_adapter(folder, anchor)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        Adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled adapters are not read"):
        Adapter(folder)
    write_json(folder / "adapter_config.json", {"peft_type": "IA3"})
    with pytest.raises(UserError, match="no plain LoRA adapter"):
        Adapter(folder)
