"""The ways to fit a gate, one module each: statistics of (gate input, label) in, a gate out.

Every method is `fit(tokens, moments, settings) -> gate (experts, hidden)`, where `tokens()` starts a fresh pass over
the training tokens batch by batch, so that no method needs all of them in memory, and `moments` are the sums of one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


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


HELD_BACK = 5  # one of so many chooses the L2 penalty


def held_back(labels: torch.Tensor) -> torch.Tensor:
    """Marks every fifth of each label, `(rows,)`, in the order of the rows."""
    place = torch.zeros_like(labels)
    for label in labels.unique():
        place[labels == label] = torch.arange(int((labels == label).sum()))
    return place % HELD_BACK == HELD_BACK - 1


TokenPass = Callable[[], Iterator[Tokens]]


@dataclass(frozen=True)
class Moments:
    """XᵀX `(hidden, hidden)`, XᵀY `(hidden, experts)` and the count of tokens: sums over data, experts and machines."""

    gram: torch.Tensor
    cross: torch.Tensor
    count: int


def moments(tokens: TokenPass) -> Moments:
    """The sums of one pass, products in float32 and their sums in float64."""
    gram = cross = torch.zeros(())
    count = 0
    for part in tokens():
        gram = gram + (part.inputs.T @ part.inputs).double()
        cross = cross + (part.inputs.T @ part.targets).double()
        count += len(part.inputs)
    return Moments(gram, cross, count)
