"""Adapters made of experts: they give the experts' weights back."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fusion.adapter import Adapter
from fusion.evaluation.adapters import extracted
from tests.recipes import make_recipe


def test_adapters_are_the_experts(tmp_path: Path, anchor: Path) -> None:
    expert = Path(shutil.copytree(anchor, tmp_path / "expert"))
    tensors = load_file(expert / "model.safetensors")
    torch.manual_seed(0)
    changed = [name for name in tensors if ".mlp." in name]
    for name in changed:
        rows, columns = tensors[name].shape
        tensors[name] += 0.1 * torch.randn(rows, 4) @ torch.randn(4, columns)
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": expert})
    found = extracted(recipe, tmp_path / "adapters")
    assert list(found) == ["math"]
    adapter, base = Adapter(found["math"]), load_file(anchor / "model.safetensors")
    assert sorted(adapter.targets) == sorted(changed)
    for name in changed:
        assert torch.allclose(adapter.apply(name, base[name]), tensors[name], atol=1e-4)
