"""A fused model's gates within the whole model: put there, and as routers that a language-model loss can train.

With normalised weights a token's first expert alone counts 1 whatever the gate says, so at top-1 the loss has no
gradient to the gate (at top-k none to the experts that were not picked). A TrainedRouter serves exactly as Qwen2MoE's
own router does, and passes the gradient of the full softmax mixture straight through (the straight-through estimator:
Bengio et al., 2013, arXiv:1308.3432): every expert is run while training, those that would not serve with weight 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fusion.layers import Gates, normalised_top_k


class TrainedRouter(nn.Module):
    """Stands in for a Qwen2MoE router, its gate in float32; in eval mode it is served as `saved` would hold it.

    `forced` sends every token to that expert instead. `logits` are those of the last forward pass,
    `(tokens, experts)`.
    """

    def __init__(self, gate: torch.Tensor, top_k: int, saved: torch.dtype):
        """`gate`: `(experts, hidden)`."""
        super().__init__()
        self.weight = nn.Parameter(gate.float().clone())  # the caller's stays as it is
        self.top_k, self.saved = top_k, saved
        self.forced: int | None = None
        self.logits = torch.empty(0)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits, weights and experts, `(tokens, experts)` and twice `(tokens, k)`, as transformers wants them.

        While training, k is the number of experts.
        """
        x = hidden.reshape(-1, hidden.shape[-1])  # (tokens, hidden)
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                self.logits = F.linear(x.float(), self.weight)
            else:
                self.logits = F.linear(x, self.weight.to(self.saved).to(x.dtype))
        if self.forced is not None:
            chosen = torch.full((len(x), 1), self.forced, device=x.device)
            return self.logits, torch.ones_like(chosen, dtype=x.dtype), chosen
        choice = normalised_top_k(self.logits, self.top_k)
        if not self.training:
            return self.logits, choice.weights.to(x.dtype), choice.experts
        soft = torch.softmax(self.logits, dim=1)
        served = torch.zeros_like(soft).scatter(1, choice.experts, choice.weights)
        weights = served.detach() + soft - soft.detach()  # (tokens, experts)
        everyone = torch.arange(soft.shape[1], device=x.device).expand_as(soft)
        return self.logits, weights.to(x.dtype), everyone


def place_gates(model: Any, gates: Gates) -> None:
    """Puts `gates` into a loaded fused model, wherever accelerate has put its layers."""
    for layer, gate in gates.items():
        router = model.model.layers[layer].mlp.gate
        old = _detached(router)
        router.weight = nn.Parameter(gate.to(old.device, old.dtype), requires_grad=False)


def train_routers(model: Any, gates: Gates, saved: torch.dtype) -> list[TrainedRouter]:
    """Puts TrainedRouters with `gates` in the place of a loaded fused model's routers, and returns them."""
    routers = []
    for layer, gate in gates.items():
        block = model.model.layers[layer].mlp
        old = _detached(block.gate)
        block.gate = TrainedRouter(gate, block.gate.top_k, saved).to(old.device)
        block.gate.train(model.training)
        routers.append(block.gate)
    return routers


def trained_gates(model: Any, saved: torch.dtype) -> Gates:
    """The gates of the model's TrainedRouters as `saved` holds them, `(experts, hidden)` by layer."""
    return {
        layer: block.mlp.gate.weight.detach().to("cpu", saved, copy=True)
        for layer, block in enumerate(model.model.layers)
        if isinstance(getattr(block.mlp, "gate", None), TrainedRouter)
    }


def _detached(router: Any) -> torch.Tensor:
    """An empty tensor of the router's type where it computes; accelerate no longer moves the router's weight."""
    from accelerate.hooks import remove_hook_from_module

    hook = getattr(router, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    found = torch.empty(0, dtype=router.weight.dtype, device=router.weight.device if device is None else device)
    remove_hook_from_module(router)
    return found
