"""Drifted experts: told by a small sample with how far they have moved, and by what an adapter changes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion import drift
from fusion.checkpoint import write_json
from fusion.drift import by_group, moved_by_group, sampled
from fusion.plan.findings import Finding
from fusion.plan.preflight import check
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.source_weights import Weights
from fusion.sources import ModelSource, load_model
from tests.families import write_model
from tests.fusion.plan.planning import change_config, change_tensors, errors, findings
from tests.fusion.plan.test_configs import FIVE
from tests.fusion.test_adapter import write_adapter
from tests.recipes import recipe_data


def test_a_drifted_expert_is_a_warning_with_its_drift(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path], anchored_experts: dict[str, Path]
) -> None:
    assert findings(tmp_path, anchor, anchored_experts["math"]) == []
    (finding,) = findings(tmp_path, anchor, drifted_experts["math"])
    assert finding.severity == "warning"
    assert finding.what.startswith("has moved outside its MLPs: attention 0.") and "by a sample of" in finding.what
    assert "drift: merged as they are" in finding.why and "--weights" in finding.fix


@pytest.mark.parametrize("sections", [{"shared": "mean"}, {"shared": "auto"}, {"heal": {}}], ids=str)
def test_where_the_recipe_reckons_with_drift_it_is_a_note(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path], sections: dict[str, Any]
) -> None:
    (finding,) = findings(tmp_path, anchor, drifted_experts["math"], **sections)
    assert finding.severity == "note" and "has moved outside its MLPs" in finding.what


def test_an_expert_with_an_anchor_section_is_not_measured(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion.plan.preflight.sampled", None)
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": drifted_experts["math"]})
    data["experts"][1]["anchor"] = {"method": "logits", "data": data["domains"]["math"]["train"]}
    (note,) = check(Recipe.model_validate(data))
    assert note.severity == "note" and "is led back to the anchor" in note.what


def test_the_sample_is_of_the_size_of_the_whole(tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]) -> None:
    pair = ModelSource("anchor", anchor), ModelSource("math", drifted_experts["math"])
    rows, read = sampled(*pair)
    found = by_group(rows)
    whole = moved_by_group(*pair)
    assert list(found) == ["attention", "norms", "embeddings"]
    for group, moved in found.items():
        assert moved.distance == pytest.approx(whole[group].distance, rel=0.25), group
    assert 0 < read < Weights(pair[1]).nbytes / 10


@pytest.mark.parametrize("part", ["q_proj.weight", "o_proj.weight", "v_proj.bias", "layernorm.weight", "embed_tokens"])
def test_the_sample_sees_each_part_that_training_moves(tmp_path: Path, anchor: Path, other: Path, part: str) -> None:
    assert findings(tmp_path, anchor, other) == []
    change_tensors(other, lambda name, tensor: tensor * 1.01 if part in name else tensor)
    (finding,) = findings(tmp_path, anchor, other)
    assert "has moved outside its MLPs" in finding.what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_saving_in_another_dtype_has_rounded_is_no_drift(
    tmp_path: Path, anchor: Path, other: Path, dtype: torch.dtype
) -> None:
    change_tensors(other, lambda name, tensor: tensor.to(dtype))
    change_config(other, dtype=str(dtype).removeprefix("torch."))
    assert not any("moved outside" in finding.what for finding in findings(tmp_path, anchor, other))
    for pair in ((anchor, other), (other, anchor)):
        sources = [ModelSource(str(number), folder) for number, folder in enumerate(pair)]
        assert drift.outside(moved_by_group(*sources)) == drift.outside(by_group(sampled(*sources)[0])) == 0
    change_tensors(other, lambda name, tensor: tensor * 1.02)
    assert any("moved outside" in finding.what for finding in findings(tmp_path, anchor, other))


@pytest.mark.parametrize("broken", ["anchor", "expert 'math'"])
def test_values_that_are_not_finite_in_the_sample_are_an_error(
    tmp_path: Path, anchor: Path, other: Path, broken: str
) -> None:
    change_tensors(other, lambda name, tensor: tensor * float("nan") if name == "model.norm.weight" else tensor)
    (error,) = errors(findings(tmp_path, *((other, anchor) if broken == "anchor" else (anchor, other))))
    assert error.startswith(f"{broken}: 64 values in tensor model.norm.weight are not finite")


def test_an_expert_that_is_not_here_is_warned_of_as_drifted() -> None:
    def told(*overrides: str) -> list[str]:
        found = check(load_recipe(FIVE, overrides))
        return [f"{f.severity} {f.where}" for f in found if "is a fine-tune of its own" in f.what]

    without = ["experts.coding.anchor=null", "experts.coding.model=Qwen/Qwen2.5-Coder-7B-Instruct"]
    assert told() == told("experts.coding.anchor=null", "experts.coding.model=qwen/Qwen2.5-7B-Instruct") == []
    assert told(*without) == ["warning expert 'coding'"]
    assert told(*without, "shared=mean") == told(*without, "heal={}") == ["note expert 'coding'"]


@pytest.mark.parametrize(
    ("by", "strength"),
    [(0.0, "anchored"), (0.5 * drift.LIGHT_DRIFT, "light"), (2 * drift.LIGHT_DRIFT, "medium"), (0.3, "strong")],
)
def test_how_strong_a_drift_is(tmp_path: Path, anchor: Path, other: Path, by: float, strength: str) -> None:
    change_tensors(other, lambda name, tensor: tensor if ".mlp." in name else tensor * (1 + by))
    moved = moved_by_group(ModelSource("anchor", anchor), ModelSource("math", other))
    assert drift.outside(moved) == pytest.approx(by, abs=1e-6)
    assert drift.strength(moved) == strength
    assert drift.chance(moved).startswith(strength)


def on_adapter(folder: Path, anchor: Path, adapter: Path | str, **expert: Any) -> list[Finding]:
    data = recipe_data(folder, anchor, {"general": anchor, "math": anchor})
    data["experts"][1] |= {"adapter": str(adapter), **expert}
    return check(Recipe.model_validate(data))


def test_an_adapter_of_mlps_alone_has_no_findings(tmp_path: Path, anchor: Path) -> None:
    write_adapter(tmp_path / "adapter", anchor, target_modules=["up_proj", "down_proj"])
    assert on_adapter(tmp_path, anchor, tmp_path / "adapter") == []
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n", encoding="utf-8")
    (finding,) = on_adapter(tmp_path, anchor, tmp_path / "adapter")
    assert finding.severity == "warning" and "cc-by-nc-4.0 is not for commercial use" in finding.what


def test_an_adapter_that_changes_attention_is_drifted(tmp_path: Path, anchor: Path) -> None:
    write_adapter(tmp_path / "adapter", anchor, target_modules=["up_proj", "q_proj"])
    (finding,) = on_adapter(tmp_path, anchor, tmp_path / "adapter")
    assert finding.severity == "warning" and "changes 3 tensors outside the MLPs" in finding.what
    assert "only its MLP part survives" in finding.why


@pytest.mark.parametrize("shape", [{"hidden_size": 128}, {"intermediate_size": 128}, {"num_hidden_layers": 4}], ids=str)
def test_an_adapter_of_another_shape_is_an_error_before_any_merge(
    tmp_path: Path, anchor: Path, shape: dict[str, int]
) -> None:
    write_adapter(tmp_path / "adapter", write_model(tmp_path / "model", **shape), target_modules=["up_proj"])
    (error,) = errors(on_adapter(tmp_path, anchor, tmp_path / "adapter"))
    assert "belongs to another base" in error


def test_an_adapter_is_checked_against_a_base_that_is_not_here(tmp_path: Path, anchor: Path) -> None:
    write_adapter(tmp_path / "adapter", anchor, target_modules=["up_proj"])
    found = on_adapter(tmp_path, anchor, tmp_path / "adapter", model="Qwen/Qwen2.5-7B-Instruct")
    assert any("the base model's tensor (18944, 3584)" in error for error in errors(found))


def test_an_adapter_that_names_another_base_is_a_warning(tmp_path: Path, anchor: Path) -> None:
    copy = Path(shutil.copytree(anchor, tmp_path / "Qwen2.5-7B-other"))
    write_adapter(tmp_path / "adapter", copy, target_modules=["up_proj"])
    (finding,) = on_adapter(tmp_path, anchor, tmp_path / "adapter")
    assert finding.severity == "warning" and "was made for" in finding.what and "Qwen2.5-7B-other" in finding.what


def test_an_adapter_that_is_not_here(tmp_path: Path, anchor: Path) -> None:
    (note,) = on_adapter(tmp_path, anchor, "someone/adapter")
    assert note.severity == "note" and "someone/adapter is not on this machine" in note.what
    (error,) = errors(on_adapter(tmp_path, anchor, tmp_path / "nowhere"))
    assert "nowhere" in error
    (tmp_path / "empty").mkdir()
    (error,) = errors(on_adapter(tmp_path, anchor, tmp_path / "empty"))
    assert "has no adapter_config.json" in error


def test_an_adapter_that_is_pickled_is_an_error(tmp_path: Path, anchor: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA"})
    (adapter / "adapter_model.bin").write_bytes(b"x")
    assert any("pickled adapters are not read" in error for error in errors(on_adapter(tmp_path, anchor, adapter)))
    with pytest.raises(Exception, match="pickled adapters are not read"):
        load_model(ModelSource("math", anchor, adapter))


def test_the_adapters_update_is_measured_with_the_rest(tmp_path: Path, anchor: Path) -> None:
    merged = write_adapter(tmp_path / "adapter", anchor, target_modules=["up_proj"])
    weights = Weights(ModelSource("math", anchor, tmp_path / "adapter"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(weights.part(name, 64, 128), merged[name].flatten()[64:128], atol=1e-6)
