"""Explanations of conversations by a fused checkpoint's own gates, in one pass through its layers.

    explain(Checkpoint(folder), load_tokenizer(folder), [{"role": "user", "content": "17+25="}], "42").winner

The pass is in float32 through the fused checkpoint. A server in bfloat16, or of a quantised checkpoint, may send a
token elsewhere where two experts are close.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from fusion.architecture import MANIFEST
from fusion.checkpoint import Checkpoint, read_json
from fusion.data import Message
from fusion.explain.conversation import Conversation, tokenize
from fusion.explain.explanation import Deciding, Explanation, LayerGroup, Shares, Third, Token
from fusion.layers import checkpoint_gates
from fusion.served import TokenRoutes, token_routes

THIRDS: tuple[Third, ...] = get_args(Third)
DECIDING = 5  # tokens that are named, at most
OF_THE_GREATEST = 0.1  # rise from which a token is named
DIGITS = 6  # of probabilities and weights


def explain(
    checkpoint: Checkpoint, tokenizer: Any, messages: Sequence[Message], answer: str | None = None
) -> Explanation:
    """One conversation explained, without opinions."""
    (explained,) = explain_all(checkpoint, tokenizer, [Conversation(tuple(messages), answer)])
    return explained


def explain_all(
    checkpoint: Checkpoint, tokenizer: Any, conversations: Sequence[Conversation], batch_tokens: int = 4096
) -> list[Explanation]:
    """Conversations explained in one pass, without opinions. Raises UserError where the checkpoint has no manifest."""
    manifest = read_json(checkpoint.folder / MANIFEST)
    experts, layers = [row["name"] for row in manifest["experts"]], list(checkpoint_gates(checkpoint))
    tokens = [tokenize(tokenizer, conversation) for conversation in conversations]
    routes = token_routes(checkpoint, [[token.id for token in row] for row in tokens], batch_tokens)
    return [
        _explanation(manifest["recipe"], experts, layers, row, route) for row, route in zip(tokens, routes, strict=True)
    ]


def _explanation(
    model: str, experts: list[str], layers: list[int], tokens: list[Token], routes: TokenRoutes
) -> Explanation:
    judged: Literal["prompt", "answer"] = "answer" if tokens[-1].part == "answer" else "prompt"
    of_judged = torch.tensor([token.part == judged for token in tokens])
    dense = torch.zeros_like(routes.probabilities)  # (layers, tokens, experts)
    served = dense.scatter(2, routes.experts, routes.weights)
    winner = int(served[:, of_judged].sum(dim=(0, 1)).argmax())
    probabilities = routes.probabilities[:, of_judged].double()
    entropy = torch.special.entr(probabilities).sum(dim=2).mean() / torch.tensor(float(len(experts))).log()
    return Explanation(
        model=model,
        experts=experts,
        top_k=routes.experts.shape[2],
        layers=layers,
        tokens=tokens,
        probabilities=_rounded(routes.probabilities),
        chosen=routes.experts.tolist(),
        weights=_rounded(routes.weights),
        judged=judged,
        winner=experts[winner],
        confidence=probabilities.amax(dim=2).mean().item(),
        entropy=entropy.item(),
        shares=_shares(served, tokens, experts),
        shares_by_layer=[_shares(layer[None], tokens, experts) for layer in served],
        groups=_groups(served, layers, tokens, experts),
        decided_by=_deciding(routes.probabilities, winner, tokens),
        opinions=[],
    )


def _shares(served: torch.Tensor, tokens: list[Token], experts: list[str]) -> Shares:
    """The shares of `served` weights `(layers, tokens, experts)`; zeros where a part has no tokens."""

    def share(*parts: str) -> dict[str, float]:
        kept = torch.tensor([not parts or token.part in parts for token in tokens])
        weight = served[:, kept].sum(dim=(0, 1)).double()  # (experts,)
        return dict(zip(experts, (weight / weight.sum().clamp_min(1e-9)).tolist(), strict=True))

    return Shares(share("prompt"), share("answer") if tokens[-1].part == "answer" else None, share())


def _groups(served: torch.Tensor, layers: list[int], tokens: list[Token], experts: list[str]) -> list[LayerGroup]:
    """The shares by thirds of the sparse layers; of less than three layers some thirds are left out."""
    cuts = [round(len(layers) * third / 3) for third in range(4)]
    return [
        LayerGroup(name, layers[first:last], _shares(served[first:last], tokens, experts))
        for name, first, last in zip(THIRDS, cuts, cuts[1:], strict=False)
        if first < last
    ]


def _deciding(probabilities: torch.Tensor, winner: int, tokens: list[Token]) -> list[Deciding]:
    """The tokens outside the template at which the winner's lead rose most, the greatest rise first.

    `probabilities` is `(layers, tokens, experts)`; before the first token the lead is 0.
    """
    others = probabilities.clone()
    others[:, :, winner] = 0
    leads = (probabilities[:, :, winner] - others.amax(dim=2)).mean(dim=0).double()  # (tokens,)
    rises = leads.diff(prepend=leads.new_zeros(1))
    own = [i for i, token in enumerate(tokens) if token.part != "template"]
    ranked = sorted(own, key=lambda i: -rises[i].item())[:DECIDING]
    least = max(OF_THE_GREATEST * rises[ranked[0]].item(), 0)
    return [Deciding(i, leads[i].item(), rises[i].item()) for i in ranked if rises[i].item() > least]


def _rounded(values: torch.Tensor) -> list[list[list[float]]]:
    found: list[list[list[float]]] = values.double().round(decimals=DIGITS).tolist()
    return found
