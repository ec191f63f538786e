"""The invariants of a merge on models of any small shape: heads, ties, biases, layers, experts, shared ones."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint
from fusion.layers import LayerStream, forced, gated, make_batches
from fusion.merge import merge
from fusion.recipe import Recipe
from fusion.verify import verify
from gate_training.trainer import install_gates
from tests.families import write_model
from tests.invariants.test_function_preserved import IDS, logits, random_gates
from tests.recipes import make_recipe

HALF = 0.5  # sigmoid(0): what a shared expert counts before its gate is trained


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    """A Qwen2 config's fields, and `bias`."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    return {
        "hidden_size": heads * draw(st.sampled_from([8, 16])),
        "intermediate_size": 8 * draw(st.integers(1, 9)),  # transformers' grouped products want 16 bytes
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 1e6]))},
        "bias": draw(st.booleans()),
    }


def model(folder: Path, seed: int, shape: dict[str, object], anchor: Path | None = None) -> Path:
    write_model(folder, seed, anchor, **{key: value for key, value in shape.items() if key != "bias"})
    if not shape["bias"]:
        path = folder / "model.safetensors"
        save_file({n: t for n, t in load_file(path).items() if not n.endswith(".bias")}, path, {"format": "pt"})
    return folder


def recipe_of(folder: Path, anchor: Path, experts: list[Path], top_k: int, shared: str | None) -> Recipe:
    """A recipe of as many experts as there are."""
    routing = {"top_k": min(top_k, 2), "shared_expert": shared}
    first = make_recipe(folder, anchor, {"general": experts[0], "math": experts[1]}, routing=routing)
    more = {f"domain{i}": str(path) for i, path in enumerate(experts[2:])}
    added = [first.experts[0].model_copy(update={"name": n, "domain": n, "model": m}) for n, m in more.items()]
    domains = first.domains | dict.fromkeys(more, first.domains["general"])
    routing = first.routing.model_copy(update={"top_k": top_k})
    return first.model_copy(update={"experts": (*first.experts, *added), "domains": domains, "routing": routing})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes(), count=st.integers(2, 9), top_k=st.integers(1, 9), shared=st.sampled_from([None, "anchor"]))
def test_a_merge_of_any_shape_is_what_it_should_be(
    tmp_path_factory: pytest.TempPathFactory, shape: dict[str, object], count: int, top_k: int, shared: str | None
) -> None:
    folder, top_k = tmp_path_factory.mktemp("any"), min(top_k, count)
    anchor = model(folder / "anchor", 1, shape)
    same = merge(recipe_of(folder, anchor, [anchor] * count, top_k, shared), folder / "same")
    install_gates(same, random_gates(same, 3))
    dense = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32).eval()
    with torch.no_grad():
        if shared:  # its output comes on top
            for layer in dense.model.layers:
                layer.mlp.down_proj.weight *= 1 + HALF
        assert torch.allclose(logits(same), dense(IDS).logits, atol=2e-4)

    experts = [model(folder / str(i), 10 + i, shape, anchor) for i in range(count)]
    fused = merge(recipe_of(folder, anchor, experts, top_k, shared), folder / "fused")
    gates = random_gates(fused, 4)
    install_gates(fused, gates)
    found = verify(fused)
    assert [problem.split(":")[0] for problem in found.problems] == ["gates.safetensors"]  # not by train-gates
    assert len(found.equal) == 1 + count + (shared is not None)
    stream = LayerStream(Checkpoint(fused), make_batches([IDS[0].tolist()]))
    stream.run(gated(gates, top_k))
    ((_, streamed),) = stream.logits()
    assert torch.allclose(streamed, logits(fused), atol=2e-4)
    if shared is None:
        stream = LayerStream(Checkpoint(fused), make_batches([IDS[0].tolist()]))
        stream.run(forced(count - 1))
        ((_, alone),) = stream.logits()
        assert torch.allclose(alone, logits(experts[-1]), atol=2e-4)

    order = [*range(1, count), 0]
    turned = merge(recipe_of(folder, anchor, [experts[i] for i in order], top_k, shared), folder / "turned")
    install_gates(turned, {layer: gate[order] for layer, gate in gates.items()})
    assert torch.allclose(logits(turned), logits(fused), atol=2e-4)
