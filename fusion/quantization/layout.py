"""The files of a quantised checkpoint: what transformers needs beside the original's, and llm-compressor's tensors in
the shard groups of a merge, so that new gates still rewrite megabytes."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fusion.architecture import GATES_FILE, MANIFEST, shared_expert_tensor
from fusion.checkpoint import INDEX, Checkpoint, file_hash, read_json, write_json
from fusion.headers import tensor_places, write_index
from fusion.merge import SMALL_FILES, TOKENIZER_FILES
from fusion.quantization.needs import SHARD_BYTES
from fusion.shards import write_shards

FROM_A_WEIGHT = re.compile(r"\.weight_(?:packed|scale|shape)$")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHARD_NUMBER = re.compile(r"(?:\.\d{5})?\.safetensors$")
COPIED = ("generation_config.json", "recipe.yaml", "mergekit_moe_config.yml", *TOKENIZER_FILES)


def complete_view(checkpoint: Path, folder: Path) -> Path:
    """Links to a checkpoint's files, and the tensors of a shared expert of size 0 that transformers expects.

    vLLM refuses a checkpoint that holds them; where they are missing, transformers cannot offload to disk.
    """
    folder.mkdir(parents=True)
    opened = Checkpoint(checkpoint)
    config, weight_map = opened.config, dict(opened.weight_map)
    for name in {*weight_map.values(), *SMALL_FILES}:
        if (checkpoint / name).is_file():
            (folder / name).symlink_to((checkpoint / name).resolve())
    if not config["shared_expert_intermediate_size"]:
        dtype, hidden = getattr(torch, config["dtype"]), config["hidden_size"]
        shapes = {"gate_proj": (0, hidden), "up_proj": (0, hidden), "down_proj": (hidden, 0)}
        empty = {
            shared_expert_tensor(f"model.layers.{layer}.mlp.{part}.weight"): torch.zeros(shape, dtype=dtype)
            for layer in range(config["num_hidden_layers"])
            if layer not in config["mlp_only_layers"]
            for part, shape in shapes.items()
        }
        save_file(empty, folder / "empty.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(empty, "empty.safetensors")
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return folder


def regroup(raw: Path, checkpoint: Path, out: Path) -> None:
    """Writes llm-compressor's tensors in `raw` to `out`, in the shard groups of `checkpoint`, without empty ones.

    What is no weight of its own any more keeps the weight's dtype: it may have been computed in float32.
    """
    original, made, places = Checkpoint(checkpoint), Checkpoint(raw), tensor_places(checkpoint)
    groups = {name: SHARD_NUMBER.sub("", file) for name, file in original.weight_map.items()}
    by_group: dict[str, list[str]] = {group: [] for group in groups.values()}
    for name, place in tensor_places(raw).items():
        if place.nbytes:
            by_group[groups[FROM_A_WEIGHT.sub(".weight", name)]].append(name)

    def tensors(names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            tensor, dtype = made.tensor(name), places[FROM_A_WEIGHT.sub(".weight", name)].dtype
            yield name, tensor.to(dtype) if tensor.dtype in FLOATS else tensor

    weight_map: dict[str, str] = {}
    for group, names in by_group.items():
        weight_map |= write_shards(out, group, tensors(names), SHARD_BYTES)
    write_index(out, weight_map)


def copy_papers(checkpoint: Path, out: Path) -> None:
    """Copies tokenizer, generation config, recipe and the merge's own terms."""
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)


def write_manifest(checkpoint: Path, out: Path, made: dict[str, Any]) -> None:
    """Writes the original's manifest with the hashes of the new files, how they were `made`, and the original's."""
    manifest = read_json(checkpoint / MANIFEST)
    hashes = {path.name: file_hash(path) for path in sorted(out.glob("*.safetensors"))}
    gates = {**manifest["gates"], "sha256": hashes.pop(GATES_FILE)}
    original = {
        "name": checkpoint.resolve().name,
        "manifest_sha256": file_hash(checkpoint / MANIFEST),
        "sha256": {**manifest["sha256"], GATES_FILE: manifest["gates"]["sha256"]},
    }
    files = {**manifest["files"], "config.json": file_hash(out / "config.json")}
    changed = {"gates": gates, "sha256": hashes, "files": files, "quantized": {**made, "original": original}}
    write_json(out / MANIFEST, {**manifest, **changed})


def weight_bytes(folder: Path) -> int:
    """The bytes of a folder's weight files."""
    return sum((folder / file).stat().st_size for file in set(Checkpoint(folder).weight_map.values()))
