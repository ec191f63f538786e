"""Output regression: the weights whose experts' output comes closest to the labelled expert's output.

Where experts agree on a token, sending it to another one costs nothing, so the gate spends itself on the tokens where
they differ. At top-1 an expert costs ‖E_e(x) - E_label(x)‖², and the gate's softmax is charged its expectation
(cost-sensitive classification: Elkan, 2001); with more experts a token the mixture costs ‖Σ w_e E_e(x) - E_label(x)‖².
Both are relative to ‖E_label(x)‖², token by token. Starts from the cross-entropy gate, as the problem is not convex.
"""

import torch

from fusion.sections.fusing import GateTraining
from gate_training.methods import cross_entropy
from gate_training.methods.solver import minimise
from gate_training.methods.tokens import Moments, TokenPass, Tokens


def costs(outputs: torch.Tensor, targets: torch.Tensor, top_k: int) -> torch.Tensor:
    """What the experts' `outputs` `(experts, tokens, hidden)` cost against labels `targets` `(tokens, experts)`.

    `(tokens, experts)` at top-1, otherwise the quadratic form `(tokens, experts, experts)` of a mixture's weights.
    """
    wanted = torch.einsum("te,eth->th", targets, outputs)  # (tokens, hidden)
    size = wanted.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (tokens, 1)
    off = (outputs - wanted) / size  # (experts, tokens, hidden)
    if top_k == 1:
        return off.square().sum(dim=2).T.contiguous()
    return torch.einsum("ath,bth->tab", off, off)


def output_loss(scores: torch.Tensor, part: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """What the softmax w of `scores` `(tokens, experts)` costs, `(tokens,)`: w·c, or wᵀCw; and its slopes."""
    assert part.costs is not None
    weights = torch.softmax(scores, dim=1)
    if part.costs.ndim == 2:
        losses, slopes = (weights * part.costs).sum(dim=1), part.costs
    else:
        product = torch.einsum("tab,tb->ta", part.costs, weights)
        losses, slopes = (weights * product).sum(dim=1), 2 * product
    along = (weights * slopes).sum(dim=1, keepdim=True)  # (tokens, 1)
    return losses, weights * (slopes - along)


def fit(tokens: TokenPass, moments: Moments, settings: GateTraining) -> torch.Tensor:
    """The gate `(experts, hidden)` in float32."""
    return minimise(tokens, moments, cross_entropy.fit(tokens, moments, settings), output_loss)
