"""How far experts have moved from the anchor, by layer and group of tensors: how much a merge can keep depends on that.

    moved = moved_by_group(anchor, expert)
    sentence(moved)   # "attention 0.000, norms 0.000, embeddings 0.000, mlp 0.071"

Read from the files piece by piece, the anchor once for all experts; an adapter is applied while reading. Only MLPs
differ by expert in the fused model: what moved outside them is lost behind the anchor's shared parts, or a mean of it
has to be found.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fusion.architecture import is_mlp, is_qkv_bias, layer_of, part_of
from fusion.errors import UserError
from fusion.headers import TensorPlace
from fusion.source_weights import Weights
from fusion.sources import ModelSource

GROUPS = ("attention", "norms", "embeddings", "head", "mlp")
PIECE = 2**21  # elements that are read and compared at a time, in float32
SAMPLED_ROWS = {"attention": 2, "embeddings": 16, "head": 16}  # from the middle of a matrix; vectors are read whole

# What moved outside the MLPs, of the anchor's norm, in fusion/README.md's drift table (notebooks/LOG.md, 2026-11-26: "a
# lightly drifted real expert" at most 0.004, "medium drift" from 0.05 in its embeddings, "five drifted experts" from
# 0.20): merged as they are, the first kept all of the experts' gain, the second 0.79 of it, the third 0.55.
LIGHT_DRIFT, STRONG_DRIFT = 0.01, 0.1


@dataclass(frozen=True)
class Moved:
    """A group of tensors against the anchor's W0, all of them as one long vector W.

    `distance` is ||W - W0|| / ||W0||, 0 where nothing moved; `cosine` that between W and W0. Where W0 is zero and W is
    not, they are 1 and 0.
    """

    distance: float
    cosine: float


@dataclass(frozen=True)
class Difference:
    """One tensor of an expert against the anchor's: sums to add up, and how many values of either are not finite.

    `sums`: ||W - W0||^2, ||W0||^2, ||W||^2 and W.W0 over the pieces that are finite in both, `(4,)`, float64.
    """

    name: str
    sums: torch.Tensor
    not_finite: int = 0
    anchor_not_finite: int = 0

    @property
    def group(self) -> str:
        """Which of GROUPS it belongs to."""
        return group_of(self.name)

    @property
    def layer(self) -> int | None:
        """Its layer, None for embeddings, final norm and head."""
        return layer_of(self.name)


def moved_by_group(anchor: ModelSource, expert: ModelSource) -> dict[str, Moved]:
    """The groups of GROUPS that the anchor has (no head of its own where it is tied to the embeddings).

    Raises UserError where the expert lacks a tensor of the anchor's, has it in another shape, or holds values that are
    not finite.
    """
    ours = Weights(anchor)
    if anchor.paths == expert.paths:  # an expert that is the anchor: nothing to read
        return {group: Moved(0.0, 1.0) for group in _in_order({group_of(name) for name in ours.names()})}
    found = []
    for (difference,) in differences(ours, [Weights(expert)]):
        for count, folder in ((difference.not_finite, expert.folder), (difference.anchor_not_finite, anchor.folder)):
            if count:
                raise UserError(
                    f"{difference.name} has {count} values that are not finite in {folder}: make or download the "
                    "model again"
                )
        found.append(difference)
    return by_group(found)


def differences(
    anchor: Weights, experts: Sequence[Weights], advance: Callable[[int], Any] = lambda count: None
) -> Iterator[list[Difference]]:
    """Every tensor of the anchor against each expert's, in the anchor's order, and then biases that only experts have.

    Biases that a model lacks count as zeros; embeddings and heads of other vocabularies are compared where both have
    rows. `advance` hears of the bytes read. Raises UserError where an expert lacks another tensor or has another shape.
    """
    names = dict.fromkeys(anchor.names())
    names |= dict.fromkeys(name for expert in experts for name in expert.names() if is_qkv_bias(name))
    for name in names:
        ours = _place(anchor, name, experts)
        sums = [torch.zeros(4, dtype=torch.float64) for _ in experts]
        broken = [[0, 0] for _ in experts]  # of the expert, of the anchor
        lengths = [_common(ours, _place(expert, name, [anchor]), expert, name) for expert in experts]
        for begin in range(0, max(lengths, default=0), PIECE):
            end = min(begin + PIECE, math.prod(ours.shape))
            old = _part(anchor, name, begin, end)
            advance(old.nbytes)
            for number, expert in enumerate(experts):
                if begin < lengths[number]:
                    new = _part(expert, name, begin, min(end, lengths[number]))
                    advance(new.nbytes)
                    counted, counts = _compared(old[: len(new)], new)
                    sums[number] += counted
                    broken[number] = [a + b for a, b in zip(broken[number], counts, strict=True)]
        yield [Difference(name, total, *counts) for total, counts in zip(sums, broken, strict=True)]


def sampled(anchor: ModelSource, expert: ModelSource) -> tuple[list[Difference], int]:
    """The tensors outside the MLPs by a small sample, and the bytes of it that were read of the expert.

    Vectors (norms, biases) whole and a few rows of each matrix, without any adapter; what differs only elsewhere is
    not seen. Raises UserError where a file is missing or broken.
    """
    ours, theirs = Weights(ModelSource("anchor", anchor.folder)), Weights(ModelSource(expert.name, expert.folder))
    found, read = [], 0
    for name in ours.names():
        place, other = ours.places[name], theirs.places.get(name)
        if is_mlp(name) or other is None or other.shape[1:] != place.shape[1:]:
            continue
        rows = min(place.shape[0], other.shape[0])
        count = rows if len(place.shape) == 1 else min(rows, SAMPLED_ROWS[group_of(name)])
        width = math.prod(place.shape[1:])
        begin, end = (rows - count) // 2 * width, ((rows - count) // 2 + count) * width
        new = theirs.part(name, begin, end)
        read += new.nbytes
        sums, counts = _compared(ours.part(name, begin, end), new)
        found.append(Difference(name, sums, *counts))
    return found, read


def by_group(found: Iterable[Difference]) -> dict[str, Moved]:
    """The differences added up by group."""
    sums: dict[str, torch.Tensor] = {}
    for difference in found:
        sums[difference.group] = sums.get(difference.group, 0) + difference.sums
    return {group: _moved(*sums[group].tolist()) for group in _in_order(sums)}


def group_of(name: str) -> str:
    """Which of GROUPS tensor `name` belongs to."""
    return "mlp" if is_mlp(name) else part_of(name)


def outside(moved: Mapping[str, Moved]) -> float:
    """The largest distance outside the MLPs, which a merge does not keep."""
    return max((found.distance for group, found in moved.items() if group != "mlp"), default=0.0)


def strength(moved: Mapping[str, Moved]) -> str:
    """How far an expert has moved outside its MLPs: anchored (not at all), light, medium or strong."""
    distance = outside(moved)
    if distance == 0:
        return "anchored"
    return "light" if distance < LIGHT_DRIFT else "medium" if distance < STRONG_DRIFT else "strong"


def chance(moved: Mapping[str, Moved]) -> str:
    """Whether a merge has a chance with such an expert, in a sentence."""
    return {
        "anchored": "anchored: it has the anchor's shared parts, and loses nothing in the merge under right routing",
        "light": "light drift: merged as they are, such experts kept all of their gain",
        "medium": "medium drift: merged as they are, such experts kept about four fifths of their gain; give it an "
        "'anchor' section, or use `shared: auto`",
        "strong": "strong drift: merged as they are, such experts kept about half of their gain; give it an 'anchor' "
        "section, which kept 0.97 of it",
    }[strength(moved)]


def sentence(moved: Mapping[str, Moved]) -> str:
    """The distances in a line."""
    return ", ".join(f"{group} {found.distance:.3f}" for group, found in moved.items())


def as_plain(moved: Mapping[str, Moved]) -> dict[str, Any]:
    """The figures as plain data, {group: {"distance", "cosine"}}."""
    return {group: asdict(found) for group, found in moved.items()}


def _place(weights: Weights, name: str, others: Sequence[Weights]) -> TensorPlace:
    """The tensor's place, or for a bias that the model lacks another model's, for its shape."""
    for held in [weights, *(others if is_qkv_bias(name) else ())]:
        if name in held.places:
            return held.places[name]
    raise weights.lacks(name)


def _common(ours: TensorPlace, theirs: TensorPlace, expert: Weights, name: str) -> int:
    """How many elements of a tensor are compared: all, or those of the rows that both vocabularies have."""
    of_vocabulary = part_of(name) in ("embeddings", "head") and ours.shape[1:] == theirs.shape[1:]
    if ours.shape != theirs.shape and not of_vocabulary:
        raise UserError(
            f"{name} is {theirs.shape} in {expert.source.folder}, {ours.shape} in the anchor: "
            "name a model of the anchor's shape"
        )
    return min(math.prod(ours.shape), math.prod(theirs.shape))


def _part(weights: Weights, name: str, begin: int, end: int) -> torch.Tensor:
    return weights.part(name, begin, end) if name in weights.places else torch.zeros(end - begin)


def _compared(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """The sums of a piece, zeros where it is not finite, and how many values of `new` and `old` are not.

    Both in the narrower of their dtypes: what saving in that one has rounded has not moved.
    """
    counted = _sums(*_in_narrower(old, new))
    if counted.isfinite().all():
        return counted, (0, 0)
    counts = int((~new.isfinite()).sum()), int((~old.isfinite()).sum())
    return (torch.zeros(4) if any(counts) else _sums(old.double(), new.double())), counts


def _in_narrower(*pieces: torch.Tensor) -> list[torch.Tensor]:
    """The pieces in the dtype among theirs with the fewest significant bits."""
    if len({piece.dtype for piece in pieces}) == 1 or not all(piece.is_floating_point() for piece in pieces):
        return list(pieces)
    narrowest = max((piece.dtype for piece in pieces), key=lambda dtype: torch.finfo(dtype).eps)
    return [piece.to(narrowest) for piece in pieces]


def _sums(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """||W - W0||^2, ||W0||^2, ||W||^2 and W.W0 of a piece."""
    dtype = torch.promote_types(old.dtype, torch.float32)
    if old.dtype == new.dtype and torch.equal(old, new):
        square = _dot(old.to(dtype), old.to(dtype))
        return torch.tensor([0.0, square, square, square], dtype=torch.float64)
    old, new = old.to(dtype), new.to(dtype)
    change = new - old
    pairs = ((change, change), (old, old), (new, new), (old, new))
    return torch.tensor([_dot(a, b) for a, b in pairs], dtype=torch.float64)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a, b))


def _in_order(groups: Any) -> list[str]:
    return [group for group in GROUPS if group in groups]


def _moved(change: float, old: float, new: float, product: float) -> Moved:
    """From ||W - W0||^2, ||W0||^2, ||W||^2 and W.W0."""
    if not old * new:
        return Moved(1.0, 0.0) if change else Moved(0.0, 1.0)
    return Moved(math.sqrt(change / old), product / math.sqrt(old * new))
