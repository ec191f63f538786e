"""Groups of tensors written as safetensors shards in one pass: every byte read once, written once, hashed on the way.

    for file, entries in laid_out("expert-math", entries, shard_bytes).items():
        sha256 = write_shard(folder / file, entries)

Names, dtypes and shapes are known before anything is read, so the header goes first and the tensors follow piece by
piece: memory is a few pieces, whatever the size of a tensor, a shard or the model. Pieces are read here, hashed in one
thread and written in another, past the page cache.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusion.direct import DirectFile
from fusion.headers import encode_header

IN_FLIGHT = 4  # pieces that are read and not yet written


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, dtype and shape, and its elements, flat, in pieces of `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def laid_out(stem: str, entries: list[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
    """The files of a group: `stem.safetensors`, or `stem.00001.safetensors`, ... of `shard_bytes` or one tensor."""
    shards: list[list[Entry]] = []
    held = 0
    for entry in entries:
        if not shards or held + entry.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}.{number:05d}.safetensors": shard for number, shard in enumerate(shards, start=1)}


def entries_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Entry]:
    """Tensors that are in memory, as what is to be written."""
    return [Entry(n, t.dtype, tuple(t.shape), partial(_whole, t)) for n, t in tensors]


def write_shards(
    folder: Path, stem: str, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = 2 * 2**30
) -> dict[str, str]:
    """Writes a group of tensors that become known one by one; holds one shard in memory.

    Returns {tensor name: file name}, files as in `laid_out`.
    """
    files: list[list[str]] = []
    held: list[tuple[str, torch.Tensor]] = []

    def flush() -> None:
        write_shard(folder / f"{stem}.{len(files) + 1:05d}.safetensors", entries_of(held))
        files.append([name for name, _ in held])
        held.clear()

    for name, tensor in tensors:
        if held and sum(other.nbytes for _, other in held) + tensor.nbytes > shard_bytes:
            flush()
        held.append((name, tensor))
    if held:
        flush()
    if len(files) == 1:
        (folder / f"{stem}.00001.safetensors").rename(folder / f"{stem}.safetensors")
        return dict.fromkeys(files[0], f"{stem}.safetensors")
    return {name: f"{stem}.{i + 1:05d}.safetensors" for i, names in enumerate(files) for name in names}


def write_shard(path: Path, entries: list[Entry], advance: Callable[[int], Any] = lambda count: None) -> str:
    """Writes one shard through to the disk and returns its SHA-256; `advance` hears of every piece's bytes."""
    digest = hashlib.sha256()
    header = encode_header({entry.name: (entry.dtype, entry.shape) for entry in entries})
    with (
        DirectFile(path) as file,
        ThreadPoolExecutor(1) as hashing,
        ThreadPoolExecutor(1) as writing,
        _one_thread(),
    ):
        running: deque[tuple[Future[Any], ...]] = deque()

        def pass_on(piece: memoryview) -> None:
            running.append((hashing.submit(digest.update, piece), writing.submit(file.write, piece)))
            while len(running) > IN_FLIGHT:
                wait()

        def wait() -> None:
            for future in running.popleft():
                future.result()

        try:
            pass_on(memoryview(header))
            for entry in entries:
                for piece in entry.pieces():
                    pass_on(piece.contiguous().view(torch.uint8).numpy().data)
                    advance(piece.nbytes)
            while running:
                wait()
        finally:  # an error of one piece: none after it is worth writing
            for futures in running:
                for future in futures:
                    future.cancel()
    return digest.hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch, whose waiting ones would take the cores from those that hash and write."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _whole(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor.detach().cpu().contiguous().flatten()
