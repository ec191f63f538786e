"""Preflight: sizes on the meta device, and each finding from a pair of checkpoints that differ in that alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fusion import road
from fusion.checkpoint import read_json, write_json
from fusion.errors import UserError
from fusion.plan.budget import budget
from fusion.plan.preflight import Finding, check, describe_anchor, raise_on_error
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.sources import ModelSource, load_model, trained_anchor
from tests.families import write_model
from tests.recipes import make_recipe, recipe_data

CONFIGS = Path(__file__).parents[2] / "configs"
B7 = 203.6e6 * 28  # one 7B expert's MLPs


@pytest.fixture
def other(tmp_path: Path, anchor: Path) -> Path:
    """A copy of the anchor that a test may change."""
    return Path(shutil.copytree(anchor, tmp_path / "other"))


def change_config(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


def findings(folder: Path, anchor: Path, other: Path, **sections: Any) -> list[Finding]:
    return check(make_recipe(folder, anchor, {"general": anchor, "math": other}, **sections))


def errors(found: list[Finding]) -> list[str]:
    return [finding.sentence() for finding in found if finding.severity == "error"]


@pytest.mark.parametrize(
    ("name", "parameters", "gigabytes_per_card", "kv_bytes_per_card", "active"),
    [
        ("qwen2.5-7b-five-experts", 30.4e9, 15.2, 14_336, 30.4e9 - 4 * B7),
        ("qwen2.5-7b-two-experts", 13.3e9, 13.3, 28_672, 13.3e9 - B7),
    ],
)
def test_the_7b_recipes_have_the_known_sizes(
    name: str, parameters: float, gigabytes_per_card: float, kv_bytes_per_card: int, active: float
) -> None:
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    sizes = budget(recipe, describe_anchor(recipe).config)
    assert sizes.parameters == pytest.approx(parameters, abs=0.1e9)
    assert sizes.active_parameters == pytest.approx(active, abs=0.1e9)
    assert sizes.bytes == 2 * sizes.parameters
    assert sizes.bytes_per_card / 1e9 == pytest.approx(gigabytes_per_card, abs=0.1)
    assert sizes.kv_bytes_per_token == 57_344
    assert sizes.kv_bytes_per_token_per_card == kv_bytes_per_card
    assert not errors(check(recipe))


def test_a_shared_expert_costs_one_more_expert() -> None:
    recipe = load_recipe(CONFIGS / "qwen2.5-7b-five-experts.yaml", ["routing.shared_expert=anchor"])
    sizes = budget(recipe, describe_anchor(recipe).config)
    assert sizes.parameters == pytest.approx(36.1e9, abs=0.1e9)
    assert sizes.active_parameters == pytest.approx(36.1e9 - 4 * B7, abs=0.1e9)


def test_the_long_variant_of_the_target_needs_yarn() -> None:
    path = CONFIGS / "qwen2.5-7b-five-experts.yaml"
    assert not errors(check(load_recipe(path, ["serving.max_model_len=131072", "serving.yarn_factor=4"])))
    assert errors(check(load_recipe(path, ["serving.max_model_len=131072"]))) == [
        "serving.max_model_len: 131072 is beyond the anchor's 32768 positions; lower it, or set serving.yarn_factor"
    ]


def test_math_without_anchoring_is_an_error_because_of_its_rope_theta() -> None:
    recipe = load_recipe(CONFIGS / "qwen2.5-7b-five-experts.yaml", ["experts.math.anchor=null"])
    (error,) = errors(check(recipe))
    assert error.startswith("expert 'math': rope_theta is 10000, the anchor's is 1e+06")


def test_the_budget_of_a_tiny_model_is_what_the_merge_writes(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    routing = {"moe_layers": [0, 2], "top_k": 2}
    recipe = make_recipe(tmp_path, anchor, anchored_experts, routing=routing)
    sizes = budget(recipe, describe_anchor(recipe).config)
    road.merge(recipe)
    tensors = [t for path in recipe.fused.glob("*.safetensors") for t in load_file(path).values()]
    assert sizes.parameters == sum(tensor.numel() for tensor in tensors)
    assert sizes.bytes == sum(tensor.nbytes for tensor in tensors)
    assert sizes.active_parameters == sizes.parameters - 2 * 3 * 64 * 96


def test_a_fitting_pair_has_no_findings(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> None:
    assert findings(tmp_path, anchor, anchored_experts["math"]) == []


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_another_rope_theta_is_an_error_in_either_spelling(
    tmp_path: Path, anchor: Path, other: Path, spelling: str
) -> None:
    def respell(theta: float) -> None:
        config = read_json(other / "config.json")
        config.pop("rope_parameters", None)
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        write_json(other / "config.json", {**config, **({"rope_theta": theta} if spelling == "old" else rope)})

    respell(1e6)
    assert findings(tmp_path, anchor, other) == []
    respell(1e4)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert error.startswith("expert 'math': rope_theta is 10000")


def test_ways_must_divide_the_heads(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> None:
    serving = {"max_model_len": 256, "sampling": {"max_tokens": 32}, "tensor_parallel_size": 3}
    found = errors(check(make_recipe(tmp_path, anchor, anchored_experts, serving=serving)))
    assert found == ["serving.tensor_parallel_size: 3 does not divide the anchor's num_attention_heads 2"]


def test_another_id_for_the_same_token_is_an_error(tmp_path: Path, anchor: Path, other: Path) -> None:
    assert findings(tmp_path, anchor, other) == []
    data = read_json(other / "tokenizer.json")
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    write_json(other / "tokenizer.json", data)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "expert 'math': its tokenizer gives 'a' id" in error or "its tokenizer gives 'b' id" in error


def test_tokens_that_the_anchor_lacks_are_a_warning(tmp_path: Path, anchor: Path, other: Path) -> None:
    data = read_json(other / "tokenizer.json")
    data["added_tokens"].append({**data["added_tokens"][0], "id": 259, "content": "<tool>"})
    write_json(other / "tokenizer.json", data)
    (finding,) = findings(tmp_path, anchor, other)
    assert finding.severity == "warning"
    assert "1 tokens that the anchor's lacks" in finding.what


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_another_shape_is_an_error(tmp_path: Path, anchor: Path, key: str) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}[key]
    (error, *_) = errors(findings(tmp_path, anchor, write_model(tmp_path / "other", **{key: shape})))
    assert error.startswith(f"expert 'math': {key} is {shape}, the anchor's is ")


def test_a_config_that_lies_about_its_tensors_is_an_error(tmp_path: Path, anchor: Path) -> None:
    other = write_model(tmp_path / "other", intermediate_size=128)
    change_config(other, intermediate_size=96)
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "in the anchor" in error
    assert "128" in error


def test_a_missing_tensor_is_an_error(tmp_path: Path, anchor: Path, other: Path) -> None:
    tensors = load_file(other / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, other / "model.safetensors")
    (error,) = errors(findings(tmp_path, anchor, other))
    assert "lacks tensor model.layers.1.self_attn.k_proj.bias" in error


def test_quantised_and_foreign_checkpoints_are_errors(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_config(other, quantization_config={"bits": 4})
    assert errors(findings(tmp_path, anchor, other))[0].startswith("expert 'math': the checkpoint is quantised")
    config = read_json(other / "config.json")
    del config["quantization_config"]
    write_json(other / "config.json", {**config, "model_type": "llama"})
    assert errors(findings(tmp_path, anchor, other))[0].startswith("expert 'math': is a 'llama' model")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"), ({"max_position_embeddings": 128}, "at most 128 positions")],
    ids=str,
)
def test_what_costs_quality_is_a_warning(
    tmp_path: Path, anchor: Path, other: Path, changes: dict[str, Any], words: str
) -> None:
    change_config(other, **changes)
    (finding,) = findings(tmp_path, anchor, other)
    assert finding.severity == "warning"
    assert words in finding.what


@pytest.mark.parametrize(("licence", "warned"), [("mit", False), ("cc-by-nc-4.0", True), ("qwen-research", True)])
def test_a_non_commercial_licence_is_a_warning(tmp_path: Path, anchor: Path, licence: str, warned: bool) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    expert = recipe.experts[1].model_copy(update={"license": licence})
    found = check(recipe.model_copy(update={"experts": (recipe.experts[0], expert)}))
    assert [finding.severity for finding in found] == (["warning"] if warned else [])


def test_errors_come_first_and_stop_the_plan(tmp_path: Path, anchor: Path, other: Path) -> None:
    change_config(other, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": other})
    assert [finding.severity for finding in check(recipe)] == ["error", "warning"]
    with pytest.raises(UserError, match="rope_theta"):
        road.plan(recipe)


def test_a_plan_is_plain_data_and_reads_no_weights(tmp_path: Path, anchor: Path, other: Path) -> None:
    path = other / "model.safetensors"
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:header] + bytes(size - header))  # the tensors are zeros now
    result = road.plan(make_recipe(tmp_path, anchor, {"general": anchor, "math": other}))
    assert json.loads(json.dumps(result)) == result
    assert result["findings"] == []
    assert result["budget"]["bytes"] == 4 * result["budget"]["parameters"]


def test_a_model_that_is_nowhere_is_an_error(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": tmp_path / "nowhere"})
    (error,) = errors(check(recipe))
    assert error.startswith("expert 'math': model '") and "nowhere" in error


@pytest.mark.parametrize(
    ("said", "override"),
    [
        ("serving.tensor_parallel_size: 3 does not divide", "serving.tensor_parallel_size=3"),
        ("serving.max_model_len: 131072 is beyond", "serving.max_model_len=131072"),
        ("routing.moe_layers: names layer [99]", "routing.moe_layers=[99]"),
        ("expert 'math': model 'nowhere' is neither", "experts.math={name: math, domain: math, model: nowhere}"),
    ],
)
def test_an_error_names_the_override_that_it_is_about(said: str, override: str) -> None:
    recipe = load_recipe(CONFIGS / "qwen2.5-7b-five-experts.yaml", [override])
    with pytest.raises(UserError) as caught:
        raise_on_error(recipe, check(recipe))
    assert str(caught.value).startswith(f"--set {override}: {said}")


def test_an_error_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    lines = (CONFIGS / "qwen2.5-7b-five-experts.yaml").read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(lines) if "max_model_len:" in line)
    lines[number] = "  max_model_len: 131072"
    path.write_text("\n".join(lines), encoding="utf-8")
    recipe = load_recipe(path)
    with pytest.raises(UserError, match=rf"recipe.yaml, line {number + 1}: serving.max_model_len: 131072 is beyond"):
        raise_on_error(recipe, check(recipe))


def test_an_adapter_that_is_pickled_is_an_error(tmp_path: Path, anchor: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.bin").write_bytes(b"x")
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    data["experts"][1]["adapter"] = str(adapter)
    assert any("pickled adapters are not read" in error for error in errors(check(Recipe.model_validate(data))))
    with pytest.raises(UserError, match="pickled adapters are not read"):
        load_model(ModelSource("math", anchor, adapter))


def test_an_anchor_to_be_trained_is_planned_from_its_section(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    data = recipe.model_dump(mode="json", exclude_unset=True)
    branch = {"data": {"generated": "demo.math"}}
    data["anchor"] = {"pretrain": {"data": {"generated": "demo.anchor"}, "hidden_size": 64}}
    data["experts"] = [{"name": e["name"], "domain": e["domain"], "branch": branch} for e in data["experts"]]
    planned = Recipe.model_validate(data)
    assert describe_anchor(planned).config["hidden_size"] == 64
    older = trained_anchor(planned)
    older.mkdir(parents=True)
    (older / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 32}))
    assert describe_anchor(planned).config["hidden_size"] == 64  # an older run's anchor will be trained again
    assert describe_anchor(planned, trained=True).config["hidden_size"] == 32
    assert [finding.severity for finding in check(planned)] == ["note", "note"]


def test_an_anchor_of_another_architecture_is_one_error(tmp_path: Path, anchor: Path, other: Path) -> None:
    foreign = Path(shutil.copytree(anchor, tmp_path / "foreign"))
    (foreign / "config.json").write_text('{"model_type": "gpt2"}')
    assert errors(findings(tmp_path, foreign, other)) == [
        "anchor: is a 'gpt2' model; only Qwen2-architecture models are fused"
    ]
    (foreign / "config.json").write_text('{"model_type": "qwen2"}')
    assert errors(findings(tmp_path, foreign, other)) == [
        "anchor: its config.json has no hidden_size; download it again"
    ]
    (foreign / "config.json").write_text("[]")
    assert "holds no model config" in errors(findings(tmp_path, foreign, other))[0]


def test_an_anchor_that_cannot_read_a_chat_is_an_error(tmp_path: Path, anchor: Path, other: Path) -> None:
    mute = Path(shutil.copytree(anchor, tmp_path / "mute"))
    (mute / "chat_template.jinja").unlink()
    assert any("has no chat template" in error for error in errors(findings(tmp_path, mute, other)))
    (mute / "tokenizer.json").unlink()
    assert any("has no tokenizer.json" in error for error in errors(findings(tmp_path, mute, other)))


def test_a_broken_tokenizer_is_a_user_error(tmp_path: Path, anchor: Path, other: Path) -> None:
    (other / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        findings(tmp_path, anchor, other)


def test_data_that_are_not_there_are_told_by_the_plan(tmp_path: Path, anchor: Path, other: Path) -> None:
    extra = {"extra": {"more": {"path": str(tmp_path / "nowhere.jsonl")}}}
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": other}, evaluation=extra)
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        road.plan(recipe)
