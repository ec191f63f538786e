"""A healed checkpoint's files: written in the place of the merge's, which are kept beside it and can be put back."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fusion.architecture import GATES_FILE, MANIFEST, gate_tensor
from fusion.checkpoint import Checkpoint, file_hash, link_file, read_json, staged_folder, write_json
from fusion.layers import Gates
from fusion.merge import checkpoint_dtype, write_gates, write_papers
from fusion.recipe import Recipe
from fusion.shards import entries_of, write_shard


def is_healed(folder: Path) -> bool:
    """Whether the fused checkpoint's shared parts are healed ones, by its manifest."""
    return "healed" in read_json(folder / MANIFEST)


def restore(folder: Path, kept: Path) -> None:
    """Puts the files that healing replaced back into the fused checkpoint, all at once; none where it is not healed."""
    if is_healed(folder):
        with staged_folder(folder) as aside:
            _link_merged(folder, kept, aside)
    shutil.rmtree(kept, ignore_errors=True)


@contextmanager
def as_merged(folder: Path, kept: Path) -> Iterator[Path]:
    """The fused checkpoint as merge and train-gates left it: a folder of links to its files where it is healed."""
    if not is_healed(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        _link_merged(folder, kept, Path(aside))
        yield Path(aside)


def _link_merged(folder: Path, kept: Path, aside: Path) -> None:
    for path in folder.iterdir():
        link_file(kept / path.name if (kept / path.name).is_file() else path, aside / path.name)


def write_healed(
    recipe: Recipe, folder: Path, kept: Path, tensors: dict[str, torch.Tensor], gates: Gates, note: dict[str, Any]
) -> None:
    """Puts a folder with the healed tensors and gates in the checkpoint's place; what they replace goes to `kept`."""
    checkpoint = Checkpoint(folder)
    shards = {checkpoint.weight_map[name] for name in tensors}
    changed = {*shards, GATES_FILE, MANIFEST}
    with staged_folder(kept) as aside:
        for name in changed:
            link_file(folder / name, aside / name)
    with staged_folder(folder) as aside:
        for path in folder.iterdir():
            if path.name not in changed:
                link_file(path, aside / path.name)
        for shard in sorted(shards):
            names = [name for name, file in checkpoint.weight_map.items() if file == shard]
            whole = {name: tensors[name] if name in tensors else checkpoint.tensor(name) for name in names}
            write_shard(aside / shard, entries_of(whole.items()))
        dtype = getattr(torch, checkpoint_dtype(folder))
        write_gates(aside, {gate_tensor(layer): gate for layer, gate in gates.items()}, dtype)
        manifest = read_json(folder / MANIFEST)
        manifest["sha256"] |= {shard: file_hash(aside / shard) for shard in shards}
        trained = manifest["gates"]
        manifest["gates"] = {
            **trained,
            "method": f"{trained['method']}, then healing",
            "sha256": file_hash(aside / GATES_FILE),
        }
        write_json(aside / MANIFEST, {**manifest, "healed": note})
        write_papers(recipe, aside)
