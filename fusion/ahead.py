"""Weights read into the page cache before they are wanted, from when the libraries are still being imported.

    with reading_ahead(merged_parts(recipe)):
        from fusion import merge

torch, transformers and mergekit take seconds of one core to import, in which the disk would be idle; afterwards it is
kept busy while shared tensors are compared.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from fusion.architecture import is_mlp
from fusion.errors import UserError
from fusion.hardware import available_memory
from fusion.headers import tensor_places
from fusion.hub import resolve_model
from fusion.recipe import Recipe
from fusion.sources import base_source, expert_sources, shared_expert_source

BLOCK = 2**24  # bytes that are read at a time
SHARE = 0.5  # of the memory that is available: what is read must still be there when it is wanted


class Part(NamedTuple):
    """Bytes `begin` to `end` of a file."""

    file: Path
    begin: int
    end: int


def merged_parts(recipe: Recipe) -> list[Part]:
    """What a merge reads, in its order: the base, then the experts' MLPs; none where a model is missing or broken.

    Nothing is downloaded for it: the plan comes first. The merge itself will tell what is wrong.
    """
    named = [recipe.anchor.model, recipe.routing.shared_expert if "/" in str(recipe.routing.shared_expert) else None]
    named += [model for expert in recipe.experts for model in (expert.model, expert.adapter)]
    try:
        for model in filter(None, named):
            resolve_model(model, allow_download=False)
        shared = shared_expert_source(recipe)
        sources = [*expert_sources(recipe), *([shared] if shared else [])]
        places = list(tensor_places(base_source(recipe).folder).values())
        for folder in dict.fromkeys(source.folder for source in sources):
            places += [place for name, place in tensor_places(folder).items() if is_mlp(name)]
    except UserError:
        return []
    parts: list[Part] = []
    for place in dict.fromkeys(places):
        if parts and parts[-1].file == place.file and parts[-1].end == place.begin:
            parts[-1] = Part(place.file, parts[-1].begin, place.end)
        else:
            parts.append(Part(place.file, place.begin, place.end))
    return parts


@contextmanager
def reading_ahead(parts: Sequence[Part]) -> Iterator[None]:
    """Reads parts of files in order until the block ends, all are read, or they fill SHARE of the available memory."""
    stop = Event()
    thread = Thread(target=_read, args=(parts, int(SHARE * available_memory()), stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read(parts: Sequence[Part], most: int, stop: Event) -> None:
    block = memoryview(bytearray(BLOCK))
    try:
        for part in parts:
            with part.file.open("rb", buffering=0) as file:
                file.seek(part.begin)
                left = part.end - part.begin
                while left > 0:
                    if stop.is_set() or most <= 0:
                        return
                    count = file.readinto(block[: min(left, BLOCK)])
                    if not count:
                        break
                    left, most = left - count, most - count
    except OSError:  # the merge will tell
        return
