"""Cross-entropy of the gate's softmax on expert labels, from the ridge start.

The problem is convex (multinomial logistic regression), so it is solved, not tuned: L-BFGS with a line search on inputs
scaled to unit root mean square, with a small L2 penalty that keeps separable data finite.
"""

import torch
import torch.nn.functional as F

from fusion.recipe import GateTraining
from gate_training.methods import TokenPass, ridge


def fit(tokens: TokenPass, experts: int, hidden: int, settings: GateTraining) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32 after at most `settings.iterations` L-BFGS steps."""
    start = ridge.fit(tokens, experts, hidden, settings)
    squares, count = torch.zeros(hidden), 0
    for x, _ in tokens():
        squares += x.square().sum(dim=0)
        count += x.shape[0]
    scale = (squares / count).sqrt().clamp_min(1e-6)  # (hidden,)
    weight = (start * scale).requires_grad_(True)  # on scaled inputs
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=settings.iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for x, labels in tokens():
            loss = F.cross_entropy(x @ (weight / scale).T, labels, reduction="sum") / count
            loss.backward()
            total += loss.detach()
        penalty = 0.5 * settings.ridge * weight.square().sum() / hidden
        penalty.backward()
        return total + penalty.detach()

    optimizer.step(closure)
    return (weight.detach() / scale).contiguous()
