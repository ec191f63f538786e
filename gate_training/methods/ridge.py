"""Ridge regression of one-hot expert labels on gate inputs: closed form, one pass.

W = (XᵀX + λI)⁻¹ XᵀY, then one temperature that makes the softmax of the scores fit the labels best (DUME, 2026). The
sums XᵀX and XᵀY add up over data, experts and machines.
"""

import torch
import torch.nn.functional as F

from fusion.recipe import GateTraining
from gate_training.methods import TokenPass

TEMPERATURES = torch.logspace(-1, 2, 31)


def fit(tokens: TokenPass, experts: int, hidden: int, settings: GateTraining) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32; `settings.ridge` is λ relative to the mean diagonal of XᵀX."""
    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    target = torch.zeros(hidden, experts, dtype=torch.float64)
    for x, labels in tokens():
        gram += (x.T @ x).double()
        target += (x.T @ F.one_hot(labels, experts).to(x.dtype)).double()
    gram.diagonal().add_(settings.ridge * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.cholesky_solve(target, torch.linalg.cholesky(gram)).T.float()  # (experts, hidden)
    return weight * best_temperature(tokens, weight)


def best_temperature(tokens: TokenPass, weight: torch.Tensor) -> float:
    """The factor among TEMPERATURES on `weight` `(experts, hidden)` with the least cross-entropy on the labels."""
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    for x, labels in tokens():
        scores = x @ weight.T  # (tokens, experts)
        for i, temperature in enumerate(TEMPERATURES):
            losses[i] += F.cross_entropy(scores * temperature, labels, reduction="sum").double()
    return float(TEMPERATURES[losses.argmin()])
