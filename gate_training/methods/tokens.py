"""What a way to fit a gate is given: training tokens at one layer, pass by pass, and their sums.

Every method is `fit(tokens, moments, settings) -> gate (experts, hidden)`, where `tokens()` starts a fresh pass over
the training tokens part by part, so that no method needs all of them in memory, `tokens.sample()` one over as many as
a choice of one number takes, and `moments` are the sums of a whole pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import PartialState
from torch import distributed


@dataclass(frozen=True)
class Tokens:
    """Some training tokens at one layer.

    `inputs` `(tokens, hidden)`: what the gate sees. `targets` `(tokens, experts)`: the share of each expert that the
    labels ask for, 1 in all. `held_back` and `judged` `(tokens,)`: those that are left out while the L2 penalty is
    chosen, and those of them that choose it. `costs`, for methods that look at the experts' outputs: what going to an
    expert costs `(tokens, experts)` at top-1, or the form `(tokens, experts, experts)` of a mixture's weights.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    held_back: torch.Tensor
    judged: torch.Tensor
    costs: torch.Tensor | None = None

    def part(self, of: slice | torch.Tensor) -> "Tokens":
        """Some of the tokens, by number."""
        costs = None if self.costs is None else self.costs[of]
        inputs = self.inputs[of.to(self.inputs.device) if isinstance(of, torch.Tensor) else of]
        return Tokens(inputs, self.targets[of], self.held_back[of], self.judged[of], costs)


HELD_BACK = 5  # one of so many chooses the L2 penalty


def held_back(labels: torch.Tensor, every: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Marks every fifth conversation of each label, and those within one block of five in `every`: both `(rows,)`."""
    place = torch.zeros_like(labels)
    for label in labels.unique():
        place[labels == label] = torch.arange(int((labels == label).sum()))
    return place % HELD_BACK == HELD_BACK - 1, place // HELD_BACK % every == 0


class TokenPass(Protocol):
    """The training tokens at one layer, as often as a method wants to see them."""

    def __call__(self) -> Iterator[Tokens]:
        """All of them."""

    def sample(self) -> Iterator[Tokens]:
        """Some of them, whole conversations."""


@dataclass(frozen=True)
class InMemory:
    """Tokens that are few: one part, all of them the sample."""

    tokens: Tokens

    def __call__(self) -> Iterator[Tokens]:
        """The one part."""
        return iter([self.tokens])

    sample = __call__


@dataclass(frozen=True)
class Moments:
    """XᵀX `(hidden, hidden)`, XᵀY `(hidden, experts)` and the count of tokens: sums over data, experts and machines."""

    gram: torch.Tensor
    cross: torch.Tensor
    count: int

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram + other.gram, self.cross + other.cross, self.count + other.count)


def moments(tokens: TokenPass) -> Moments:
    """The sums of one pass over all machines' tokens, products in float32 and their sums in float64."""
    gram = cross = torch.zeros(())
    count = 0
    for part in tokens():
        gram = gram + (part.inputs.T @ part.inputs).double()
        cross = cross + (part.inputs.T @ part.targets).double()
        count += len(part.inputs)
    return Moments(summed(gram), summed(cross), int(summed(torch.tensor(count))))


def summed(part: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes that train together."""
    if not distributed.is_initialized():
        return part
    total = part.to(PartialState().device)  # NCCL adds up what is on GPUs
    distributed.all_reduce(total)
    return total.to(part.device)
