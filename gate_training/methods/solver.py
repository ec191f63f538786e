"""Minimises a mean loss of the gate's scores under the L2 penalty that serves tokens it has not seen.

Inputs are scaled to unit root mean square, so that one huge feature does not drown the others. The penalty matters
more than the optimum: too little of it and the gate learns its training tokens by heart (notebooks/LOG.md), and how
much is right differs by a thousand times between models. So the fit follows a path from much penalty to little on four
fifths of the conversations, stops where the answers' loss of the held back fifth rises, and ends on all with the best.
L-BFGS works in coordinates in which the curvature is about even: the inputs' second moments plus the penalty.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from gate_training.methods import Moments, TokenPass, Tokens

TokenLoss = Callable[[torch.Tensor, Tokens], torch.Tensor]  # (scores (tokens, experts), tokens) -> (tokens,)
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
FALLBACK = 1e-3  # where no conversation can be held back
STEPS = 8  # of L-BFGS at each penalty; a hundred more at the last gain nothing on tokens not seen (notebooks/LOG.md)
CURVATURE = 0.05  # of a token's loss in its scores, about


def label_loss(scores: torch.Tensor, part: Tokens) -> torch.Tensor:
    """The cross-entropy `(tokens,)` of softmax(`scores` `(tokens, experts)`) on the labels' shares, in nats."""
    return torch.logsumexp(scores, dim=1) - (part.targets * scores).sum(dim=1)


def minimise(tokens: TokenPass, moments: Moments, start: torch.Tensor, token_loss: TokenLoss) -> torch.Tensor:
    """The gate `(experts, hidden)` from `start`.

    Minimised is the mean `token_loss` + ½·λ·|W·s|², s being the inputs' root mean squares.
    """
    problem = _Problem(tokens, moments, token_loss)
    weight = start * problem.scale
    penalty, best = FALLBACK, float("inf")
    reached = weight
    for tried in PENALTIES if problem.judged else ():
        weight = problem.solve(weight, tried, STEPS, held_back=True)
        loss = problem.held_back_loss(weight)
        if loss >= best:
            break
        penalty, best, reached = tried, loss, weight
    return (problem.solve(reached, penalty, STEPS) / problem.scale).contiguous()


class _Problem:
    """The loss as a function of the gate on scaled inputs, `(experts, hidden)`."""

    def __init__(self, tokens: TokenPass, moments: Moments, token_loss: TokenLoss):
        self._tokens, self._loss = tokens, token_loss
        self.held_back, self.judged = (
            sum(int(getattr(part, kind).sum()) for part in tokens()) for kind in ("held_back", "judged")
        )
        self._count = moments.count
        diagonal = moments.gram.diagonal() / moments.count
        self.scale = diagonal.sqrt().clamp_min(1e-6).float()  # (hidden,)
        self._moments = (moments.gram / moments.count / torch.outer(self.scale, self.scale).double()).float()

    def solve(self, weight: torch.Tensor, penalty: float, steps: int, held_back: bool = False) -> torch.Tensor:
        """The gate after at most `steps` from `weight`, on all tokens or on those that are not `held_back`."""
        curvature = CURVATURE * self._moments
        curvature.diagonal().add_(penalty + 1e-7)
        factor = torch.linalg.cholesky(curvature)  # (hidden, hidden), of W = u factor⁻¹
        free = (weight @ factor).requires_grad_(True)
        count = self._count - self.held_back * held_back
        optimizer = torch.optim.LBFGS(
            [free], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-6
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            weight = torch.linalg.solve_triangular(factor, free, upper=False, left=False)
            scaled = (weight / self.scale).detach()
            gradient, total = torch.zeros_like(scaled), torch.zeros(())
            for part in self._tokens():
                scores = linear(part.inputs, scaled).requires_grad_(True)  # (tokens, experts)
                losses = self._loss(scores, part)
                loss = (losses[~part.held_back] if held_back else losses).sum() / count
                (slope,) = torch.autograd.grad(loss, scores)
                gradient += slope.T @ part.inputs  # autograd's inputs.T @ slope is 9 times as slow
                total += loss.detach()
            objective = 0.5 * penalty * weight.square().sum()
            (objective + (weight / self.scale * gradient).sum()).backward()  # the tokens' part by its gradient
            return total + objective.detach()

        optimizer.step(closure)
        return torch.linalg.solve_triangular(factor, free.detach(), upper=False, left=False)

    @torch.no_grad()
    def held_back_loss(self, weight: torch.Tensor) -> float:
        """The mean loss of the held back tokens that are judged."""
        total = 0.0
        for part in self._tokens():
            total += float(self._loss(linear(part.inputs, weight / self.scale), part)[part.judged].sum())
        return total / self.judged
