"""Findings on how the served model is spread over cards: what vLLM would refuse, what does not fit, and what would.

    for finding in check_parallel(recipe, config, profile):
        print(finding.sentence())

vLLM's own conditions (model_executor/models/qwen2_moe.py, layers/linear.py, layers/fused_moe/config.py): as many ways
as experts at most; query heads, MLP widths and padded vocabulary divide by the ways; key-value heads divide by the
ways, or the ways by them; an expert's width divides by the ways times the ranks unless experts stay whole.
"""

import math
from dataclasses import replace
from typing import Any

from fusion.plan.budget import (
    VOCABULARY_PADDING,
    Weight,
    group_card_bytes,
    serving_layout,
)
from fusion.plan.capacity import Capacity, capacities, served_dtype
from fusion.plan.findings import Finding
from fusion.plan.profile import HardwareProfile
from fusion.recipe import Recipe

WAYS = "serving.tensor_parallel_size"
STAGES = "serving.pipeline_parallel_size"
RANKS = "serving.data_parallel_size"
SPLIT = (WAYS, STAGES, RANKS)


def check_parallel(
    recipe: Recipe, config: dict[str, Any], weights: list[Weight], profile: HardwareProfile | None = None
) -> list[Finding]:
    """The findings on a fused `config` and its weights; with a `profile` also on what fits its cards."""
    found = _division(recipe, config, profile)
    if any(finding.severity == "error" for finding in found):
        return found  # nothing can be said of a split that cannot be
    found += _expert_parallel(recipe, config, weights, profile)
    if profile is None:
        return found
    return found + _quantization(recipe, config, profile) + _fits(recipe, config, weights, profile)


def obstacle(config: dict[str, Any], ways: int) -> str:
    """Why vLLM would not split the model `ways` ways, empty where it would."""
    keys = config["num_key_value_heads"]
    padded = math.ceil(config["vocab_size"] / VOCABULARY_PADDING) * VOCABULARY_PADDING
    if ways > config.get("num_experts", ways):
        return f"is more than the {config['num_experts']} experts"
    for key in ("num_attention_heads", "intermediate_size"):
        if config[key] % ways:
            return f"does not divide the anchor's {key} {config[key]}"
    if keys % ways and ways % keys:
        return f"neither divides nor is a multiple of the anchor's num_key_value_heads {keys}"
    if padded % ways:
        return f"does not divide the padded vocabulary of {padded}"
    return ""


def ways_that_work(config: dict[str, Any], most: int) -> list[int]:
    """The tensor-parallel sizes up to `most` that vLLM splits the model by."""
    return [ways for ways in range(1, most + 1) if not obstacle(config, ways)]


def _division(recipe: Recipe, config: dict[str, Any], profile: HardwareProfile | None) -> list[Finding]:
    ways, cards = recipe.serving.tensor_parallel_size, profile.cards if profile else 0
    works = ways_that_work(config, min(cards or config["num_experts"], config["num_experts"]))
    fix = f"set it to {_either(works)}"
    if said := obstacle(config, ways):
        return [Finding("error", WAYS, f"{ways} {said}", "vLLM cuts every one of them evenly", fix)]
    return _stages_and_ranks(recipe, config, profile) or _cards(recipe, profile, fix)


def _stages_and_ranks(recipe: Recipe, config: dict[str, Any], profile: HardwareProfile | None) -> list[Finding]:
    layout = serving_layout(recipe.serving)
    layers, width = config["num_hidden_layers"], config["moe_intermediate_size"]
    if layout.stages > layers:
        what = f"{layout.stages} stages are more than the anchor's {layers} layers"
        return [Finding("error", STAGES, what, "each stage has one at least", f"set it to {layers} or less")]
    if not layout.expert_parallel and width % layout.expert_ways:
        what = f"{layout.ways} ways x {layout.ranks} ranks do not divide an expert's width {width}"
        why = "vLLM cuts every expert over the cards of all ranks"
        return [Finding("error", RANKS, what, why, "set another, or serving.enable_expert_parallel to true")]
    if profile is not None and not profile.cards and layout.cards > layout.ways:
        where = STAGES if layout.stages > 1 else RANKS
        return [Finding("error", where, "vLLM's CPU build runs neither stages nor ranks", fix="set it to 1")]
    return []


def _cards(recipe: Recipe, profile: HardwareProfile | None, fix: str) -> list[Finding]:
    layout = serving_layout(recipe.serving)
    if profile is None or not 0 < profile.cards < layout.cards:
        return []
    if recipe.serving.distributed_executor_backend == "ray":
        if layout.ways <= profile.cards:
            return []
        what = f"{layout.ways} ways over machines of {profile.cards} cards each"
        why = "all cards of a layer add up their parts twice a layer, now over the network"
        fix = f"set it to the cards of one machine, and {STAGES} to the machines"
        return [Finding("warning", WAYS, what, why, fix)]
    if layout.ways == layout.cards:
        what = f"{layout.ways} ways need as many cards, {profile.name} has {profile.cards}"
        return [Finding("error", WAYS, what, "each way is a card of its own", fix)]
    what = (
        f"{layout.ways} ways x {layout.stages} stages x {layout.ranks} ranks need {layout.cards} cards, "
        f"{profile.name} has {profile.cards}"
    )
    if layout.ranks > 1:
        return [Finding("error", RANKS, what, "each has cards of its own on one machine", "take fewer")]
    fix = "take fewer, or set serving.distributed_executor_backend to ray where other machines have the rest"
    return [Finding("error", STAGES, what, "each has cards of its own", fix)]


def _expert_parallel(
    recipe: Recipe, config: dict[str, Any], weights: list[Weight], profile: HardwareProfile | None
) -> list[Finding]:
    layout = serving_layout(recipe.serving)
    experts, ways = config["num_experts"], layout.expert_ways
    if not layout.expert_parallel or ways == 1 or experts % ways == 0:
        return []
    dtype = served_dtype(recipe.serving, config["dtype"], profile is None or profile.native_bfloat16)
    whole, cut = (
        group_card_bytes(weights, config, each, recipe.serving.quantization or dtype, dtype)["experts"] / 1e9
        for each in (layout, replace(layout, expert_parallel=False))
    )
    what = (
        f"{experts} experts over {ways} cards put {math.ceil(experts / ways)} on one: {whole:.1f} GB of experts in "
        f"{recipe.serving.quantization or dtype} there, {cut:.1f} GB with every expert cut {ways} ways"
    )
    fix = "leave it out, so that tensor parallelism cuts every expert"
    return [
        Finding("warning", "serving.enable_expert_parallel", what, "the fullest card sets the KV cache of all", fix)
    ]


def _quantization(recipe: Recipe, config: dict[str, Any], profile: HardwareProfile) -> list[Finding]:
    if recipe.serving.quantization is None:
        return []
    where = "serving.quantization"
    if not profile.cards:
        why = "vLLM's CPU build has no kernel for experts of one FP8 scale each"
        return [Finding("error", where, f"fp8 cannot be served on {profile.name}", why, "set it to null")]
    if served_dtype(recipe.serving, config["dtype"]) == "float32":
        what = "fp8 goes with bfloat16 or float16, serving.dtype is float32"
        return [Finding("error", where, what, "vLLM's online quantisation takes no other", "set serving.dtype to auto")]
    if profile.fp8_tflops is None:
        why = "weights are unpacked to 16 bits as they are used: half the memory, no more speed in prefill"
        return [Finding("note", where, f"{profile.name} has no FP8 units", why)]
    return []


def _fits(recipe: Recipe, config: dict[str, Any], weights: list[Weight], profile: HardwareProfile) -> list[Finding]:
    rows = capacities(recipe, config, weights, profile)
    own = served_format(recipe, rows)
    length = recipe.serving.max_model_len
    if own is None or own.starts_with(length):
        return []
    fix = _what_would(recipe, config, weights, profile, rows, own)
    if own.kv_bytes <= 0:
        reserves = own.activations + own.graphs + own.other
        what = (
            f"{own.weights / 1e9:.1f} GB of weights in {own.weight_format} and {reserves / 1e9:.1f} GB of reserves do "
            f"not fit the {own.usable / 1e9:.1f} GB that vLLM may use of a card of {profile.name}"
        )
        return [Finding("error", "serving", what, "nothing is left for the KV cache", fix)]
    where = "serving.max_model_len"
    what = (
        f"no sequence of {length} tokens fits {profile.name}: {own.kv_bytes / 1e9:.2f} GB are left for the KV cache, "
        f"room for {own.longest} tokens"
    )
    return [Finding("error", where, what, "vLLM does not start where not one does", fix)]


def served_format(recipe: Recipe, rows: list[Capacity]) -> Capacity | None:
    """The capacity in the format that the recipe serves; None where the machine cannot have it."""
    wanted = recipe.serving.quantization
    return next((row for row in rows if row.weight_format == wanted or wanted is None), None)


def _what_would(
    recipe: Recipe,
    config: dict[str, Any],
    weights: list[Weight],
    profile: HardwareProfile,
    rows: list[Capacity],
    own: Capacity,
) -> str:
    """What makes one full sequence fit: each change alone, in words of the recipe."""
    serving, ways = recipe.serving, []
    if own.longest:
        ways.append(f"serving.max_model_len {own.longest} or less")
    if not profile.cards:
        need = math.ceil((serving.max_model_len + 128) / 128) * 128 * own.kv_bytes_per_token
        if own.weights + own.activations + need <= own.usable:
            ways.append(f"serving.cpu_kv_cache_bytes {need}")
    if serving.enable_expert_parallel and _starts(recipe, config, weights, profile, enable_expert_parallel=False):
        ways.append("no serving.enable_expert_parallel")
    for row in rows:
        if row is not own and row.starts_with(serving.max_model_len):
            fp8 = row.weight_format == "fp8"
            ways.append(
                "serving.quantization fp8" if fp8 else "a checkpoint quantised to 4 bits (qwen-fusion quantize)"
            )
    layout = serving_layout(serving)
    for size in ways_that_work(config, profile.cards // (layout.stages * layout.ranks))[::-1]:
        if size > serving.tensor_parallel_size and _starts(recipe, config, weights, profile, tensor_parallel_size=size):
            ways.append(f"{WAYS} {size}")
            break
    return "what would: " + ", or ".join(ways) if ways else "take more or larger cards"


def _starts(
    recipe: Recipe, config: dict[str, Any], weights: list[Weight], profile: HardwareProfile, **changes: Any
) -> bool:
    """Whether the recipe's format would start with another serving section."""
    changed = recipe.model_copy(update={"serving": recipe.serving.model_copy(update=changes)})
    own = served_format(changed, capacities(changed, config, weights, profile))
    return own is not None and own.starts_with(recipe.serving.max_model_len)


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
