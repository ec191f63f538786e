"""Minimises a mean loss of the gate's scores, in coordinates in which the gate inputs are white.

The Hessian of a softmax's cross-entropy lies below ½(I - 11ᵀ/E) ⊗ XᵀX/n (Böhning, 1992): with W = V L⁻¹ and
XᵀX/n + λD = LLᵀ it is near the identity in V, and L-BFGS with a line search ends in a few passes where in W it takes
hundreds. D is the diagonal of XᵀX/n, so that one huge feature does not drown the others.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from gate_training.methods import TokenPass, Tokens

ENOUGH = 1e-4  # nats a token: steps that gain less fit the noise, and held-out losses grow again (notebooks/LOG.md)
TokenLoss = Callable[[torch.Tensor, Tokens], torch.Tensor]  # (scores (tokens, experts), tokens) -> (tokens,)


def label_loss(scores: torch.Tensor, part: Tokens) -> torch.Tensor:
    """The cross-entropy `(tokens,)` of softmax(`scores` `(tokens, experts)`) on the labels' shares, in nats."""
    return torch.logsumexp(scores, dim=1) - (part.targets * scores).sum(dim=1)


def minimise(
    tokens: TokenPass,
    start: torch.Tensor,
    gram: torch.Tensor,
    count: int,
    token_loss: TokenLoss,
    strength: float,
    iterations: int,
) -> torch.Tensor:
    """The gate `(experts, hidden)` with the least mean `token_loss` + ½·`strength`·|W·√D|²/hidden, from `start`.

    `gram` is the float64 sum XᵀX of the inputs of `count` tokens.
    """
    hidden = start.shape[1]
    white = gram / count
    scale = white.diagonal().clamp_min(1e-12)  # (hidden,)
    white = white + torch.diag(strength * scale)
    root = torch.linalg.cholesky(white)  # L (hidden, hidden)
    free = (start.double() @ root).requires_grad_(True)  # V (experts, hidden)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=ENOUGH
    )

    def gate() -> torch.Tensor:
        return torch.linalg.solve_triangular(root, free, upper=False, left=False)  # W with W L = V

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        weight = gate().detach()
        leaf = weight.float().requires_grad_(True)
        total = torch.zeros((), dtype=torch.float64)
        for part in tokens():
            loss = token_loss(linear(part.inputs, leaf), part).sum()  # backward is 7 times slower through @ leaf.T
            loss.backward()
            total += loss.detach().double()
        assert leaf.grad is not None
        slope = leaf.grad.double() / count + strength * scale * weight / hidden  # of W
        free.grad = torch.linalg.solve_triangular(root, slope.T, upper=False).T  # of V: slope L⁻ᵀ
        return total / count + 0.5 * strength * (scale * weight.square()).sum() / hidden

    optimizer.step(closure)
    with torch.no_grad():
        return gate().float().contiguous()
