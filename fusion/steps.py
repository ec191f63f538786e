"""Steps that are skipped when nothing they depend on has changed.

A step is recorded under a hash of its recipe section and its input files once it has completed; its outputs are in
place by then, because every writer writes aside and renames.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusion.checkpoint import file_hash, write_json
from fusion.errors import UserError
from fusion.progress import console, track
from fusion.sections.section import Section
from fusion.workers import one_thread, worker_context

STATE = "steps.json"
HASHED_WHOLE = 64 * 2**20  # bytes; larger files are told apart by size and time of change


@dataclass(frozen=True)
class Step:
    """One step of the road: what it depends on, what it leaves behind, and what it does."""

    name: str
    settings: Any  # recipe sections and other plain values
    inputs: Sequence[Path]  # files and folders
    outputs: Sequence[Path]
    action: Callable[[], str | None]  # may return a line on what it did


def run_step(step: Step, folder: Path, force: bool = False) -> bool:
    """Carries out `step` unless its record in `folder` matches and its outputs exist; says which. True where it ran."""
    return run_steps([step], folder, force)


def run_steps(steps: Sequence[Step], folder: Path, force: bool = False, at_once: int = 1) -> bool:
    """Carries out those of `steps` that have to be, `at_once` of them side by side; True where any ran.

    Steps side by side are in processes of one thread each, and their actions have to be picklable. The first error
    is raised once the steps under way have ended.
    """
    due = {step.name: (step, step_hash(step)) for step in steps}
    records = _read(folder)
    for step in steps:
        current = records.get(step.name) == due[step.name][1] and all(path.exists() for path in step.outputs)
        if current and not force:
            console.print(f"[dim]{step.name}: unchanged, skipped[/dim]", highlight=False)
            del due[step.name]
    forget(folder, list(due))
    if min(at_once, len(due)) > 1:
        _side_by_side(due, folder, at_once)
    else:
        for step, digest in due.values():
            console.print(f"[bold]{step.name}[/bold]", highlight=False)
            _record(folder, step.name, digest, step.action())
    return bool(due)


def _side_by_side(due: dict[str, tuple[Step, str]], folder: Path, at_once: int) -> None:
    console.print(f"[bold]{', '.join(due)}[/bold]", highlight=False, soft_wrap=True)
    with ProcessPoolExecutor(at_once, worker_context(), one_thread) as pool:
        running = {pool.submit(step.action): (step, digest) for step, digest in due.values()}
        try:
            for future in track(as_completed(running), f"{at_once} side by side", len(due), "steps"):
                step, digest = running[future]
                _record(folder, step.name, digest, future.result())
        except BrokenProcessPool:
            why = "a worker process was killed, as a rule for want of memory: lower branches_at_once"
            raise UserError(why) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _record(folder: Path, name: str, digest: str, line: str | None) -> None:
    with _records(folder) as records:
        records[name] = digest
    if line:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def forget(folder: Path, names: Sequence[str]) -> None:
    """Removes the records of steps whose outputs another step has just replaced."""
    with _records(folder) as records:
        for name in names:
            records.pop(name, None)


def is_current(step: Step, folder: Path) -> bool:
    """Whether the record in `folder` is of the step as it is: settings and input files as they were when it ran."""
    return _read(folder).get(step.name) == step_hash(step)


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


def lock(folder: Path, name: str) -> FileLock:
    """Held by one of the commands at work on `folder` at a time; the file lies with this machine's temporary ones."""
    place = hashlib.sha256(f"{folder.resolve()} {name}".encode()).hexdigest()[:32]
    return FileLock(Path(tempfile.gettempdir()) / f"qwen-fusion-{place}.lock")


@contextmanager
def taken(held: FileLock, busy: str) -> Iterator[None]:
    """Holds a lock, and says that it is `busy` where that takes waiting."""
    try:
        held.acquire(timeout=0)
    except Timeout:
        console.print(busy, highlight=False, soft_wrap=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def _records(folder: Path) -> Iterator[dict[str, str]]:
    """The records, to be changed and written back; commands at work on other experts of the folder wait."""
    with lock(folder, "records"):
        records = _read(folder)
        before = dict(records)
        yield records
        if records != before:
            write_json(folder / STATE, records)
