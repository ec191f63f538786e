"""Ridge regression of the labels on gate inputs: closed form, one pass.

W = (XᵀX + λI)⁻¹ XᵀY (Hoerl and Kennard, 1970; as a router: DUME, 2026), then one temperature that makes the softmax of
the scores fit the labels best. The sums XᵀX and XᵀY add up over data, experts and machines.
"""

import torch

from fusion.sections.fusing import GateTraining
from gate_training.methods.solver import label_loss
from gate_training.methods.tokens import Moments, TokenPass, summed

TEMPERATURES = torch.logspace(-1, 2, 16)


def fit(tokens: TokenPass, moments: Moments, settings: GateTraining) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32; `settings.ridge` is λ relative to the mean diagonal of XᵀX."""
    weight = solution(moments, settings.ridge).float()
    return weight * best_temperature(tokens, weight)


def solution(moments: Moments, strength: float) -> torch.Tensor:
    """W `(experts, hidden)` in float64, before any temperature."""
    gram = moments.gram.clone()
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-12))
    return torch.cholesky_solve(moments.cross, torch.linalg.cholesky(gram)).T


def best_temperature(tokens: TokenPass, weight: torch.Tensor) -> float:
    """The factor among TEMPERATURES on `weight` `(experts, hidden)` with the least cross-entropy on the labels."""
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    for part in tokens.sample():
        scores = part.inputs @ weight.T.to(part.inputs.device)  # (tokens, experts)
        for i, temperature in enumerate(TEMPERATURES):
            losses[i] += float(label_loss(scores * float(temperature), part)[0].double().sum())
    return float(TEMPERATURES[summed(losses).argmin()])
