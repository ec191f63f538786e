"""Ridge regression of the labels on gate inputs: closed form, one pass.

W = (XᵀX + λI)⁻¹ XᵀY, then one temperature that makes the softmax of the scores fit the labels best (DUME, 2026). The
sums XᵀX and XᵀY add up over data, experts and machines.
"""

from dataclasses import dataclass

import torch

from fusion.recipe import GateTraining
from gate_training.methods import TokenPass
from gate_training.methods.solver import label_loss

TEMPERATURES = torch.logspace(-1, 2, 31)


@dataclass(frozen=True)
class Statistics:
    """What ridge knows of the tokens, in float64: `gram` XᵀX `(hidden, hidden)`, `target` XᵀY `(hidden, experts)`."""

    gram: torch.Tensor
    target: torch.Tensor
    count: int


def statistics(tokens: TokenPass, experts: int, hidden: int) -> Statistics:
    """The sums over one pass."""
    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    target = torch.zeros(hidden, experts, dtype=torch.float64)
    count = 0
    for part in tokens():
        gram += (part.inputs.T @ part.inputs).double()
        target += (part.inputs.T @ part.targets).double()
        count += len(part.inputs)
    return Statistics(gram, target, count)


def solve(sums: Statistics, strength: float) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32; `strength` is λ relative to the mean diagonal of XᵀX."""
    gram = sums.gram.clone()
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-12))
    return torch.cholesky_solve(sums.target, torch.linalg.cholesky(gram)).T.float()  # (experts, hidden)


def fit(tokens: TokenPass, experts: int, hidden: int, settings: GateTraining) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32."""
    weight = solve(statistics(tokens, experts, hidden), settings.ridge)
    return weight * best_temperature(tokens, weight)


def best_temperature(tokens: TokenPass, weight: torch.Tensor) -> float:
    """The factor among TEMPERATURES on `weight` `(experts, hidden)` with the least cross-entropy on the labels."""
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    for part in tokens():
        scores = part.inputs @ weight.T  # (tokens, experts)
        for i, temperature in enumerate(TEMPERATURES):
            losses[i] += label_loss(scores * temperature, part).double().sum()
    return float(TEMPERATURES[losses.argmin()])
