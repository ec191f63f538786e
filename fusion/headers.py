"""Headers of safetensors files: which tensors there are, of what dtype and shape, and at which bytes they lie.

    places = tensor_places(Path("models/Qwen2.5-7B-Instruct"))
    places["model.norm.weight"].shape
    read_part(places["model.norm.weight"], 0, 8)

Nothing but headers is read, so five full-size models take milliseconds. The format: 8 bytes with the length of a JSON
object, the object, the tensors' bytes without holes (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from fusion.checkpoint import INDEX, Checkpoint, write_json
from fusion.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**23  # elements that are read at a time: 16 MiB in bfloat16
LONGEST = 100 * 2**20  # bytes of a header, the safetensors library's own limit


@dataclass(frozen=True)
class TensorPlace:
    """A tensor on disk: its file, dtype and shape, and its bytes from `begin` to `end` of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file. Raises UserError where it is truncated or is none."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST):
                raise ValueError("its header is cut off")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} has not the bytes of its shape")
            places[name] = TensorPlace(path, dtype, shape, begin, end)
        ends = sorted((place.begin, place.end) for place in places.values())
        wanted = 8 + length
        for begin, end in ends:
            if begin != wanted:
                raise ValueError("its tensors overlap or leave holes")
            wanted = end
        if wanted != size:
            raise ValueError(f"it has {size:,} bytes, its header tells of {wanted:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"unknown dtype {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} cannot be read ({why}): it is truncated or no safetensors file") from error
    return places


def tensor_places(folder: Path) -> dict[str, TensorPlace]:
    """The tensors of a model folder, by name, in the order of its index.

    Raises UserError where a file is missing or broken, or does not hold what the index says.
    """
    weight_map = Checkpoint(folder).weight_map
    headers = {file: read_header(folder / file) for file in dict.fromkeys(weight_map.values())}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(f"{folder / file} has no tensor '{name}', which the index says: download the model again")
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_part(place: TensorPlace, begin: int, end: int) -> torch.Tensor:
    """Elements `begin` to `end` of a tensor on disk, flat. Raises UserError where its file ends too early."""
    with place.file.open("rb", buffering=0) as file:
        return _read(file, place, begin, end)


def parts(place: TensorPlace) -> Iterator[torch.Tensor]:
    """A tensor on disk, flat, PIECE elements at a time."""
    count = math.prod(place.shape)
    with place.file.open("rb", buffering=0) as file:  # open all the while: the kernel reads ahead
        for begin in range(0, count, PIECE):
            yield _read(file, place, begin, min(begin + PIECE, count))


def _read(file: FileIO, place: TensorPlace, begin: int, end: int) -> torch.Tensor:
    size = place.dtype.itemsize
    data = bytearray((end - begin) * size)
    view, filled = memoryview(data), 0
    file.seek(place.begin + begin * size)
    while filled < len(data):
        count = file.readinto(view[filled:])
        if not count:
            raise UserError(f"{place.file} ends within a tensor: download the model again")
        filled += count
    return torch.frombuffer(data, dtype=place.dtype) if data else torch.empty(0, dtype=place.dtype)


def all_finite(piece: torch.Tensor) -> bool:
    """Whether a piece holds neither NaN nor infinity; by its least and largest number, 20 times as fast as isfinite."""
    if not piece.dtype.is_floating_point or not piece.numel():
        return True
    least, largest = torch.aminmax(piece.float() if piece.dtype.itemsize == 1 else piece)  # NaN where one is NaN
    return bool(least.isfinite() and largest.isfinite())


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two flat pieces are equal bit for bit, also where both are NaN, and not where zeros differ in sign."""
    even = all(t.nbytes % 8 == t.storage_offset() * t.itemsize % 8 == 0 for t in (ours, theirs))
    wide = torch.int64 if even else torch.uint8
    return ours.dtype == theirs.dtype and torch.equal(ours.view(wide), theirs.view(wide))


def encode_header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a file that holds `tensors`, {name: (dtype, shape)}, in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """Writes the index that transformers and vLLM read, with the total of the tensors' bytes."""
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    total = sum(place.nbytes for places in headers.values() for place in places.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
