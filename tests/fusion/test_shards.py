"""Shards written in one pass: what the safetensors library reads back, their hashes, their memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fusion.checkpoint import file_hash
from fusion.errors import UserError
from fusion.headers import DTYPES, read_header
from fusion.shards import Entry, laid_out, write_shard


def entry(name: str, tensor: torch.Tensor, piece: int = 5) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: iter(tensor.flatten().split(piece)))


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]),
    piece=st.integers(1, 300),
)
def test_the_safetensors_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype, piece: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    tensors = {f"t{i}": (torch.randn(shape) * 50).abs().to(dtype) for i, shape in enumerate(shapes)}
    digest = write_shard(path, [entry(name, tensor, piece) for name, tensor in tensors.items()])
    assert digest == file_hash(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_header_tells_what_the_library_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b": torch.ones(3, 5).to(dtype), "a": torch.zeros(2).to(dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"some": "note"})
    data = (tmp_path / "x.safetensors").read_bytes()
    for name, place in read_header(tmp_path / "x.safetensors").items():
        assert (place.dtype, place.shape) == (dtype, tuple(tensors[name].shape))
        stored = torch.frombuffer(bytearray(data[place.begin : place.end]), dtype=torch.uint8)
        assert torch.equal(stored, tensors[name].flatten().view(torch.uint8))


def cut(data: bytes) -> bytes:
    return data[:-1]


def longer(data: bytes) -> bytes:
    return data + b"x"


def cut_header(data: bytes) -> bytes:
    return data[:20]


def no_header(data: bytes) -> bytes:
    return b"not a safetensors file"


def other_shape(data: bytes) -> bytes:
    return data.replace(b'"shape":[4]', b'"shape":[5]')


def unknown_dtype(data: bytes) -> bytes:
    return data.replace(b'"F32"', b'"Q32"')


@pytest.mark.parametrize("damage", [cut, longer, cut_header, no_header, other_shape, unknown_dtype, lambda data: b""])
def test_a_broken_file_is_one_sentence(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read"):
        read_header(path)


def test_a_group_is_laid_out_by_size() -> None:
    entries = [entry(f"t{i}", torch.ones(size)) for i, size in enumerate((4, 4, 4, 30, 1, 1))]
    files = laid_out("part", entries, 32)
    assert [[e.name for e in row] for row in files.values()] == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]
    assert list(files) == [f"part.{i:05d}.safetensors" for i in (1, 2, 3, 4)]
    assert list(laid_out("part", entries, 1000)) == ["part.safetensors"]


def test_an_error_on_the_way_is_raised_and_ends_the_writing(tmp_path: Path) -> None:
    def pieces() -> Iterator[torch.Tensor]:
        yield torch.ones(4)
        raise UserError("the source ends here")

    entries = [Entry("a", torch.float32, (8,), pieces)]
    with pytest.raises(UserError, match="the source ends here"):
        write_shard(tmp_path / "a.safetensors", entries)
