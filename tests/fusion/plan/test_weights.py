"""The weights pass: every tensor measured, NaNs told, the figures written whole, memory bounded by a piece."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion.architecture import layer_of
from fusion.checkpoint import read_json
from fusion.drift import group_of
from fusion.errors import UserError
from fusion.plan.weights import measure
from fusion.recipe import Recipe
from tests.families import write_model
from tests.fusion.plan.planning import change_tensors
from tests.fusion.test_adapter import write_adapter
from tests.recipes import make_recipe, recipe_data


def test_every_layer_and_group_is_measured(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], drifted_experts: dict[str, Path]
) -> None:
    experts = {"general": anchor, "math": drifted_experts["math"], "coding": anchored_experts["coding"]}
    result = measure(make_recipe(tmp_path, anchor, experts), tmp_path / "out")
    assert {name: row["drift"] for name, row in result["experts"].items()} == {
        "general": "anchored",
        "math": result["experts"]["math"]["drift"],
        "coding": "anchored",
    }
    assert result["experts"]["math"]["drift"] in ("medium", "strong")
    old, new = (load_file(folder / "model.safetensors") for folder in (anchor, drifted_experts["math"]))
    for number, layer in enumerate(result["experts"]["math"]["layers"]):
        assert list(layer) == ["attention", "norms", "mlp"]
        for group, found in layer.items():
            names = [name for name in old if layer_of(name) == number and group_of(name) == group]
            ours, theirs = (torch.cat([held[name].flatten() for name in names]).double() for held in (old, new))
            assert found["distance"] == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-5)
            cosine = float(torch.cosine_similarity(ours, theirs, dim=0))
            assert found["cosine"] == pytest.approx(cosine, abs=1e-6)  # near 0 the tensors' float32 shows
    assert all(layer["attention"]["distance"] == 0 for layer in result["experts"]["coding"]["layers"])
    assert result["findings"] == []


def test_the_figures_are_written(tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": drifted_experts["math"]})
    result = measure(recipe, tmp_path / "out")
    assert read_json(tmp_path / "out" / "drift.json") == json.loads(json.dumps(result))
    text = (tmp_path / "out" / "drift.md").read_text(encoding="utf-8")
    assert "| expert | attention | norms | embeddings | mlp | layers, attention |" in text
    assert "- general: it is the anchor" in text and f"- math: {result['experts']['math']['verdict']}" in text
    assert (tmp_path / "out" / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["drift.json", "drift.md", "drift.png"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("broken", ["math", "anchor"])
def test_values_that_are_not_finite_are_errors(
    tmp_path: Path, anchor: Path, other: Path, value: float, broken: str
) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            tensor[3, 5] = value
        return tensor

    change_tensors(other, spoil)
    models = (anchor, other) if broken == "math" else (other, anchor)
    recipe = make_recipe(tmp_path, models[0], {"general": models[0], "math": models[1]})
    result = measure(recipe, tmp_path / "out")
    (finding,) = result["findings"]
    assert finding["severity"] == "error"
    assert finding["where"] == ("expert 'math'" if broken == "math" else "anchor")
    assert finding["what"] == "1 value in tensor model.layers.1.mlp.up_proj.weight is not finite"
    whose = "it" if broken == "math" else "the anchor"
    row = result["experts"]["math"]
    assert row["drift"] == "not finite" and row["verdict"].startswith(f"{whose} holds values that are not finite")
    assert "not finite" in (tmp_path / "out" / "drift.md").read_text(encoding="utf-8")
    assert result["experts"]["math"]["groups"]["attention"] == {"distance": 0.0, "cosine": 1.0}


def test_an_adapter_is_applied(tmp_path: Path, anchor: Path) -> None:
    write_adapter(tmp_path / "adapter", anchor, target_modules=["down_proj"])
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    data["experts"][1]["adapter"] = str(tmp_path / "adapter")
    row = measure(Recipe.model_validate(data), tmp_path / "out")["experts"]["math"]
    assert row["drift"] == "anchored" and row["groups"]["mlp"]["distance"] > 0


def test_experts_whose_weights_are_not_here_are_named(tmp_path: Path, anchor: Path) -> None:
    data = recipe_data(tmp_path, anchor, {"general": anchor, "math": anchor})
    data["experts"][1]["model"] = "Qwen/Qwen2.5-Math-7B-Instruct"
    result = measure(Recipe.model_validate(data), tmp_path / "out")
    assert result["experts"]["math"]["verdict"] == "its weights are not on this machine"
    data["anchor"] = {"model": "Qwen/Qwen2.5-7B-Instruct"}
    with pytest.raises(
        UserError, match=r"the weights of the anchor, Qwen/Qwen2\.5-7B-Instruct, are not on this machine"
    ):
        measure(Recipe.model_validate(data), tmp_path / "out")


PEAK = """
import sys
from pathlib import Path
from fusion.hardware import peak_memory
from fusion.plan.weights import measure
from fusion.recipe import Recipe
recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
import matplotlib.pyplot
from fusion.drift import Weights
before = peak_memory()
measure(recipe, Path(sys.argv[2]))
print(peak_memory() - before)
"""


def test_memory_is_bounded_by_a_piece_and_not_by_a_tensor(tmp_path: Path) -> None:
    sizes = {"vocab_size": 400_000, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    models = [write_model(tmp_path / str(seed), seed=seed, **sizes) for seed in range(3)]  # embeddings of 205 MB
    recipe = make_recipe(tmp_path, models[0], {"general": models[0], "math": models[1], "coding": models[2]})
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json(exclude_unset=True), encoding="utf-8")
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 100e6
