"""What a quantisation needs of memory, GPU and disk, by the headers of the checkpoint's files, and whether it is there.

in_memory = check_room(needed(checkpoint, "w4a16", tokens), out)
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusion.architecture import layer_of
from fusion.errors import UserError
from fusion.hardware import available_memory, compute_dtype
from fusion.headers import TensorPlace, tensor_places
from fusion.progress import console, size

GROUP_SIZES = (128, 64, 32)  # weights that share a scale in 4 bits, and for which vLLM has kernels
SHARD_BYTES = 2 * 2**30  # of the result's files
BITS = {"fp8": 8, "w4a16": 4 + 16 / 32}  # of a weight with its share of a scale, at most
PROGRAM_BYTES = 3 * 10**9  # of torch, transformers and llm-compressor
PROJECTIONS = tuple(f".{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True)
class Need:
    """The bytes that a quantisation takes: of memory beside the weights that can lie on disk, of a GPU's where there is
    one, those weights', and of disk for the result as llm-compressor writes it and as it stays."""

    memory: int
    gpu: int
    model: int
    disk: int


def needed(checkpoint: Path, scheme: str, tokens: int) -> Need:
    """What quantising `checkpoint` on `tokens` calibration tokens takes.

    All is computed in `computed_in`, and everything but the layer at work can lie on disk. GPTQ also keeps that layer's
    Hessians, which lie on the GPU where there is one, and the hidden states of all tokens before and after it.
    """
    places = tensor_places(checkpoint)
    stored = sum(place.nbytes for place in places.values())
    layers: dict[int | None, int] = {}  # None: what belongs to none
    for name, place in places.items():
        size = place.nbytes if computed_in() == "auto" else torch.Size(place.shape).numel() * torch.float32.itemsize
        layers[layer_of(name)] = layers.get(layer_of(name), 0) + size
    model, outside = sum(layers.values()), layers.pop(None)
    linear = {name: place for name, place in places.items() if name.endswith(PROJECTIONS)}
    saved = sum(place.nbytes - int(place.shape[0] * place.shape[1] * BITS[scheme] / 8) for place in linear.values())
    layer = 2 * max(layers.values())
    hessians = _hessian_bytes(linear) if scheme == "w4a16" else 0
    on_gpu = torch.cuda.is_available()
    memory = PROGRAM_BYTES + outside + layer + (0 if on_gpu else hessians)
    if scheme == "w4a16":
        hidden = next(place.shape[1] for name, place in linear.items() if name.endswith(".q_proj.weight"))
        memory += SHARD_BYTES + 2 * tokens * hidden * torch.float32.itemsize
    else:
        files = {place.file for place in places.values()}
        memory = max(memory, PROGRAM_BYTES + 3 * max(file.stat().st_size for file in files))
    return Need(memory, layer + hessians if on_gpu else 0, model, 2 * (stored - saved))


def computed_in() -> str:
    """The dtype that llm-compressor loads a model in: float32 on a CPU that would have to emulate bfloat16, otherwise
    `auto`, the checkpoint's own."""
    return "float32" if compute_dtype() == torch.float32 else "auto"


def _hessian_bytes(linear: dict[str, TensorPlace]) -> int:
    """Of the layer with the most: a float32 Hessian `(inputs, inputs)` a weight, and four times the largest to invert
    it and to quantise by it."""
    elements: dict[int | None, int] = {}
    for name, place in linear.items():
        elements[layer_of(name)] = elements.get(layer_of(name), 0) + place.shape[1] ** 2
    largest = max(place.shape[1] for place in linear.values()) ** 2
    return (max(elements.values()) + 4 * largest) * torch.float32.itemsize


def check_room(need: Need, out: Path) -> int:
    """How many bytes of the model may be in memory. Raises UserError where memory, GPU or disk are too small."""
    free = available_memory()
    if free < need.memory:
        raise UserError(
            f"{need.memory / 1e9:.1f} GB of memory are needed (for the largest layer and what is computed on it, all "
            f"else lies on disk) and {free / 1e9:.1f} GB are available: use a machine with more"
        )
    if need.gpu and (on_card := torch.cuda.mem_get_info()[0]) < need.gpu:
        raise UserError(
            f"{need.gpu / 1e9:.1f} GB of the GPU are needed for the layer at work and {on_card / 1e9:.1f} GB are free: "
            "free some, or hide the GPU (CUDA_VISIBLE_DEVICES=) to compute on the CPU"
        )
    in_memory = free - need.memory
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    wanted, left = need.disk + 2 * max(0, need.model - in_memory), shutil.disk_usage(place).free
    if left < wanted:
        raise UserError(
            f"{place} has {size(left)} free and {size(wanted)} are needed, for the result in two forms "
            "and what does not fit into memory: make room, or name another place with --out"
        )
    return in_memory


def group_size_of(config: dict[str, Any]) -> int:
    """How many weights of a row share a scale in 4 bits: the largest of GROUP_SIZES that divides every input width.

    Raises UserError where none does.
    """
    widths = {name: config[name] for name in ("hidden_size", "moe_intermediate_size")}
    if config["mlp_only_layers"]:
        widths["intermediate_size"] = config["intermediate_size"]
    for group in GROUP_SIZES:
        if not any(width % group for width in widths.values()):
            if group != GROUP_SIZES[0]:
                console.print(f"  groups of {group} weights: {GROUP_SIZES[0]} do not divide the model's widths")
            return group
    smallest = GROUP_SIZES[-1]
    name, width = next((name, width) for name, width in widths.items() if width % smallest)
    raise UserError(f"{name} {width} is no multiple of {smallest}, the smallest group of w4a16: use --scheme fp8")
