"""Folders in which an interrupted call goes on where it was, when it is made again.

One that is written file by file beside its place:

    with resumable_folder(target, key) as (aside, journal):
        if journal.verified("a.safetensors") is None:
            journal.record("a.safetensors", {"sha256": write_shard(aside / "a.safetensors", entries)})

A kill, Ctrl-C, power cut or full disk leaves the folder; the next call with the same `key` checks what is recorded by
hash and writes the rest. Any other error removes it: what is wrong will be wrong again.

And one that holds what a call has found so far:

    claim(aside, fingerprint)
    figures = noted(aside / "figures.json", measure)
    release(aside)
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion.checkpoint import file_hash, put_back, put_in_place, read_json, write_json
from fusion.errors import UserError
from fusion.progress import size

JOURNAL = ".journal.json"
CALL = "call.txt"  # in a claimed folder: whose it is


class Journal:
    """What an interrupted run has finished in `folder`: file -> a note with its `sha256`. Nothing of another `key`."""

    def __init__(self, folder: Path, key: str):
        self._folder, self._key = folder, key
        self._notes: dict[str, dict[str, Any]] = {}
        path = folder / JOURNAL
        if path.is_file():
            said = read_json(path)
            self._notes = said["files"] if said["key"] == key else {}

    def finished_bytes(self) -> int:
        """The size of the recorded files."""
        return sum(path.stat().st_size for name in self._notes if (path := self._folder / name).is_file())

    def verified(self, name: str) -> dict[str, Any] | None:
        """The note of a file that was recorded and still has its hash; None otherwise."""
        note = self._notes.get(name)
        path = self._folder / name
        return note if note and path.is_file() and file_hash(path) == note["sha256"] else None

    def record(self, name: str, note: dict[str, Any]) -> None:
        """Notes that a file is complete, on the disk."""
        self._notes[name] = note
        write_json(self._folder / JOURNAL, {"key": self._key, "files": self._notes})

    def check_room(self, wanted: int) -> None:
        """Raises UserError unless the disk has room for what is left of `wanted` bytes."""
        left, free = wanted - self.finished_bytes(), shutil.disk_usage(self._folder).free
        if left > free:
            raise UserError(
                f"{self._folder.parent} has {size(free)} free and {size(left)} are to be written there: "
                "make room, or set 'output' to a folder on another disk"
            )


@contextmanager
def resumable_folder(target: Path, key: str) -> Iterator[tuple[Path, Journal]]:
    """A folder beside `target`, perhaps of an interrupted run, that takes target's place when the block has ended."""
    target.parent.mkdir(parents=True, exist_ok=True)
    put_back(target)
    aside = target.with_name(f".{target.name}.partial")
    if not (aside / JOURNAL).is_file() or read_json(aside / JOURNAL)["key"] != key:
        shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(exist_ok=True)
    try:
        journal = Journal(aside, key)
        yield aside, journal
        put_in_place(aside, target)
        (target / JOURNAL).unlink(missing_ok=True)
    except OSError as error:  # a full disk, say
        what = f"{target}: {(error.strerror or str(error)).lower()}"
        raise UserError(f"{what}; what is written so far is kept in {aside.name}, and the next try goes on") from error
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def claim(aside: Path, fingerprint: str) -> None:
    """Makes a folder this call's: what an earlier call with another fingerprint left there is removed."""
    note = aside / CALL
    if not note.is_file() or note.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        note.write_text(fingerprint, encoding="utf-8")


def noted(note: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, made once and kept as JSON in file `note`."""
    if not note.is_file():
        write_json(note, make())
    found: dict[str, Any] = read_json(note)
    return found


def release(aside: Path, note: str = CALL) -> None:
    """Removes a folder whose file `note` says what is in it: the note first, or a kill would leave half of one."""
    (aside / note).unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
