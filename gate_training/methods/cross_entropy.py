"""Cross-entropy of the gate's softmax on expert labels, from the ridge start.

The problem is convex (multinomial logistic regression), so it is solved, not tuned, with a small L2 penalty that keeps
separable data finite. Labels may be soft: then it is the cross-entropy on the experts' shares.
"""

import torch

from fusion.recipe import GateTraining
from gate_training.methods import TokenPass, ridge
from gate_training.methods.solver import label_loss, minimise


def fit(tokens: TokenPass, experts: int, hidden: int, settings: GateTraining) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32 after at most `settings.iterations` L-BFGS steps."""
    return minimise(tokens, ridge.fit(tokens, experts, hidden, settings), label_loss, settings)
