"""Files written past the page cache: every byte of them, whatever the pieces' sizes and the file system."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import direct
from fusion.direct import ALIGNMENT, DirectFile

SIZES = st.one_of(st.integers(0, 3 * ALIGNMENT), st.sampled_from([ALIGNMENT, 2 * ALIGNMENT, 5 * ALIGNMENT]))
PLACES = ["/tmp", "/dev/shm"]  # a disk, mostly, and a file system in memory


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BLOCK", 2 * ALIGNMENT)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, max_size=6), place=st.sampled_from(PLACES))
def test_a_file_holds_what_was_written(sizes: list[int], place: str) -> None:
    path = Path(place) / f"direct-{os.getpid()}"
    pieces = [os.urandom(size) for size in sizes]
    try:
        path.write_bytes(b"of before" * 9000)
        with DirectFile(path) as file:
            for piece in pieces:
                file.write(memoryview(piece))
        assert path.read_bytes() == b"".join(pieces)
    finally:
        path.unlink()


@pytest.mark.parametrize("refused_at", ["open", "write"])
def test_a_file_system_that_refuses_gets_it_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: str
) -> None:
    refused = []

    def open_(path: Path, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT and refused_at == "open":
            refused.append(flags)
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_open(path, flags & ~os.O_DIRECT, mode)

    def write(descriptor: int, data: bytes) -> int:
        if not refused and refused_at == "write":
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "not aligned enough")
        return real_write(descriptor, data)

    real_open, real_write = os.open, os.write
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)
    data = os.urandom(5 * ALIGNMENT + 1)
    with DirectFile(tmp_path / "a") as file:
        file.write(memoryview(data))
    monkeypatch.undo()
    assert len(refused) == 1
    assert (tmp_path / "a").read_bytes() == data


def test_an_error_of_the_disk_is_raised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), DirectFile(Path("/dev/full")) as file:
        file.write(memoryview(b"x"))


def test_another_name_of_the_file_keeps_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "served").write_bytes(b"of before")
    os.link(tmp_path / "served", tmp_path / "aside")
    with DirectFile(tmp_path / "aside") as file:
        file.write(memoryview(b"new"))
    assert (tmp_path / "served").read_bytes() == b"of before"
    assert (tmp_path / "aside").read_bytes() == b"new"
