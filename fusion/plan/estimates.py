"""Bytes and times of the road's heavy steps, and the limits of the served model's speed, from a profile's rates.

    estimate(recipe, anchor_config, profile).decode_tokens_s

A time is what the disk, the link or the card's rate allows at best, a speed likewise: bounds, not promises.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from fusion.errors import UserError
from fusion.headers import PIECE
from fusion.hub import resolve_model
from fusion.plan.alternatives import dense_config
from fusion.plan.budget import (
    DTYPE_BYTES,
    Weight,
    active_parameters,
    card_bytes,
    model_weights,
    planned_config,
    serving_layout,
)
from fusion.plan.capacity import formats, served_dtype
from fusion.plan.profile import GB, HardwareProfile
from fusion.recipe import Recipe
from fusion.sections.fusing import Expert
from fusion.shards import IN_FLIGHT

LIBRARIES = 530_000_000  # bytes resident in all at the peak of `merge` on the demo, whose tensors are small
PIECES = IN_FLIGHT + 1  # that the merge holds: those under way, and the one being read


@dataclass(frozen=True)
class Disk:
    """What a step leaves on the disk, in bytes, and what it needs there while it runs beyond that."""

    step: str
    stays: int
    meanwhile: int = 0


@dataclass(frozen=True)
class Speed:
    """The most tokens a second that the card's rates allow in a weight format, over all cards of one engine.

    `decode` is one sequence, for which all active weights are read for every token; batches share that reading.
    `prefill` counts two operations a token and active parameter.
    """

    weight_format: str
    decode: float
    prefill: float


@dataclass(frozen=True)
class Estimate:
    """Bounds by the profile's rates: bytes, seconds at least, tokens a second at most."""

    disk: tuple[Disk, ...]
    disk_bytes: int
    merge_reads: int
    merge_writes: int
    merge_s: float
    merge_memory: int
    load_s: float
    speeds: tuple[Speed, ...]

    def as_dict(self) -> dict[str, Any]:
        """The estimate as plain data."""
        return asdict(self)


def estimate(recipe: Recipe, anchor_config: dict[str, Any], profile: HardwareProfile) -> Estimate:
    """The bounds for a recipe on a machine. Times of training are not estimated: they depend on data and method."""
    dense = dense_config(anchor_config)
    fused = planned_config(recipe, anchor_config)
    dense_weights, fused_weights = model_weights(dense), model_weights(fused)
    one = sum(weight.count for weight in dense_weights) * DTYPE_BYTES[dense["dtype"]]
    written = sum(weight.count for weight in fused_weights) * DTYPE_BYTES[fused["dtype"]]
    experts = sum(weight.count for weight in fused_weights if weight.group in ("experts", "shared_expert"))
    shared = sum(weight.count for weight in dense_weights if weight.group != "dense_mlps")
    compared = sum(map(partial(_compared, recipe), recipe.experts))
    read = written + compared * shared * DTYPE_BYTES[dense["dtype"]]
    disk = (
        Disk("models to download", one * sum(not _is_here(model) for model in _models(recipe))),
        *_trained(recipe, dense_weights, one),
        Disk("shared parts", 0 if recipe.shared.is_anchor else one),  # a whole model, with the anchor's MLPs
        Disk("merge", written),
        # the shards of attention and norms, and the gates, as the merge left them, beside the healed ones: at most
        # all but the experts, as embeddings and head lie in the same shards or in their own
        Disk("heal", written - experts * DTYPE_BYTES[fused["dtype"]] if recipe.heal else 0),
    )
    loaded = card_bytes(fused_weights, fused, serving_layout(recipe.serving), fused["dtype"], fused["dtype"])
    return Estimate(
        disk=tuple(row for row in disk if row.stays or row.meanwhile),
        disk_bytes=sum(row.stays for row in disk) + max(row.meanwhile for row in disk),
        merge_reads=read,
        merge_writes=written,
        merge_s=read / (profile.disk_read_gb_s * GB) + written / (profile.disk_write_gb_s * GB),
        merge_memory=merge_memory(recipe, dense_weights, DTYPE_BYTES[dense["dtype"]]),
        load_s=max(written / (profile.disk_read_gb_s * GB), loaded / (profile.link_gb_s * GB)),
        speeds=_speeds(recipe, fused, fused_weights, profile),
    )


def merge_memory(recipe: Recipe, dense_weights: list[Weight], width: int) -> int:
    """The merge's peak of resident memory, elements of `width` bytes: libraries, pieces under way, and the largest
    tensor that an adapter is applied to, in float32 with its change beside it.

    Experts whose shared parts are compared with the anchor's are read one after the other: one more piece for all.
    """
    piece = min(PIECE, max(weight.count for weight in dense_weights)) * width
    pieces = PIECES + any(_compared(recipe, expert) for expert in recipe.experts)
    adapted = any(expert.adapter or (expert.branch and expert.branch.lora_rank) for expert in recipe.experts)
    largest = max(weight.count for weight in dense_weights if weight.group in ("dense_mlps", "attention"))
    return LIBRARIES + pieces * piece + (2 * 4 * largest if adapted else 0)


def _compared(recipe: Recipe, expert: Expert) -> bool:
    """Whether the merge reads an expert's shared parts too, to say whether they are the anchor's."""
    if expert.branch and not expert.anchor:
        return not expert.branch.lora_rank
    return bool(expert.anchor) or expert.model != recipe.anchor.model


def _models(recipe: Recipe) -> list[str]:
    """The models that the recipe names, each once."""
    names = [recipe.anchor.model, *(expert.model for expert in recipe.experts)]
    shared = recipe.routing.shared_expert
    if shared not in (None, "anchor", *(expert.name for expert in recipe.experts)):
        names.append(shared)
    return list(dict.fromkeys(name for name in names if name))


def _is_here(model: str) -> bool:
    try:
        resolve_model(model, allow_download=False)
    except UserError:
        return False
    return True


def _trained(recipe: Recipe, dense_weights: list[Weight], one: int) -> list[Disk]:
    """What branches and anchored experts leave, and what the largest of them needs meanwhile."""
    trained = [Disk("anchor", one)] if recipe.anchor.pretrain else []
    for expert in recipe.experts:
        if expert.branch and expert.branch.lora_rank:
            adapter = sum(expert.branch.lora_rank * sum(w.shape) for w in dense_weights if w.group == "dense_mlps")
            trained.append(Disk(f"branch {expert.name}", adapter * 4))  # saved in float32
        elif expert.branch:
            trained.append(Disk(f"branch {expert.name}", one))
        if expert.anchor:
            trained.append(Disk(f"anchor {expert.name}", one, meanwhile=one))  # the start, until the result is in place
    return trained


def _speeds(
    recipe: Recipe, config: dict[str, Any], weights: list[Weight], profile: HardwareProfile
) -> tuple[Speed, ...]:
    layout = replace(serving_layout(recipe.serving), stages=1)  # a token passes all stages, one after another
    dtype = served_dtype(recipe.serving, config["dtype"], profile.native_bfloat16)
    idle = 1 - config["num_experts_per_tok"] / config["num_experts"]
    tied = config.get("tie_word_embeddings", False)
    table = 0 if tied else sum(weight.count for weight in weights if weight.group == "embeddings")
    passed = active_parameters(weights, config) - table  # of the embeddings a row is read, unless they are the head
    experts = [weight for weight in weights if weight.group == "experts"]
    tables = [weight for weight in weights if weight.group == "embeddings" and not tied]
    speeds = []
    for weight_format in formats(profile, dtype):
        held = card_bytes(weights, config, layout, weight_format, dtype)
        unread = card_bytes(tables, config, layout, weight_format, dtype)
        unread += int(idle * card_bytes(experts, config, layout, weight_format, dtype))
        fast = profile.fp8_tflops if weight_format == "fp8" and profile.fp8_tflops else profile.bfloat16_tflops
        ways = layout.ways if profile.cards else 1
        read = (held - unread) * (1 if profile.cards else layout.ways)  # CPU workers share one memory
        speeds.append(Speed(weight_format, profile.memory_gb_s * GB / read, ways * fast * 1e12 / (2 * passed)))
    return tuple(speeds)
