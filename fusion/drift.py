"""How far an expert has moved from the anchor, by group of tensors: how much of it a merge can keep depends on that.

    moved = moved_by_group(anchor, expert)
    sentence(moved)   # "attention 0.000, norms 0.000, embeddings 0.000, mlp 0.071"

Streamed with one tensor of each model in memory, an adapter applied while reading. Only MLPs differ by expert in the
fused model: what moved outside them is lost behind the anchor's shared parts, or a mean of it has to be found.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fusion.architecture import is_mlp, part_of
from fusion.errors import UserError
from fusion.reader import Reader
from fusion.sources import ModelSource

GROUPS = ("attention", "norms", "embeddings", "head", "mlp")
PIECE = 2**24  # elements that are compared at a time, in float32


@dataclass(frozen=True)
class Moved:
    """A group of tensors against the anchor's W0, all of them as one long vector W.

    `distance` is ||W - W0|| / ||W0||, 0 where nothing moved; `cosine` that between W and W0. Where W0 is zero and W is
    not, they are 1 and 0.
    """

    distance: float
    cosine: float


def moved_by_group(anchor: ModelSource, expert: ModelSource) -> dict[str, Moved]:
    """The groups of GROUPS that the anchor has (no head of its own where it is tied to the embeddings).

    Raises UserError where the expert lacks a tensor of the anchor's or has it in another shape.
    """
    ours = Reader(anchor)
    if anchor.paths == expert.paths:  # an expert that is the anchor: nothing to read
        return {group: Moved(0.0, 1.0) for group in _in_order({group_of(name) for name in ours.names()})}
    theirs = Reader(expert)
    sums: dict[str, torch.Tensor] = {}
    for name in ours.names():
        old, new = ours.tensor(name), theirs.tensor(name)
        if old.shape != new.shape:
            raise UserError(
                f"{name} is {tuple(new.shape)} in {expert.folder}, {tuple(old.shape)} in the anchor: "
                "name a model of the anchor's shape"
            )
        group = group_of(name)
        for old_piece, new_piece in zip(_pieces(old), _pieces(new), strict=True):
            change = new_piece - old_piece
            pairs = ((change, change), (old_piece, old_piece), (new_piece, new_piece), (old_piece, new_piece))
            found = torch.tensor([float(torch.dot(a, b)) for a, b in pairs], dtype=torch.float64)
            sums[group] = sums.get(group, 0) + found
    return {group: _moved(*sums[group].tolist()) for group in _in_order(sums)}


def group_of(name: str) -> str:
    """Which of GROUPS tensor `name` belongs to."""
    return "mlp" if is_mlp(name) else part_of(name)


def sentence(moved: Mapping[str, Moved]) -> str:
    """The distances in a line."""
    return ", ".join(f"{group} {found.distance:.3f}" for group, found in moved.items())


def as_plain(moved: Mapping[str, Moved]) -> dict[str, Any]:
    """The figures as plain data, {group: {"distance", "cosine"}}."""
    return {group: asdict(found) for group, found in moved.items()}


def _in_order(groups: Any) -> list[str]:
    return [group for group in GROUPS if group in groups]


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return (piece.float() for piece in tensor.flatten().split(PIECE))


def _moved(change: float, old: float, new: float, product: float) -> Moved:
    """From ||W - W0||^2, ||W0||^2, ||W||^2 and W.W0."""
    if not old * new:
        return Moved(1.0, 0.0) if change else Moved(0.0, 1.0)
    return Moved(math.sqrt(change / old), product / math.sqrt(old * new))
