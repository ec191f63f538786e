"""Steps that are skipped when nothing they depend on has changed.

A step is recorded under a hash of its recipe section and its input files once it has completed; its outputs are in
place by then, because every writer writes aside and renames.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.checkpoint import file_hash, write_json
from fusion.progress import console
from fusion.recipe import Section

STATE = "steps.json"
HASHED_WHOLE = 64 * 2**20  # bytes; larger files are told apart by size and time of change


@dataclass(frozen=True)
class Step:
    """One step of the road: what it depends on, what it leaves behind, and what it does."""

    name: str
    settings: Any  # recipe sections and other plain values
    inputs: Sequence[Path]  # files and folders
    outputs: Sequence[Path]
    action: Callable[[], None]


def run_step(step: Step, folder: Path, force: bool = False) -> bool:
    """Carries out `step` unless its record in `folder` matches and its outputs exist; says which. True where it ran."""
    records = _read(folder)
    digest = step_hash(step)
    if not force and records.get(step.name) == digest and all(path.exists() for path in step.outputs):
        console.print(f"[dim]{step.name}: unchanged, skipped[/dim]", highlight=False)
        return False
    console.print(f"[bold]{step.name}[/bold]", highlight=False)
    _write(folder, {name: value for name, value in records.items() if name != step.name})
    step.action()
    _write(folder, {**_read(folder), step.name: digest})
    return True


def forget(folder: Path, names: Sequence[str]) -> None:
    """Removes the records of steps whose outputs another step has just replaced."""
    _write(folder, {name: value for name, value in _read(folder).items() if name not in names})


def step_hash(step: Step) -> str:
    """The hash of a step's settings and input files."""
    digest = hashlib.sha256(json.dumps(_plain(step.settings), sort_keys=True, ensure_ascii=False).encode())
    for path in step.inputs:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.name} {_fingerprint(file)}\n".encode())
    return digest.hexdigest()


def _fingerprint(file: Path) -> str:
    stat = file.stat()
    return file_hash(file) if stat.st_size <= HASHED_WHOLE else f"{stat.st_size} {stat.st_mtime_ns}"


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _read(folder: Path) -> dict[str, str]:
    try:
        records = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def _write(folder: Path, records: dict[str, str]) -> None:
    write_json(folder / STATE, records)
