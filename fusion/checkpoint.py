"""Folders of safetensors: read lazily, written shard by shard, and put in place whole or not at all.

Checkpoint(Path("runs/demo/fused")).tensor("model.norm.weight")
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fusion.errors import UserError

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A model folder of safetensors whose tensors are read one at a time.

    Raises UserError where the folder holds pickled weights, remote code, or a file that cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        if "auto_map" in self.config:
            raise UserError(
                f"{folder} needs code of its own (auto_map in config.json): only native architectures are used"
            )
        self.weight_map = self._weight_map()
        self._open: tuple[str, Any] = ("", None)  # the shard last read; the others' pages go back to the kernel

    def _weight_map(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            weight_map: dict[str, str] = read_json(self.folder / INDEX).get("weight_map", {})
            if not weight_map:
                raise UserError(f"{self.folder / INDEX} names no tensors: download the model again")
            missing = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
            if missing:
                raise UserError(f"{self.folder} lacks {missing[0]}, which its index names: download the model again")
            return weight_map
        single = self.folder / "model.safetensors"
        if single.is_file():
            with open_safetensors(single) as file:
                return dict.fromkeys(file.keys(), single.name)
        if list(self.folder.glob("*.bin")):
            raise UserError(
                f"{self.folder} holds pickled weights (*.bin): convert them with transformers' "
                "save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{self.folder} holds no model.safetensors and no {INDEX}: name a folder with a model")

    def _handle(self, name: str) -> Any:
        try:
            file = self.weight_map[name]
        except KeyError:
            raise UserError(f"{self.folder} has no tensor '{name}': it is not the model its config.json says") from None
        if self._open[0] != file:
            self._open = (file, open_safetensors(self.folder / file))
        return self._open[1]

    def __contains__(self, name: str) -> bool:
        return name in self.weight_map

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, read from its shard."""
        tensor: torch.Tensor = self._handle(name).get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, from the header alone."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, under the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.weight_map if name.startswith(prefix)}


def weight_stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a folder's weights: tells that they are others without reading them."""
    files = sorted(folder.glob("[!.]*.safetensors"))  # what is being written aside begins with a dot
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def open_safetensors(path: Path) -> Any:
    """A safetensors file, opened for lazy reading. Raises UserError where it is broken."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is truncated or no safetensors file") from error


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a complete folder") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside and renames, so that a reader never sees half of it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[Any]:
    """The rows of a JSON lines file; a line feed alone ends a line, as texts may hold other breaks. Raises as json."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes rows as JSON lines, aside, and renames; a value that is none of JSON's is written as its text."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes text aside and renames."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write one file to; it takes path's place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where what can be made again is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwen-fusion"


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` to write into; it takes target's place when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    put_back(target)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        put_in_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(aside: Path, target: Path) -> None:
    """Renames folder `aside` to `target`; an older `target` is moved away first and removed last."""
    put_back(target)
    old = _moved_away(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def link_file(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk has no such links; written files replace names."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def put_back(target: Path) -> None:
    """Undoes half of `put_in_place`: a kill between its two renames has left the older folder moved away."""
    if not target.exists() and _moved_away(target).is_dir():
        _moved_away(target).rename(target)


def _moved_away(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """The hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
