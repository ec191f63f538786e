"""Sizes on the meta device: known ones, those of checkpoints that are written here, and vLLM's split over cards."""

from pathlib import Path
from typing import Any

import pytest

from fusion import road
from fusion.headers import tensor_places
from fusion.plan.budget import (
    Layout,
    Weight,
    active_parameters,
    budget,
    card_bytes,
    group_card_bytes,
    kv_bytes_per_token,
    model_weights,
    on_card,
    planned_config,
    stage_layers,
)
from fusion.plan.models import describe_anchor
from tests.families import write_model
from tests.fusion.plan.planned import FIVE, TWO, fused, shipped
from tests.recipes import make_recipe

B7 = 203.6e6 * 28  # one 7B expert's MLPs
SMALL = {  # 5 experts, 4 query and 2 key-value heads of 32, a vocabulary that has to be padded
    "model_type": "qwen2_moe",
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "qkv_bias": True,
    "tie_word_embeddings": False,
}


def small(**changes: Any) -> tuple[dict[str, Any], list[Weight]]:
    config = {**SMALL, **changes}
    return config, model_weights(config)


def shape(weights: list[Weight], name: str, config: dict[str, Any], layout: Layout) -> tuple[int, ...]:
    (weight,) = [weight for weight in weights if weight.name.endswith(name) and ".layers.1." not in weight.name]
    return on_card(weight, config, layout)


@pytest.mark.parametrize(
    ("name", "parameters", "gigabytes_per_card", "kv_bytes_per_card", "active"),
    [(FIVE, 30.4e9, 15.2, 14_336, 30.4e9 - 4 * B7), (TWO, 13.3e9, 13.3, 28_672, 13.3e9 - B7)],
)
def test_the_7b_recipes_have_the_known_sizes(
    name: str, parameters: float, gigabytes_per_card: float, kv_bytes_per_card: int, active: float
) -> None:
    sizes = budget(*shipped(name))
    assert sizes.parameters == pytest.approx(parameters, abs=0.1e9)
    assert sizes.active_parameters == pytest.approx(active, abs=0.1e9)
    assert sizes.bytes == 2 * sizes.parameters
    assert sizes.bytes_per_card / 1e9 == pytest.approx(gigabytes_per_card, abs=0.1)
    assert sizes.kv_bytes_per_token == 57_344
    assert sizes.kv_bytes_per_token_per_card == kv_bytes_per_card


def test_the_parameters_of_the_target_by_group() -> None:
    groups = budget(*shipped()).groups
    assert groups == {
        "experts": 5 * 28 * 3 * 3584 * 18944,
        "shared_expert": 0,
        "dense_mlps": 0,
        "attention": 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3584 + 2 * 512),
        "embeddings": 152064 * 3584,
        "head": 152064 * 3584,
        "norms": 57 * 3584,
        "gates": 28 * 6 * 3584,  # with the row that a shared expert would have
    }


def test_a_shared_expert_costs_one_more_expert() -> None:
    sizes = budget(*shipped(FIVE, "routing.shared_expert=anchor"))
    assert sizes.parameters == pytest.approx(36.1e9, abs=0.1e9)
    assert sizes.active_parameters == pytest.approx(36.1e9 - 4 * B7, abs=0.1e9)
    assert sizes.groups["shared_expert"] == pytest.approx(B7, abs=0.01e9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [None, "anchor"])
def test_the_budget_of_a_tiny_model_is_what_the_merge_writes(tmp_path: Path, tied: bool, shared: str | None) -> None:
    anchor = write_model(tmp_path / "anchor", tie_word_embeddings=tied, num_key_value_heads=1)
    other = write_model(tmp_path / "other", seed=1, anchor=anchor, tie_word_embeddings=tied, num_key_value_heads=1)
    routing = {"moe_layers": [0, 2], "top_k": 1, "shared_expert": shared}
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": other}, routing=routing)
    sizes = budget(recipe, describe_anchor(recipe).config)
    road.merge(recipe)
    written = tensor_places(recipe.fused).values()
    assert sizes.bytes == sum(place.nbytes for place in written)
    assert sizes.active_parameters == sizes.parameters - 2 * 3 * 64 * 96


def test_on_one_card_there_is_the_whole_model_and_the_padding_of_its_vocabulary() -> None:
    config, weights = small()
    whole = sum(weight.count for weight in weights)
    assert card_bytes(weights, config, Layout(), "float32", "float32") == 4 * (whole + 2 * (320 - 259) * 128)


def test_tensor_parallelism_cuts_heads_and_mlps_and_copies_norms_and_gates() -> None:
    config, weights = small()
    two = Layout(2)
    assert shape(weights, "layers.0.self_attn.q_proj.weight", config, two) == (64, 128)
    assert shape(weights, "layers.0.self_attn.k_proj.bias", config, two) == (32,)
    assert shape(weights, "layers.0.self_attn.o_proj.weight", config, two) == (128, 64)
    assert shape(weights, "layers.0.mlp.experts.gate_up_proj", config, two) == (5, 256, 128)
    assert shape(weights, "layers.0.mlp.experts.down_proj", config, two) == (5, 128, 128)
    assert shape(weights, "embed_tokens.weight", config, two) == (160, 128)
    assert shape(weights, "lm_head.weight", config, two) == (160, 128)
    assert shape(weights, "layers.0.mlp.gate.weight", config, two) == (5, 128)
    assert shape(weights, "model.norm.weight", config, two) == (128,)
    dense = [weight for weight in weights if ".layers.1.mlp." in weight.name]
    assert [on_card(weight, config, two) for weight in dense] == [(128, 128), (128, 128), (128, 128)]


def test_with_fewer_key_value_heads_than_cards_they_are_copied() -> None:
    config, weights = small()
    assert shape(weights, "layers.0.self_attn.k_proj.weight", config, Layout(4)) == (32, 128)
    assert shape(weights, "layers.0.self_attn.q_proj.weight", config, Layout(4)) == (32, 128)
    assert kv_bytes_per_token(config, 1, "bfloat16") == 2 * 2 * 2 * 32 * 2
    assert kv_bytes_per_token(config, 2, "bfloat16") == kv_bytes_per_token(config, 4, "bfloat16") == 2 * 2 * 32 * 2


def test_all_cards_together_hold_the_model_once_and_the_copies() -> None:
    config, weights = small(vocab_size=256)
    groups = {name: sum(w.count for w in weights if w.group == name) for name in ("norms", "gates")}
    keys = 2 * 2 * (64 * 128 + 64)  # k and v of two layers, with their biases
    whole = sum(weight.count for weight in weights)
    for ways, copies in ((2, 0), (4, keys)):
        held = ways * card_bytes(weights, config, Layout(ways), "bfloat16", "bfloat16") // 2
        assert held == whole + (ways - 1) * sum(groups.values()) + copies


def test_expert_parallelism_puts_the_remainder_on_the_first_cards_and_cuts_nothing_else() -> None:
    config, weights = small()
    whole = Layout(4, expert_parallel=True)
    assert shape(weights, "layers.0.mlp.experts.gate_up_proj", config, whole) == (2, 512, 128)
    assert shape(weights, "layers.0.mlp.experts.down_proj", config, whole) == (2, 128, 256)
    experts, cut = (group_card_bytes(weights, config, each, "bfloat16", "bfloat16") for each in (whole, Layout(4)))
    assert {name for name in experts if experts[name] != cut[name]} == {"experts"}


def test_ranks_share_the_experts_and_copy_the_rest() -> None:
    config, weights = small()
    alone, ranks = Layout(2), Layout(2, ranks=2)
    assert shape(weights, "layers.0.mlp.experts.gate_up_proj", config, ranks) == (5, 128, 128)
    assert shape(weights, "layers.0.mlp.experts.down_proj", config, Layout(ranks=5, expert_parallel=True)) == (
        1,
        128,
        256,
    )
    held, cut = (group_card_bytes(weights, config, layout, "bfloat16", "bfloat16") for layout in (alone, ranks))
    assert cut == {**held, "experts": held["experts"] // 2}


@pytest.mark.parametrize(
    ("layers", "stages", "parts"), [(28, 2, [14, 14]), (28, 3, [9, 10, 9]), (7, 4, [2, 2, 2, 1]), (3, 1, [3])]
)
def test_stages_have_the_layers_that_vllm_gives_them(layers: int, stages: int, parts: list[int]) -> None:
    """As vLLM 0.32's distributed.utils.get_pp_indices cuts them."""
    assert stage_layers(layers, stages) == parts


def test_the_fullest_stage_has_its_layers_and_the_whole_vocabulary() -> None:
    config, weights = small()  # layer 0 is sparse, layer 1 dense
    whole, half = (group_card_bytes(weights, config, Layout(stages=n), "bfloat16", "bfloat16") for n in (1, 2))
    assert half["experts"] == whole["experts"] and half["dense_mlps"] == 0
    assert half["attention"] == whole["attention"] // 2
    assert [half[name] for name in ("embeddings", "head")] == [whole[name] for name in ("embeddings", "head")]
    assert kv_bytes_per_token(config, 1, "bfloat16", stages=2) == kv_bytes_per_token(config, 1, "bfloat16") // 2


def test_the_bytes_are_those_of_vllms_own_parameters() -> None:
    """Summed over the parameters of vLLM 0.32's Qwen2MoeForCausalLM on rank 0 of 4."""
    config, weights = small()
    assert card_bytes(weights, config, Layout(4, expert_parallel=True), "bfloat16", "bfloat16") == 552_064
    target, target_weights = fused(*shipped())
    assert card_bytes(target_weights, target, Layout(4), "bfloat16", "bfloat16") == 15_215_728_640


def test_two_of_five_7b_experts_on_one_card_are_22_8_gigabytes() -> None:
    config, weights = fused(*shipped())
    held = group_card_bytes(weights, config, Layout(4, expert_parallel=True), "bfloat16", "bfloat16")
    assert held["experts"] / 1e9 == pytest.approx(22.8, abs=0.02)


def test_fp8_halves_the_linear_maps_and_leaves_the_rest() -> None:
    config, weights = small()
    full = group_card_bytes(weights, config, Layout(2), "bfloat16", "bfloat16")
    fp8 = group_card_bytes(weights, config, Layout(2), "fp8", "bfloat16")
    assert {name for name in full if full[name] != fp8[name]} == {"experts", "dense_mlps", "attention"}
    assert fp8["experts"] == full["experts"] // 2 + 4 * 2 * 5  # a scale for each expert's two maps
    assert fp8["dense_mlps"] == full["dense_mlps"] // 2 + 4 * 2
    biases = 2 * 2 * (64 + 2 * 32)  # stay as they are
    assert fp8["attention"] == (full["attention"] - biases) // 2 + biases + 2 * 4 * 2  # q, k and v are one map


def test_4_bits_count_their_scales() -> None:
    config, weights = small()
    full = group_card_bytes(weights, config, Layout(), "bfloat16", "bfloat16")
    four = group_card_bytes(weights, config, Layout(), "w4a16", "bfloat16")
    assert four["experts"] == full["experts"] // 4 + full["experts"] // 2 // 128 * 2
    assert [four[name] for name in ("norms", "gates", "head")] == [full[name] for name in ("norms", "gates", "head")]


def test_a_dense_model_is_counted_as_well() -> None:
    config = {**SMALL, "model_type": "qwen2", "num_experts": 0}
    weights = model_weights(config)
    assert {weight.group for weight in weights} == {"dense_mlps", "attention", "embeddings", "head", "norms"}
    assert active_parameters(weights, config) == sum(weight.count for weight in weights)


def test_an_unknown_dtype_of_the_config_is_planned_as_bfloat16() -> None:
    recipe, config = shipped()
    assert planned_config(recipe, {**config, "torch_dtype": "float8"})["dtype"] == "bfloat16"
