"""Minimises a mean loss of the gate's scores under the L2 penalty that serves tokens it has not seen.

Inputs are scaled to unit root mean square, so that one huge feature does not drown the others. The penalty matters
more than the optimum: too little of it and the gate learns its training tokens by heart (notebooks/LOG.md), and how
much is right differs by a thousand times between models. So the fit follows a path from much penalty to little on four
fifths of a sample of the conversations, stops where the answers' loss of the held back fifth rises, and ends on all
tokens with the best.
L-BFGS (Liu and Nocedal, 1989) works in coordinates in which the curvature is about even: the inputs' second moments,
which bound it (Böhning and Lindsay, 1988), plus the penalty.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from gate_training.methods.tokens import Moments, TokenPass, Tokens, summed

# (scores (tokens, experts), tokens) -> losses (tokens,) and their slopes in the scores (tokens, experts)
TokenLoss = Callable[[torch.Tensor, Tokens], tuple[torch.Tensor, torch.Tensor]]
PENALTIES = (1e-2, 1e-4, 1e-6)  # a finer path loses as much (notebooks/LOG.md)
FALLBACK = 1e-3  # where no conversation can be held back
CHOOSING_STEPS = 5  # of L-BFGS at each penalty
STEPS = 6  # with the chosen one; more gain nothing on tokens not seen
CURVATURE = 0.05  # of a token's loss in its scores, about


def label_loss(scores: torch.Tensor, part: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy `(tokens,)` of softmax(`scores` `(tokens, experts)`) on the labels' shares, in nats."""
    logs = scores - torch.logsumexp(scores, dim=1, keepdim=True)  # for few columns faster than log_softmax
    return -(part.targets * logs).sum(dim=1), logs.exp() - part.targets


def minimise(tokens: TokenPass, moments: Moments, start: torch.Tensor, token_loss: TokenLoss) -> torch.Tensor:
    """The gate `(experts, hidden)` from `start`.

    Minimised is the mean `token_loss` + ½·λ·|W·s|², s being the inputs' root mean squares.
    """
    problem = _Problem(tokens, moments, token_loss)
    weight = start * problem.scale
    penalty, best = FALLBACK, float("inf")
    reached = weight
    for tried in PENALTIES if problem.judged else ():
        weight = problem.solve(weight, tried, CHOOSING_STEPS, choosing=True)
        loss = problem.held_back_loss(weight)
        if loss >= best:
            break
        penalty, best, reached = tried, loss, weight
    return (problem.solve(reached, penalty, STEPS) / problem.scale).contiguous()


class _Problem:
    """The loss as a function of the gate on scaled inputs, `(experts, hidden)`."""

    def __init__(self, tokens: TokenPass, moments: Moments, token_loss: TokenLoss):
        self._tokens, self._loss = tokens, token_loss
        counts = torch.zeros(3, dtype=torch.long)
        for part in tokens.sample():
            counts += torch.tensor([len(part.inputs), int(part.held_back.sum()), int(part.judged.sum())])
        sampled, held_back, self.judged = summed(counts).tolist()
        self._sampled = sampled - held_back
        self._count = moments.count
        diagonal = moments.gram.diagonal() / moments.count
        self.scale = diagonal.sqrt().clamp_min(1e-6).float()  # (hidden,)
        self._moments = moments.gram / moments.count / torch.outer(self.scale, self.scale).double()

    def solve(self, weight: torch.Tensor, penalty: float, steps: int, choosing: bool = False) -> torch.Tensor:
        """The gate after at most `steps` from `weight`, on all tokens or (`choosing`) the sample but its held back."""
        curvature = CURVATURE * self._moments
        curvature.diagonal().add_(penalty + 1e-7)
        factor = torch.linalg.cholesky(curvature).float()  # (hidden, hidden), of W = u factor⁻¹
        free = (weight @ factor).requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [free], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-6
        )

        @torch.no_grad()
        def closure() -> torch.Tensor:
            weight = torch.linalg.solve_triangular(factor, free, upper=False, left=False)
            loss, slope = self._mean(weight / self.scale, choosing)
            gradient = penalty * weight + slope / self.scale
            free.grad = torch.linalg.solve_triangular(factor.T, gradient, upper=True, left=False).contiguous()
            return loss + 0.5 * penalty * weight.square().sum()

        optimizer.step(closure)
        return torch.linalg.solve_triangular(factor, free.detach(), upper=False, left=False)

    def _mean(self, gate: torch.Tensor, choosing: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss of `gate` `(experts, hidden)`, and its gradient."""
        total, gradient = torch.zeros(()), torch.zeros_like(gate)
        for part in self._tokens.sample() if choosing else self._tokens():
            losses, slopes = self._loss(linear(part.inputs, gate), part)
            if choosing:
                kept = ~part.held_back
                losses, slopes = losses * kept, slopes * kept[:, None]
            total = total + losses.sum()
            gradient += slopes.T @ part.inputs
        count = self._sampled if choosing else self._count
        return summed(total) / count, summed(gradient) / count

    def held_back_loss(self, weight: torch.Tensor) -> float:
        """The mean loss of the sample's held back tokens that are judged."""
        total = torch.zeros(())
        for part in self._tokens.sample():
            losses, _ = self._loss(linear(part.inputs, weight / self.scale), part)
            total = total + losses[part.judged].sum()
        return float(summed(total)) / self.judged
