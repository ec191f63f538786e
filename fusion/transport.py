"""Transports an expert's MLPs into the anchor's basis in closed form: the start of anchoring that needs no training.

    for name, weight in transported(anchor, expert, batches, layers): ...

Anchor and expert read the same tokens, layer by layer, one layer of each in memory. At each layer two ridge maps
`(hidden, hidden)` are fitted and folded into the expert's MLP, so that it reads and writes what stands around it in the
anchor:

    M: x_expert ~ M x,  from the input x that the MLP gets behind the anchor's attention   gate, up <- W M
    N: B h_expert - h ~ N y,  from the MLP's output y                                      down     <- N W

h_expert is the expert's residual state after the layer, h the anchor's before its MLP, so N y is the update that brings
the anchor's state to the expert's. B is the basis in which the anchor's head reads a state as the expert's head reads
its own, near the identity where heads have hardly moved. The anchor's tokens have passed the transported MLPs of the
layers below, so that the maps are fitted where they will be used. (The anchor's own MLP outputs as target for N, or the
anchor's own states as basis, map what the expert knows to what the anchor said instead: worse than no transport.)
"""

from collections.abc import Collection, Iterator

import torch

from fusion.architecture import MLP_PARTS
from fusion.layers import Batch, LayerStream, Source, forced

RIDGE = 1e-3  # pull of M to the identity and of N to B, relative to the inputs' mean square
BASIS_RIDGE = 0.1  # the same of B to the identity
READ_ROWS = 2**14  # of a head at a time


class RidgeMap:
    """The linear map A `(out, in)` that minimises the sum of |A x - y|^2 + pull x |A - prior|^2 over pairs of rows."""

    def __init__(self) -> None:
        self._gram: torch.Tensor | float = 0.0
        self._cross: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Takes in pairs of rows, `(tokens, in)` and `(tokens, out)`."""
        self._gram = self._gram + (x.T @ x).double()
        self._cross = self._cross + (y.T @ x).double()

    def solve(self, prior: torch.Tensor, ridge: float) -> torch.Tensor:
        """A in float64; the pull is `ridge` times the mean diagonal of the inputs' Gram matrix."""
        assert isinstance(self._gram, torch.Tensor)
        pull = ridge * self._gram.diagonal().mean()
        identity = torch.eye(len(self._gram), dtype=torch.float64, device=self._gram.device)
        return torch.linalg.solve(self._gram + pull * identity, self._cross + pull * prior, left=False)


def transported(
    anchor: Source, expert: Source, batches: list[Batch], layers: Collection[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The MLP tensors of `layers` by name, in float32; the other layers are passed with the anchor's own MLPs."""
    student = LayerStream(anchor, batches, description="transport")
    teacher = LayerStream(expert, batches)
    basis = head_basis(anchor, expert, batches).to(student.device)  # B
    for ours, theirs in zip(student, teacher, strict=True):
        ours.attend()
        theirs.attend()
        if ours.index not in layers:
            theirs.mix(forced(0))
            ours.mix(forced(0))
            continue
        inputs = RidgeMap()
        for batch in batches:
            inputs.add(student.inputs(batch).to(student.device), teacher.inputs(batch).to(student.device))
        read = inputs.solve(torch.eye(student.hidden, dtype=torch.float64, device=basis.device), RIDGE)  # M
        gate, up, down = (weight.double() for weight in theirs.dense_mlp())
        theirs.mix(forced(0))
        ours.replace_dense_mlp(gate @ read, up @ read, down)
        updates = RidgeMap()
        for batch in batches:
            real = batch.real.to(student.device)
            reached = teacher.load(batch)[real] @ basis.T.to(student.dtype)  # (tokens, hidden)
            made = ours.dense_output(student.inputs(batch).to(student.device))  # (tokens, hidden)
            updates.add(made, reached - student.load(batch)[real])
        moved = gate @ read, up @ read, updates.solve(basis, RIDGE) @ down
        ours.replace_dense_mlp(*moved)
        ours.mix(forced(0))
        for part, weight in zip(MLP_PARTS, moved, strict=True):
            yield f"model.layers.{ours.index}.mlp.{part}.weight", weight.float().cpu()


def head_basis(anchor: Source, expert: Source, batches: list[Batch]) -> torch.Tensor:
    """B `(hidden, hidden)`: the anchor's final norm and head read B h as nearly as can be as the expert's read h.

    Each token of the vocabulary counts as often as the answers of `batches` have it, and once more.
    """
    (norm, head), (their_norm, their_head) = _readout(anchor), _readout(expert)
    answered = torch.cat([batch.ids[batch.answer & batch.real] for batch in batches])
    counts = 1 + torch.bincount(answered, minlength=len(head))[:, None].double()  # (vocabulary, 1)
    gram = cross = torch.zeros(len(norm), len(norm), dtype=torch.float64)
    for ours, theirs, times in zip(*(part.split(READ_ROWS) for part in (head, their_head, counts)), strict=True):
        rows, their_rows = ours.double() * norm, theirs.double() * their_norm  # (vocabulary piece, hidden)
        gram = gram + (times * rows).T @ rows
        cross = cross + (times * rows).T @ their_rows
    pull = BASIS_RIDGE * gram.diagonal().mean() * torch.eye(len(norm), dtype=torch.float64)
    return torch.linalg.solve(gram + pull, cross + pull)


def _readout(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the final norm `(hidden,)`, in float64, and of the head `(vocabulary, hidden)`."""
    tied = "lm_head.weight" not in source
    head = source.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
    return source.tensor("model.norm.weight").double(), head
