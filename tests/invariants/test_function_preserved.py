"""What a merge must not change, in float32: identical experts, forced routing, order of experts, the stream itself."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint
from fusion.layers import LayerStream, checkpoint_gates, forced, gated, make_batches
from fusion.merge import merge
from gate_training.trainer import METHODS, install_gates, train_gates
from tests.recipes import make_recipe

IDS = torch.arange(3, 35)[None]  # (1, length)


def logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits  # (rows, length, vocabulary)


def random_gates(folder: Path, seed: int) -> dict[int, torch.Tensor]:
    torch.manual_seed(seed)
    return {layer: torch.randn_like(gate) for layer, gate in checkpoint_gates(Checkpoint(folder)).items()}


@pytest.mark.parametrize("seed", range(3))
def test_five_identical_experts_are_the_dense_model(tmp_path: Path, anchor: Path, seed: int) -> None:
    names = ("general", "math", "coding")
    recipe = make_recipe(tmp_path, anchor, dict.fromkeys(names, anchor), routing={"top_k": 2})
    more = [recipe.experts[0].model_copy(update={"name": f"copy{i}"}) for i in range(2)]
    recipe = recipe.model_copy(update={"experts": (*recipe.experts, *more)})
    folder = merge(recipe)
    install_gates(folder, random_gates(folder, seed))
    assert Checkpoint(folder).config["num_experts"] == 5
    assert (logits(folder) - logits(anchor)).abs().max() < 1e-4


def forced_logits(folder: Path, expert: int) -> torch.Tensor:
    stream = LayerStream(Checkpoint(folder), make_batches([IDS[0].tolist()]))
    stream.run(forced(expert))
    ((_, found),) = stream.logits()
    return found  # (1, length, vocabulary)


def test_forced_to_an_anchored_expert_is_that_expert(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    folder = merge(make_recipe(tmp_path, anchor, anchored_experts))
    for number, expert in enumerate(anchored_experts.values()):
        assert torch.allclose(forced_logits(folder, number), logits(expert), atol=1e-4)
    assert not torch.allclose(forced_logits(folder, 0), forced_logits(folder, 1), atol=1e-2)


def test_forced_to_a_drifted_expert_is_its_mlps_on_the_anchor(
    tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]
) -> None:
    folder = merge(make_recipe(tmp_path, anchor, drifted_experts))
    for number, expert in enumerate(drifted_experts.values()):
        grafted = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32)
        own = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32).state_dict()
        grafted.load_state_dict({k: v for k, v in own.items() if ".mlp." in k}, strict=False)
        grafted.save_pretrained(tmp_path / f"graft-{number}")
        assert torch.allclose(forced_logits(folder, number), logits(tmp_path / f"graft-{number}"), atol=1e-4)
        assert not torch.allclose(forced_logits(folder, number), logits(expert), atol=1e-3)


@pytest.mark.parametrize("top_k", [1, 2])
def test_permuted_experts_permute_the_gate(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], top_k: int
) -> None:
    first = merge(make_recipe(tmp_path, anchor, anchored_experts, routing={"top_k": top_k}), tmp_path / "first")
    order = [2, 0, 1]
    permuted = {list(anchored_experts)[i]: list(anchored_experts.values())[i] for i in order}
    second = merge(make_recipe(tmp_path, anchor, permuted, routing={"top_k": top_k}), tmp_path / "second")
    gates = random_gates(first, 5)
    install_gates(first, gates)
    install_gates(second, {layer: gate[order] for layer, gate in gates.items()})
    assert (logits(first) - logits(second)).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_permuted_experts_train_permuted_gates(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], method: str
) -> None:
    order = [2, 0, 1]
    permuted = {list(anchored_experts)[i]: list(anchored_experts.values())[i] for i in order}
    folders = []
    for name, experts in (("first", anchored_experts), ("second", permuted)):
        (tmp_path / name).mkdir()
        settings = {"rows": 4, "held_out_rows": 4, "method": method}
        recipe = make_recipe(tmp_path / name, anchor, experts, gate_training=settings)
        folders.append(merge(recipe))
        train_gates(recipe, folders[-1])
    first, second = (checkpoint_gates(Checkpoint(folder)) for folder in folders)
    for layer, gate in first.items():
        assert torch.allclose(gate[order], second[layer], atol=1e-3 * float(gate.abs().max()))
    assert (logits(folders[0]) - logits(folders[1])).abs().max() < 1e-4


@pytest.mark.parametrize("moe_layers", [None, [1], [0, 2]])
@pytest.mark.parametrize("shared_expert", [None, "anchor"])
def test_the_stream_computes_what_transformers_computes(
    tmp_path: Path,
    anchor: Path,
    anchored_experts: dict[str, Path],
    moe_layers: list[int] | None,
    shared_expert: str | None,
) -> None:
    routing = {"top_k": 2, "moe_layers": moe_layers, "shared_expert": shared_expert}
    folder = merge(make_recipe(tmp_path, anchor, anchored_experts, routing=routing))
    install_gates(folder, random_gates(folder, 3))
    rows = [list(range(3, 20)), list(range(40, 90)), list(range(7, 12))]
    starts = [4, 10, 2]
    batches = make_batches(rows, answer_starts=starts, batch_tokens=120)
    assert len(batches) == 2
    stream = LayerStream(Checkpoint(folder), batches)
    stream.run(gated(checkpoint_gates(Checkpoint(folder)), 2))
    for batch, found in stream.logits():
        for row, index in enumerate(batch.rows.tolist()):
            length = len(rows[index])
            assert torch.allclose(found[row, :length], logits(folder, torch.tensor(rows[index])[None])[0], atol=1e-4)
            assert batch.answer[row, :length].tolist() == [at >= starts[index] for at in range(length)]
