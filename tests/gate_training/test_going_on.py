"""Gates fitted in parts: after an interruption, by sums kept for experts that come and go, with examples added."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.architecture import GATES_FILE
from fusion.checkpoint import Checkpoint, file_hash
from fusion.data import chat
from fusion.encoding import encode, load_tokenizer
from fusion.layers import Batch, Layer, checkpoint_gates
from fusion.merge import merge
from fusion.recipe import Recipe
from gate_training import trainer
from gate_training.layer_tokens import LayerTokens, token_marks
from gate_training.methods.tokens import InMemory, Tokens, moments
from gate_training.trainer import METHODS, train_gates
from tests.recipes import SETTINGS, make_recipe, with_settings


def interrupted_at(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops the next fits when they come to `layer`."""
    reach = LayerTokens.reach

    def killed(tokens: LayerTokens, at: Layer) -> None:
        if at.index == layer:
            raise KeyboardInterrupt
        reach(tokens, at)

    monkeypatch.setattr(LayerTokens, "reach", killed)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("method", ["cross-entropy", "auto", "ridge by kept sums"])  # auto begins with ridge
def test_an_interrupted_fit_goes_on_after_its_last_layer(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, layer: int, method: str
) -> None:
    method, _, kept_sums = method.partition(" ")
    recipe = with_settings(recipe, method=method, propagation="labels" if kept_sums else "gates")
    whole = train_gates(recipe, folder)
    first = file_hash(folder / GATES_FILE)
    shutil.rmtree(recipe.folder / "statistics", ignore_errors=True)
    with monkeypatch.context() as patch:
        interrupted_at(layer, patch)
        with pytest.raises(KeyboardInterrupt):
            train_gates(recipe, folder)
    reached: list[int] = []
    first_method = "ridge" if method == "auto" else method
    fit = METHODS[first_method]

    def counted(*given: Any) -> torch.Tensor:
        reached.append(1)
        return fit(*given)

    monkeypatch.setitem(METHODS, first_method, counted)
    again = train_gates(recipe, folder)
    assert len(reached) == 3 - layer
    assert file_hash(folder / GATES_FILE) == first
    assert again == whole
    assert not (recipe.folder / ".gates").exists()
    if kept_sums:  # all layers of all experts are on record
        train_gates(recipe, folder)
        assert file_hash(folder / GATES_FILE) == first


def test_notes_of_other_rows_are_not_taken_up(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupted_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train_gates(recipe, folder)
    fewer = with_settings(recipe, rows=3)
    train_gates(fewer, folder)
    found = file_hash(folder / GATES_FILE)
    train_gates(fewer, folder)
    assert file_hash(folder / GATES_FILE) == found


def test_an_expert_comes_and_goes_without_the_others_rows(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "method": "ridge", "propagation": "labels"}
    for name in ("whole", "grown"):
        (tmp_path / name).mkdir()
    whole = make_recipe(tmp_path / "whole", anchor, anchored_experts, gate_training=settings)
    train_gates(whole, merge(whole))
    wanted = checkpoint_gates(Checkpoint(whole.fused))

    few = {name: path for name, path in anchored_experts.items() if name != "math"}
    grown = make_recipe(tmp_path / "grown", anchor, few, gate_training=settings)
    train_gates(grown, merge(grown))
    without = checkpoint_gates(Checkpoint(grown.fused))
    shutil.rmtree(grown.fused)
    grown = make_recipe(tmp_path / "grown", anchor, anchored_experts, gate_training=settings)
    streamed: list[int] = []
    counted = token_marks

    def watched(batches: list[Batch], hidden: int) -> list[torch.Tensor]:
        streamed.extend(label for batch in batches for label in batch.labels.tolist())
        return counted(batches, hidden)

    monkeypatch.setattr(trainer, "token_marks", watched)
    train_gates(grown, merge(grown))
    math = [expert.name for expert in grown.experts].index("math")
    assert set(streamed) == {math}
    found = checkpoint_gates(Checkpoint(grown.fused))
    for layer, gate in wanted.items():
        assert torch.allclose(found[layer], gate, rtol=1e-4, atol=1e-5 * float(gate.abs().max()))

    shutil.rmtree(grown.fused)
    fewer = make_recipe(tmp_path / "grown", anchor, few, gate_training=settings)
    streamed.clear()
    train_gates(fewer, merge(fewer))
    assert not streamed
    again = checkpoint_gates(Checkpoint(fewer.fused))
    assert all(torch.equal(again[layer], gate) for layer, gate in without.items())


def test_new_examples_are_added_to_the_sums_without_the_old_ones(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "rows": 8, "method": "ridge", "propagation": "labels"}
    grown = make_recipe(tmp_path, anchor, anchored_experts, gate_training=settings)
    train_gates(grown, merge(grown))
    file = tmp_path / "math.jsonl"
    before = file.read_text(encoding="utf-8")
    feedback = [chat(f"{i}*{i}=", f"math {i * i}", "math") for i in (5, 6)]
    rows = [json.dumps({"messages": row.messages}) for row in feedback]
    file.write_text("\n".join([before, *rows]), encoding="utf-8")
    streamed: list[list[int]] = []
    counted = token_marks

    def watched(batches: list[Batch], hidden: int) -> list[torch.Tensor]:
        streamed.extend(
            ids[real].tolist() for batch in batches for ids, real in zip(batch.ids, batch.real, strict=True)
        )
        return counted(batches, hidden)

    monkeypatch.setattr(trainer, "token_marks", watched)
    with monkeypatch.context() as patch:
        interrupted_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train_gates(grown, grown.fused)
    streamed.clear()
    train_gates(grown, grown.fused)
    tokenizer = load_tokenizer(grown.fused)
    assert sorted(streamed) == sorted(encode(tokenizer, row).ids for row in feedback)
    found = checkpoint_gates(Checkpoint(grown.fused))

    shutil.rmtree(grown.folder / "statistics")
    streamed.clear()
    train_gates(grown, grown.fused)
    assert len(streamed) == 3 * 4 + 2
    for layer, gate in checkpoint_gates(Checkpoint(grown.fused)).items():
        assert float((found[layer] - gate).norm() / gate.norm()) < 1e-3  # rows run in other batches round otherwise

    file.write_text(before, encoding="utf-8")  # taken back: all of the expert's own are run again, nobody else's
    streamed.clear()
    train_gates(grown, grown.fused)
    assert len(streamed) == 4


def test_statistics_of_two_halves_add_up() -> None:
    x, labels = torch.randn(100, 8), torch.arange(100) % 3
    targets, none = torch.nn.functional.one_hot(labels, 3).float(), torch.zeros(100, dtype=torch.bool)
    whole = Tokens(x.double(), targets.double(), none, none)
    halves = [moments(InMemory(whole.part(part))) for part in (slice(40), slice(40, 100))]
    one, two = moments(InMemory(whole)), halves[0] + halves[1]
    assert one.count == two.count == 100
    assert torch.allclose(one.gram, two.gram, atol=1e-8) and torch.allclose(one.cross, two.cross, atol=1e-8)
