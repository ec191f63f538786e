"""The same experts as engines of their own, or as adapters of one anchor."""

from pathlib import Path
from typing import Any

import pytest

from fusion.checkpoint import write_json
from fusion.plan.alternatives import (
    ADAPTERS,
    SEPARATE,
    Alternative,
    adapter_rank,
    alternatives,
    lora_slot_bytes,
    no_adapters,
)
from fusion.recipe import Recipe
from fusion.sections.fusing import Expert
from fusion.sections.training import BranchSettings
from tests.fusion.plan.planned import FIVE, TWO, profile, shipped

BRANCH: dict[str, Any] = {"data": {"generated": "demo.math"}}


def rows(name: str, hardware: str, *overrides: str) -> dict[tuple[str, str, str], Alternative]:
    recipe, anchor = shipped(name, *overrides)
    found = alternatives(recipe, anchor, profile(hardware))
    return {(row.name, row.how, row.engine.weight_format): row for row in found}


def with_experts(*experts: Expert) -> Recipe:
    recipe, _ = shipped()
    return recipe.model_copy(update={"experts": experts})


def test_five_dense_engines_do_not_fit_four_24_gb_cards() -> None:
    found = rows(FIVE, "4x4090d")
    cut, whole = found[SEPARATE, "4 ways each", "bfloat16"], found[SEPARATE, "each on one card", "bfloat16"]
    assert cut.weights / 1e9 == pytest.approx(76.2, abs=0.1)
    assert cut.weights_per_card / 1e9 == pytest.approx(19.0, abs=0.1)
    assert whole.weights_per_card / 1e9 == pytest.approx(30.5, abs=0.1)  # two on one card
    assert not cut.fits
    assert not whole.fits
    fits = found[SEPARATE, "4 ways each", "w4a16"]
    assert fits.fits
    assert fits.engine.kv_tokens_in_all == 5 * fits.engine.kv_tokens


def test_one_anchor_with_five_adapters_takes_16_gigabytes() -> None:
    found = rows(FIVE, "4x4090d")
    row = found[ADAPTERS, "5 slots of rank 16", "bfloat16"]
    assert row.weights / 1e9 == pytest.approx(16, abs=0.1)
    assert row.fits
    assert not row.possible
    assert "'coding' is anchored with its MLPs whole" in row.why


def test_on_one_card_engines_stand_side_by_side() -> None:
    found = rows(TWO, "h200", "serving.tensor_parallel_size=1")
    assert {how for name, how, _ in found if name == SEPARATE} == {"each on one card"}
    row = found[SEPARATE, "each on one card", "bfloat16"]
    assert row.weights_per_card == row.weights
    assert row.fits


def test_a_slot_holds_a_and_b_of_every_linear_map() -> None:
    config = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    maps = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 12), (8, 12), (12, 8)]  # in and out of q, k, v, o, gate, up, down
    assert lora_slot_bytes(config, 1, 16, 2) == 3 * 16 * 2 * sum(sum(sizes) for sizes in maps)
    cut = [(8, 4), (8, 2), (8, 2), (4, 8), (8, 6), (8, 6), (6, 8)]  # B of those cut by outputs, A of o and down
    assert lora_slot_bytes(config, 2, 16, 2) == 3 * 16 * 2 * sum(sum(sizes) for sizes in cut)


def test_adapters_of_the_anchor_are_possible_and_nothing_else_is() -> None:
    anchor = shipped()[0].anchor.model
    base = Expert(name="general", domain="general", model=anchor)
    adapted = Expert(name="math", domain="math", model=anchor, adapter="somewhere/adapter")
    branched = Expert(name="coding", domain="coding", branch=BranchSettings(lora_rank=8, **BRANCH))
    assert no_adapters(with_experts(base, adapted, branched)) == ""
    whole = branched.model_copy(update={"branch": BranchSettings(**BRANCH)})
    assert "whole weights" in no_adapters(with_experts(base, whole))
    other = adapted.model_copy(update={"model": "Qwen/Qwen2.5-Coder-7B-Instruct"})
    assert "a model of its own" in no_adapters(with_experts(base, other))


@pytest.mark.parametrize(("rank", "slot"), [(None, 16), (4, 8), (16, 16), (24, 32)])
def test_the_rank_is_one_that_vllm_has(rank: int | None, slot: int) -> None:
    branch = BranchSettings(lora_rank=rank, **BRANCH)
    assert adapter_rank(with_experts(Expert(name="math", domain="math", branch=branch))) == slot


@pytest.mark.parametrize(
    ("config", "slot"), [({"r": 24}, 32), ({"r": 8, "rank_pattern": {"q_proj": 100, "up_proj": 2}}, 128)]
)
def test_the_rank_is_the_largest_of_an_adapter_that_is_here(config: dict[str, Any], slot: int, tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", config)
    recipe, anchor = shipped(FIVE, "serving.tensor_parallel_size=1")
    adapted = Expert(name="math", domain="math", model=recipe.anchor.model, adapter=str(tmp_path))
    rows = alternatives(recipe.model_copy(update={"experts": (adapted,)}), anchor, profile("h200"))
    row = next(row for row in rows if row.name == ADAPTERS)
    assert row.possible
    assert row.how == f"1 slots of rank {slot}"
    elsewhere = recipe.model_copy(update={"experts": (adapted.model_copy(update={"adapter": "./nowhere"}),)})
    rows = alternatives(elsewhere, anchor, profile("h200"))
    assert next(row.how for row in rows if row.name == ADAPTERS) == "1 slots of rank 16, assumed"


def test_a_rank_beyond_vllms_largest_is_said(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"r": 16, "rank_pattern": {"down_proj": 513}})
    adapted = Expert(name="math", domain="math", model=shipped()[0].anchor.model, adapter=str(tmp_path))
    assert no_adapters(with_experts(adapted)) == "expert 'math' has an adapter of rank 513, vLLM's largest is 512"
    write_json(tmp_path / "adapter_config.json", {"r": 512})
    assert no_adapters(with_experts(adapted)) == ""


def test_engines_over_two_of_four_cards_share_a_pair_by_three() -> None:
    found = rows(FIVE, "4x4090d", "serving.tensor_parallel_size=2")
    cut = found[SEPARATE, "2 ways each", "bfloat16"]
    assert cut.weights_per_card == 3 * cut.weights // (5 * 2)
