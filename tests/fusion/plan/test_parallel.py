"""What vLLM would refuse or a card cannot hold is a finding, and what the finding proposes works."""

import re
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.plan.findings import Finding
from fusion.plan.parallel import check_parallel, obstacle, ways_that_work
from tests.fusion.plan.planned import FIVE, TWO, fused, profile, shipped

B7 = {
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "num_experts": 8,
}


def found(name: str, hardware: str | None, *overrides: str, **changes: Any) -> list[Finding]:
    recipe, anchor = shipped(name, *overrides)
    return check_parallel(recipe, *fused(recipe, anchor), profile(hardware, **changes) if hardware else None)


def only(findings: list[Finding], severity: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.severity == severity]
    return finding


@pytest.mark.parametrize(
    ("changes", "ways", "words"),
    [
        ({}, 4, ""),
        ({}, 3, "num_attention_heads 28"),
        ({"num_experts": 2}, 4, "more than the 2 experts"),
        ({"intermediate_size": 18942}, 4, "intermediate_size 18942"),
        ({"num_key_value_heads": 3, "num_attention_heads": 24}, 2, "num_key_value_heads 3"),
        ({"num_key_value_heads": 2}, 4, ""),  # copied
        ({"num_attention_heads": 24, "num_key_value_heads": 3, "vocab_size": 128}, 3, "padded vocabulary of 128"),
    ],
)
def test_what_vllm_splits_by(changes: dict[str, int], ways: int, words: str) -> None:
    config = {**B7, "intermediate_size": 18944 * 3, **changes} if ways == 3 else {**B7, **changes}
    said = obstacle(config, ways)
    assert words in said
    assert bool(said) == bool(words)


def test_only_ways_that_work_are_proposed() -> None:
    assert ways_that_work(B7, 8) == [1, 2, 4]
    error = only(found(FIVE, None, "serving.tensor_parallel_size=3"), "error")
    assert error.where == "serving.tensor_parallel_size"
    assert error.what == "3 does not divide the anchor's num_attention_heads 28"
    assert error.fix == "set it to 1 or 2 or 4"
    assert not found(FIVE, None, "serving.tensor_parallel_size=4")


def test_more_ways_than_experts_are_refused_with_what_works() -> None:
    with pytest.raises(UserError, match=r"4 ways .* set it to 2, for 2 servers side by side on 4 cards"):
        shipped(TWO, "serving.tensor_parallel_size=4")


def test_more_ways_than_cards_are_an_error() -> None:
    error = only(found(FIVE, "h200"), "error")
    assert "4 ways need as many cards, H200 has 1" in error.sentence()
    assert error.fix == "set it to 1"
    assert not found(FIVE, "h200", "serving.tensor_parallel_size=1")


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        (("pipeline_parallel_size=2",), "serving.pipeline_parallel_size", "4 ways x 2 stages x 1 ranks need 8 cards"),
        (("pipeline_parallel_size=29",), "serving.pipeline_parallel_size", "29 stages are more than the anchor's 28"),
        (("data_parallel_size=2",), "serving.data_parallel_size", "4 ways x 1 stages x 2 ranks need 8 cards"),
        (("tensor_parallel_size=1", "data_parallel_size=3"), "serving.data_parallel_size", "an expert's width 18944"),
    ],
)
def test_stages_and_ranks_that_cannot_be_are_an_error(overrides: tuple[str, ...], where: str, words: str) -> None:
    error = only(found(FIVE, "4x4090d", *(f"serving.{override}" for override in overrides)), "error")
    assert error.where == where
    assert words in error.what


def test_a_cpu_runs_neither_stages_nor_ranks() -> None:
    one = "serving.tensor_parallel_size=1"
    for key in ("pipeline", "data"):
        error = only(found(TWO, "cpu", one, f"serving.{key}_parallel_size=2", memory_gib=512.0), "error")
        assert error.where == f"serving.{key}_parallel_size"


def test_ray_finds_cards_elsewhere_and_ways_should_stay_on_a_machine() -> None:
    ray = "serving.distributed_executor_backend=ray"
    assert not found(FIVE, "4x4090d", ray, "serving.pipeline_parallel_size=2")
    warning = only(found(FIVE, "4x4090d", ray, cards=2), "warning")
    assert warning.what == "4 ways over machines of 2 cards each"
    assert not found(
        FIVE, "4x4090d", ray, "serving.tensor_parallel_size=2", "serving.pipeline_parallel_size=2", cards=2
    )


def test_five_experts_over_four_cards_put_two_on_one() -> None:
    parallel = "serving.enable_expert_parallel=true"
    warning = only(found(FIVE, None, parallel), "warning")
    assert "5 experts over 4 cards put 2 on one: 22.8 GB of experts in bfloat16 there, 14.3 GB" in warning.what
    assert not found(FIVE, None)
    assert not found(TWO, None, parallel)  # one each


def test_expert_parallelism_that_does_not_fit_is_an_error_with_what_would() -> None:
    error = only(found(FIVE, "4x4090d", "serving.enable_expert_parallel=true"), "error")
    assert error.what.startswith("23.8 GB of weights in bfloat16 and ")
    assert "no serving.enable_expert_parallel" in error.fix
    assert not found(FIVE, "4x4090d")


def test_weights_that_do_not_fit_are_an_error_and_fp8_does() -> None:
    one = "serving.tensor_parallel_size=1"
    error = only(found(TWO, "24gb", one), "error")
    assert error.where == "serving"
    assert error.what.startswith("26.6 GB of weights in bfloat16 and ")
    assert "serving.quantization fp8" in error.fix
    assert not found(TWO, "24gb", one, "serving.quantization=fp8")


def test_where_more_ways_would_do_they_are_proposed() -> None:
    error = only(found(FIVE, "4x4090d", "serving.tensor_parallel_size=2"), "error")
    assert "serving.tensor_parallel_size 4" in error.fix


def test_a_length_that_no_sequence_fits_is_an_error_and_the_proposed_one_fits() -> None:
    small = {"memory_gib": 19.5}
    findings = found(FIVE, "4x4090d", "serving.max_model_len=131072", "serving.yarn_factor=4", **small)
    error = only(findings, "error")
    assert error.where == "serving.max_model_len"
    proposed = re.search(r"serving.max_model_len (\d+) or less", error.fix)
    assert proposed
    longest = int(proposed[1])
    overrides = ("serving.sampling.max_tokens=8", "serving.yarn_factor=4")
    assert not found(FIVE, "4x4090d", f"serving.max_model_len={longest}", *overrides, **small)
    assert found(FIVE, "4x4090d", f"serving.max_model_len={longest + 1}", *overrides, **small)


def test_on_a_cpu_a_larger_cache_is_proposed_and_works() -> None:
    machine = {"memory_gib": 512.0}
    cache = "serving.cpu_kv_cache_bytes=134217728"
    error = only(found(TWO, "cpu", cache, **machine), "error")
    proposed = re.search(r"serving.cpu_kv_cache_bytes (\d+)", error.fix)
    assert proposed
    assert not found(TWO, "cpu", f"serving.cpu_kv_cache_bytes={proposed[1]}", **machine)


def test_fp8_needs_a_card_and_sixteen_bits() -> None:
    fp8 = "serving.quantization=fp8"
    findings = found(TWO, "cpu", fp8, "serving.cpu_kv_cache_bytes=4294967296", memory_gib=512.0)
    assert only(findings, "error").where == "serving.quantization"
    error = only(found(FIVE, "h200", fp8, "serving.dtype=float32", "serving.tensor_parallel_size=1"), "error")
    assert "serving.dtype is float32" in error.what
    assert only(found(FIVE, "4x4090d", fp8, fp8_tflops=None), "note").what.endswith("has no FP8 units")
    assert not found(FIVE, "4x4090d", fp8)
