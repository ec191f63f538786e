"""What is read ahead is in the page cache; what cannot be read is left to the merge."""

import ctypes
import math
import mmap
import os
import time
from pathlib import Path

import pytest

from fusion import ahead
from fusion.ahead import Part, merged_parts, reading_ahead
from fusion.architecture import is_mlp
from fusion.errors import UserError
from fusion.headers import tensor_places
from fusion.recipe_file import load_recipe
from fusion.sections.fusing import AnchorModel
from tests.recipes import make_recipe


def cached(path: Path, page: int = -1) -> bool:
    """Whether a page of a file (its last one) is in the page cache: man 2 mincore."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        first = ctypes.c_char.from_buffer(pages)
        told = (ctypes.c_ubyte * math.ceil(len(pages) / mmap.PAGESIZE))()
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(pages)), told)
        del first
    assert not failed
    return bool(told[page] & 1)


def evicted(path: Path, size: int) -> Path:
    """A file that is not in the page cache; the test is skipped where it cannot be taken out."""
    path.write_bytes(os.urandom(size))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if cached(path):
        pytest.skip("the files of this file system are always in memory")
    return path


def waited_for(path: Path) -> bool:
    """Whether it comes into the cache within ten seconds."""
    end = time.monotonic() + 10
    while not cached(path) and time.monotonic() < end:
        time.sleep(0.01)
    return cached(path)


def test_files_come_into_the_cache(tmp_path: Path) -> None:
    files = [evicted(tmp_path / name, 2**20) for name in ("a", "b")]
    with reading_ahead([Part(path, 0, 2**20) for path in files]):
        assert all(waited_for(path) for path in files)


def test_no_more_than_a_share_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (evicted(tmp_path / name, 2**20) for name in ("a", "b"))
    monkeypatch.setattr(ahead, "available_memory", lambda: 2**20)
    with reading_ahead([Part(first, 0, 2**20), Part(second, 0, 2**20)]):
        assert waited_for(first)
    assert not cached(second)


def test_what_is_missing_is_left_to_the_merge(tmp_path: Path) -> None:
    with reading_ahead([Part(tmp_path / "missing", 0, 9), Part(tmp_path, 0, 9)]):
        pass
    recipe = load_recipe(Path("configs/qwen2.5-0.5b-two-experts.yaml"), [f"output={tmp_path}"])
    assert merged_parts(recipe) == []


def test_a_merge_reads_the_base_and_the_experts_mlps(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]
) -> None:
    experts = {"general": anchor, "math": anchored_experts["math"]}
    parts = merged_parts(make_recipe(tmp_path, anchor, experts))
    covered = {(part.file.parent, byte) for part in parts for byte in range(part.begin, part.end)}
    assert sum(part.end - part.begin for part in parts) == len(covered)
    for folder in experts.values():
        for name, place in tensor_places(folder).items():
            read = {(folder, byte) for byte in range(place.begin, place.end)} <= covered
            assert read is (folder == anchor or is_mlp(name)), name


def test_nothing_is_downloaded_before_the_plan(tmp_path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[bool] = []

    def resolve(model: str, allow_download: bool = True) -> Path:
        allowed.append(allow_download)
        raise UserError("not in the cache")

    monkeypatch.setattr(ahead, "resolve_model", resolve)
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    assert merged_parts(recipe.model_copy(update={"anchor": AnchorModel(model="some/model")})) == []
    assert allowed == [False]
