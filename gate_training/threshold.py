"""A threshold on a gate's odds against the general expert: below it a token falls back to that.

A gate has no bias, so the general expert's head start of log(t / (1 - t)) is given along the direction v that comes
closest to v·x = 1 over the training tokens, v = (XᵀX)⁻¹ Σx. Against it alone another expert then needs a probability
above t to be first.
"""

import math

import torch

from gate_training.methods.tokens import Moments

JITTER = 1e-6  # of the mean diagonal of XᵀX


def lean(gate: torch.Tensor, moments: Moments, general: int, threshold: float) -> torch.Tensor:
    """`gate` `(experts, hidden)` with the head start of expert `general` under `threshold`, between 0 and 1."""
    gram = moments.gram.clone()
    gram.diagonal().add_(JITTER * gram.diagonal().mean())
    every = moments.cross.sum(dim=1, keepdim=True)  # (hidden, 1): a token's shares add up to 1
    direction = torch.cholesky_solve(every, torch.linalg.cholesky(gram))[:, 0]  # (hidden,)
    leaning = gate.clone()
    leaning[general] += (math.log(threshold / (1 - threshold)) * direction).to(gate)
    return leaning
