"""Minimises a mean loss of the gate's scores: L-BFGS with a line search, on inputs scaled to unit root mean square.

The scale keeps one huge feature from drowning the others, the L2 penalty keeps separable data finite.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from fusion.recipe import GateTraining
from gate_training.methods import TokenPass, Tokens

TokenLoss = Callable[[torch.Tensor, Tokens], torch.Tensor]  # (scores (tokens, experts), tokens) -> (tokens,)


def label_loss(scores: torch.Tensor, part: Tokens) -> torch.Tensor:
    """The cross-entropy `(tokens,)` of softmax(`scores` `(tokens, experts)`) on the labels' shares, in nats."""
    return torch.logsumexp(scores, dim=1) - (part.targets * scores).sum(dim=1)


def minimise(tokens: TokenPass, start: torch.Tensor, token_loss: TokenLoss, settings: GateTraining) -> torch.Tensor:
    """The gate `(experts, hidden)` after at most `settings.iterations` steps from `start`.

    Minimised is the mean `token_loss` + ½·`settings.ridge`·|W·s|²/hidden, s being the inputs' root mean squares.
    """
    hidden = start.shape[1]
    squares, count = torch.zeros(hidden), 0
    for part in tokens():
        squares += part.inputs.square().sum(dim=0)
        count += len(part.inputs)
    scale = (squares / count).sqrt().clamp_min(1e-6)  # (hidden,)
    weight = (start * scale).requires_grad_(True)  # on scaled inputs
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=settings.iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in tokens():
            # not `inputs @ weight.T`, whose backward pass is 7 times as slow
            loss = token_loss(linear(part.inputs, weight / scale), part).sum() / count
            loss.backward()
            total += loss.detach()
        penalty = 0.5 * settings.ridge * weight.square().sum() / hidden
        penalty.backward()
        return total + penalty.detach()

    optimizer.step(closure)
    return (weight.detach() / scale).contiguous()
