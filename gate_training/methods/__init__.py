"""The ways to fit a gate, one module each: statistics of (gate input, label) in, a gate out.

Every method is `fit(tokens, experts, hidden, settings) -> gate (experts, hidden)`, where `tokens()` starts a fresh pass
over the training tokens batch by batch, so that no method needs all of them in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """Some training tokens at one layer.

    `inputs` `(tokens, hidden)`: what the gate sees. `targets` `(tokens, experts)`: the share of each expert that the
    labels ask for, 1 in all. `costs`, for methods that look at the experts' outputs: what going to an expert costs
    `(tokens, experts)` at top-1, or the quadratic form `(tokens, experts, experts)` of a mixture's weights.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    costs: torch.Tensor | None = None


TokenPass = Callable[[], Iterator[Tokens]]
