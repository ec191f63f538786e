"""Cross-entropy of the gate's softmax on expert labels, from the ridge start.

The problem is convex (multinomial logistic regression: Bishop, 2006, section 4.3.4), so it is solved. Labels may be
soft: then it is the cross-entropy on the experts' shares.
"""

import torch

from fusion.sections.fusing import GateTraining
from gate_training.methods import ridge
from gate_training.methods.solver import label_loss, minimise
from gate_training.methods.tokens import Moments, TokenPass


def fit(tokens: TokenPass, moments: Moments, settings: GateTraining) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32."""
    return minimise(tokens, moments, ridge.fit(tokens, moments, settings), label_loss)
