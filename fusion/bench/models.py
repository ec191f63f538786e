"""Families to merge in a benchmark: noisy copies of a real model, layers of the 7B shapes, and sparse 7B files.

    python -m fusion.bench.models copies FOLDER 5 Qwen/Qwen2.5-Coder-1.5B-Instruct
    python -m fusion.bench.models layers FOLDER 5 Qwen/Qwen2.5-Coder-1.5B-Instruct 4
    python -m fusion.bench.models sparse FOLDER 5 Qwen/Qwen2.5-Coder-1.5B-Instruct

Each makes FOLDER/0, FOLDER/1, ...: the first is the anchor, the others differ from it in their MLPs. The last two take
the tokenizer of the model that is named, as all of the family have one.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusion.architecture import is_mlp
from fusion.checkpoint import write_json
from fusion.headers import PIECE, encode_header
from fusion.hub import resolve_model
from fusion.merge import copy_tokenizer
from fusion.plan.models import known_models
from fusion.progress import track
from fusion.reader import Reader
from fusion.shards import Entry, laid_out, write_shard
from fusion.sources import ModelSource

SHARD_BYTES = 4 * 10**9  # as the hub's 7B models are cut
B7 = "Qwen/Qwen2.5-7B-Instruct"


def copies(folder: Path, count: int, model: str) -> None:
    """`count` copies of a model; all but the first with the lowest bit of half their MLPs' numbers flipped."""
    source = resolve_model(model)
    reader = Reader(ModelSource("source", source))

    def pieces(name: str, number: int) -> Iterator[torch.Tensor]:
        torch.manual_seed(number)
        for piece in reader.pieces(name):
            if number and is_mlp(name):
                bits = piece.view(torch.int16)
                bits ^= torch.randint(0, 2, bits.shape, dtype=torch.int16)
            yield piece

    for number in track(range(count), "copies"):
        out = folder / str(number)
        out.mkdir(parents=True)
        entries = []
        for name in reader.names():
            place = reader.place(name)
            entries.append(Entry(name, place.dtype, place.shape, partial(pieces, name, number)))
        _write(out, entries)
        for file in ("config.json", "generation_config.json"):
            shutil.copyfile(source / file, out / file)
        copy_tokenizer(source, out)


def layers(folder: Path, count: int, tokenizer_of: str, depth: int) -> None:
    """`count` models of `depth` layers with the 7B's shapes, random numbers in them."""
    config = {**_config(), "num_hidden_layers": depth}

    def pieces(size: int, seed: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        block = torch.randn(min(size, PIECE), generator=generator).mul_(0.02).to(torch.bfloat16)
        for begin in range(0, size, PIECE):  # one block over and over: files are as large, and made in seconds
            yield block[: size - begin]

    shapes = _shapes(config)
    for number in track(range(count), "models"):
        out = folder / str(number)
        out.mkdir(parents=True)
        entries = [
            Entry(n, torch.bfloat16, s, partial(pieces, torch.Size(s).numel(), number + 1 if is_mlp(n) else 0))
            for n, s in shapes.items()
        ]
        _write(out, entries)
        write_json(out / "config.json", config)
        copy_tokenizer(resolve_model(tokenizer_of), out)


def sparse(folder: Path, count: int, tokenizer_of: str) -> None:
    """`count` full-size 7B models whose headers are real and whose numbers are holes in the files."""
    config = _config()
    entries = [Entry(n, torch.bfloat16, s, lambda: iter(())) for n, s in _shapes(config).items()]
    files = laid_out("model", entries, SHARD_BYTES)
    for number in range(count):
        out = folder / str(number)
        out.mkdir(parents=True)
        for file, tensors in files.items():
            header = encode_header({entry.name: (entry.dtype, entry.shape) for entry in tensors})
            (out / file).write_bytes(header)
            os.truncate(out / file, len(header) + sum(entry.nbytes for entry in tensors))
        _index(out, files)
        write_json(out / "config.json", config)
        copy_tokenizer(resolve_model(tokenizer_of), out)


def _config() -> dict[str, Any]:
    known = known_models()[B7].config
    assert known is not None
    return {**known, "architectures": ["Qwen2ForCausalLM"]}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _write(out: Path, entries: list[Entry]) -> None:
    files = laid_out("model", entries, SHARD_BYTES)
    for file, tensors in files.items():
        write_shard(out / file, tensors)
    _index(out, files)


def _index(out: Path, files: dict[str, list[Entry]]) -> None:
    if len(files) > 1:
        total = sum(entry.nbytes for entries in files.values() for entry in entries)
        weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


if __name__ == "__main__":
    kind, place, number, model, *depth = sys.argv[1:]
    if kind == "layers":
        layers(Path(place), int(number), model, int(depth[0]))
    else:
        {"copies": copies, "sparse": sparse}[kind](Path(place), int(number), model)
