"""Weights read into the page cache before they are wanted, from when the libraries are still being imported.

    with reading_ahead(weight_files(recipe)):
        from fusion import merge

torch, transformers and mergekit take seconds of one core to import, in which the disk would be idle; afterwards it is
kept busy while shared tensors are compared.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from fusion.errors import UserError
from fusion.hardware import available_memory
from fusion.recipe import Recipe
from fusion.sources import base_source, expert_sources, shared_expert_source

BLOCK = 2**24  # bytes that are read at a time
SHARE = 0.5  # of the memory that is available: what is read must still be there when it is wanted


def weight_files(recipe: Recipe) -> list[Path]:
    """The files that a merge reads, in its order; none where a model is not there, which the merge will tell."""
    try:
        shared = shared_expert_source(recipe)
        sources = [base_source(recipe), *expert_sources(recipe), *([shared] if shared else [])]
    except UserError:
        return []
    folders = dict.fromkeys(source.folder for source in sources)
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


@contextmanager
def reading_ahead(files: list[Path]) -> Iterator[None]:
    """Reads files in their order until the block ends, all are read, or they fill SHARE of the available memory."""
    stop = Event()
    thread = Thread(target=_read, args=(files, int(SHARE * available_memory()), stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read(files: list[Path], most: int, stop: Event) -> None:
    block = bytearray(BLOCK)
    for path in files:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # the merge will tell
            return
        try:
            while most > 0 and not stop.is_set() and (count := os.readv(descriptor, [block])):
                most -= count
        except OSError:
            return
        finally:
            os.close(descriptor)
