"""A file written past the page cache: a checkpoint is larger than it, and to make room there costs more than to write.

    with DirectFile(path) as file:
        file.write(memoryview(b"..."))

Blocks are aligned as O_DIRECT demands (man 2 open); where a file system refuses it, and for the last bytes, the cache
is used. The file is on the disk when the block ends.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

BLOCK = 2**24  # bytes that are written at a time
ALIGNMENT = 2**12  # bytes, no less than any disk's sector


class DirectFile:
    """A new file in the place of what was there, whose other names keep it. Raises OSError where the disk refuses."""

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        if path.is_file():
            path.unlink()  # not truncated: a hard link of it may be served
        self._direct = getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor = os.open(path, flags | self._direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor, self._direct = os.open(path, flags, 0o666), 0
        self._block = mmap.mmap(-1, BLOCK)  # whole pages, so it is aligned
        self._held = 0

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._put(self._held)
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, piece: memoryview) -> None:
        """Appends bytes; they may wait for a block to be full."""
        while piece:
            count = min(len(piece), BLOCK - self._held)
            self._block[self._held : self._held + count] = piece[:count]
            self._held, piece = self._held + count, piece[count:]
            if self._held == BLOCK:
                self._put(BLOCK)

    def _put(self, count: int) -> None:
        """Writes the first `count` bytes of the block."""
        begin = 0
        with memoryview(self._block) as block:
            while begin < count:
                if (begin | count) % ALIGNMENT:
                    self._use_cache()
                try:
                    begin += os.write(self._descriptor, block[begin:count])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._use_cache()
        self._held = 0

    def _use_cache(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~self._direct)
            self._direct = 0
