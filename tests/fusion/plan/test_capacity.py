"""The KV cache by vLLM's arithmetic, against what its CPU server logged; weights and reserves beside it."""

import math
from typing import Any

import pytest

from fusion.plan.budget import Layout, kv_bytes_per_token
from fusion.plan.capacity import (
    BLOCK_CPU,
    Capacity,
    capacities,
    capacity,
    forward_bytes,
    kv_blocks,
    lengths_to_show,
    logged_tokens,
    served_dtype,
)
from fusion.sections.serving import Serving
from tests.fusion.plan.planned import FIVE, TWO, fused, profile, shipped


def serving(**changes: Any) -> Serving:
    return Serving(**{"max_model_len": 2048, "sampling": {"max_tokens": 64}, **changes})


def measured(name: str, hardware: str = "4x4090d", *overrides: str, **changes: Any) -> dict[str, Capacity]:
    recipe, anchor = shipped(name, *overrides)
    rows = capacities(recipe, *fused(recipe, anchor), profile(hardware, **changes))
    return {row.weight_format: row for row in rows}


@pytest.mark.parametrize(
    ("layers", "heads", "head_size", "ways", "cache", "length", "logged"),
    [  # "CPU KV cache size: N tokens" of vLLM 0.32's CPU server, bfloat16
        (3, 4, 32, 1, 64 << 20, 256, 43_648),  # the demo's fused model
        (24, 2, 64, 1, 256 << 20, 2048, 21_760),  # Qwen2.5-Coder-0.5B with two experts
        (28, 2, 128, 2, 200_000_000, 3000, 13_500),  # Qwen2.5-1.5B twice, the cache of each of two workers
    ],
)
def test_the_tokens_are_those_that_vllm_logged(
    layers: int, heads: int, head_size: int, ways: int, cache: int, length: int, logged: int
) -> None:
    config = {
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_attention_heads": heads,
        "hidden_size": heads * head_size,
    }
    blocks = kv_blocks(cache, kv_bytes_per_token(config, ways, "bfloat16"), BLOCK_CPU)
    assert logged_tokens(blocks, BLOCK_CPU, length) == logged


def test_a_length_that_is_no_whole_number_of_blocks_wastes_the_last_of_them() -> None:
    assert logged_tokens(10, 16, 160) == 160
    assert logged_tokens(10, 16, 65) == int(10 / 5 * 65)


def test_weights_reserves_and_cache_are_what_vllm_asks_a_card_for() -> None:
    row = measured(FIVE)["bfloat16"]
    assert row.usable == int(23.6 * 2**30 * 0.9)
    assert row.weights + row.activations + row.graphs + row.other + row.kv_bytes == row.usable
    assert row.weights / 1e9 == pytest.approx(15.2, abs=0.1)
    assert row.kv_tokens == pytest.approx(row.kv_bytes / 14_336, rel=1e-3)


def test_smaller_weights_leave_more_tokens() -> None:
    rows = measured(FIVE)
    assert rows["bfloat16"].kv_tokens < rows["fp8"].kv_tokens < rows["w4a16"].kv_tokens
    assert rows["bfloat16"].kv_bytes_per_token == rows["fp8"].kv_bytes_per_token  # the cache is not quantised


def test_the_longest_length_leaves_vllm_its_own_block() -> None:
    row = measured(FIVE)["bfloat16"]
    blocks = kv_blocks(row.kv_bytes, row.kv_bytes_per_token, 16)
    assert row.starts_with((blocks - 1) * 16)
    assert not row.starts_with((blocks - 1) * 16 + 1)


def test_of_twice_the_length_half_as_many_sequences_are_kept() -> None:
    lengths = {row.max_model_len: row for row in measured(FIVE)["bfloat16"].lengths}
    assert list(lengths) == [4096, 8192, 16384, 32768, 131072]
    assert lengths[16384].sequences == pytest.approx(2 * lengths[32768].sequences)
    assert [length for length, row in lengths.items() if row.yarn] == [131072]
    assert lengths[32768].fits


def test_the_yarn_factor_of_the_recipe_is_shown() -> None:
    assert lengths_to_show(serving(yarn_factor=2.0), 2048) == [256, 512, 1024, 2048, 4096]


def test_what_does_not_fit_has_no_tokens() -> None:
    row = measured(TWO, "24gb", "serving.tensor_parallel_size=1")["bfloat16"]
    assert row.kv_bytes < 0
    assert (row.kv_tokens, row.longest) == (0, 0)
    assert not any(length.fits for length in row.lengths)


def test_engines_find_room_side_by_side() -> None:
    row = measured(TWO)["bfloat16"]
    assert row.engines == 2
    assert row.kv_tokens_in_all == 2 * row.kv_tokens


def test_a_share_of_the_cards_is_a_share_of_what_may_be_used() -> None:
    recipe, anchor = shipped()
    config, _ = fused(recipe, anchor)
    whole, half = (capacity(recipe.serving, config, profile(), Layout(4), "fp8", 10**9, share) for share in (1.0, 0.5))
    assert half.usable == pytest.approx(whole.usable / 2, abs=1)
    assert whole.kv_bytes - half.kv_bytes == pytest.approx(whole.usable / 2, abs=1)


def test_on_a_cpu_the_cache_is_what_the_recipe_gives_every_worker() -> None:
    rows = measured(TWO, "cpu", "serving.cpu_kv_cache_bytes=1073741824", memory_gib=256.0)
    assert list(rows) == ["float32"]  # no quantised experts, and no bfloat16 on this one
    row = rows["float32"]
    assert row.kv_bytes == 1 << 30
    assert row.kv_tokens == (1 << 30) // (2 * 28 * 2 * 128 * 4 * 128) * 128  # two ways, two heads each
    assert row.graphs == row.other == 0
    assert list(measured(TWO, "cpu", memory_gib=256.0, native_bfloat16=True)) == ["bfloat16"]


def test_on_a_cpu_longer_prompts_take_larger_steps() -> None:
    one, two = (measured(TWO, "cpu", f"serving.max_model_len={length}")["float32"] for length in (16384, 32768))
    assert two.activations == 2 * one.activations


def test_on_a_cpu_all_workers_share_the_memory() -> None:
    row = measured(TWO, "cpu")["float32"]
    assert row.usable == int(31.2 * 2**30) // 2
    assert row.kv_bytes < 0  # 53 GB of float32 weights


@pytest.mark.parametrize(
    ("asked", "checkpoint", "native", "served"),
    [
        ("auto", "bfloat16", True, "bfloat16"),
        ("auto", "float32", True, "bfloat16"),  # vLLM's own choice
        ("auto", "float16", True, "float16"),
        ("auto", "bfloat16", False, "float32"),
        ("float32", "bfloat16", True, "float32"),
    ],
)
def test_the_dtype_is_vllms_choice(asked: str, checkpoint: str, native: bool, served: str) -> None:
    assert served_dtype(serving(dtype=asked), checkpoint, native) == served


def test_reserves_grow_with_the_batch_and_shrink_with_the_ways() -> None:
    config, _ = fused(*shipped(FIVE, "routing.top_k=2"))
    one, two = (forward_bytes(config, Layout(ways), 2048, "bfloat16") for ways in (1, 2))
    assert one > two
    assert forward_bytes(config, Layout(), 4096, "bfloat16") == 2 * one
    workspaces = 2 * (18944 + 2 * 18944) + 3584  # (top-k, width) of the two workspaces, and the output
    assert one == 2048 * (2 * 3584 + workspaces) * 2
    large, small = (measured(FIVE, memory_gib=size)["fp8"].activations for size in (80.0, 24.0))
    assert large == 4 * small  # 1024 sequences of the sampler instead of 256
    assert math.isclose(small, 256 * 152064 * 22)
