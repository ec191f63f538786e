"""Whole models, spread over memory and disk by accelerate: the same logits, gates put in, nothing left behind."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint
from fusion.layers import checkpoint_gates
from fusion.merge import merge
from fusion.router import place_gates
from fusion.sections.fusing import Loading
from fusion.sources import ModelSource, load_model
from tests.recipes import make_recipe

IDS = torch.arange(40).reshape(2, 20)
SPREAD = Loading(device_map="auto", max_memory={"cpu": "500KB"})


@pytest.fixture
def folder(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> Path:
    return merge(make_recipe(tmp_path, anchor, anchored_experts))


def loaded(folder: Path, loading: Loading | None = None) -> Any:
    return load_model(ModelSource("fused", folder), "sdpa", loading, torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def test_a_model_on_disk_gives_the_same_logits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    whole = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    assert torch.equal(logits(loaded(folder)), whole)
    model = loaded(folder, SPREAD)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.allclose(logits(model), whole, atol=1e-5)
    assert list((tmp_path / "temporary").iterdir())
    del model
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


def test_a_named_offload_folder_is_used_and_left(folder: Path, tmp_path: Path) -> None:
    named = SPREAD.model_copy(update={"offload_folder": str(tmp_path / "offload"), "device_map": "balanced_low_0"})
    model = loaded(folder, named)
    whole = logits(loaded(folder))
    assert torch.allclose(logits(model), whole, atol=1e-5)


@pytest.mark.parametrize("loading", [None, SPREAD])
def test_gates_are_placed_wherever_the_layer_lies(folder: Path, loading: Loading | None) -> None:
    gates = {layer: -gate for layer, gate in checkpoint_gates(Checkpoint(folder)).items()}
    model = loaded(folder, loading)
    before = logits(model)
    place_gates(model, gates)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for layer, gate in gates.items():
            expected.model.layers[layer].mlp.gate.weight.copy_(gate)
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-2)


@pytest.mark.parametrize("wrong", [{"max_memory": {"cpu": 1}}, {"device_map": "auto", "max_memory": {"gpu": 1}}])
def test_limits_that_say_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="max_memory"):
        Loading(**wrong)
