"""Which experts the tokens of given texts go to, by the fused checkpoint's own gates, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusion.checkpoint import Checkpoint
from fusion.data import chat
from fusion.encoding import encode_batches, load_tokenizer
from fusion.layers import Batch, Choice, Layer, LayerStream, checkpoint_gates, gated, make_batches
from fusion.recipe import Recipe


def routed_weight(
    checkpoint: Checkpoint, batches: Sequence[Batch], experts: int, description: str | None = None
) -> torch.Tensor:
    """The routing weight that each expert has over each row's tokens and all sparse layers.

    `(2, rows, experts)`: answer tokens, all tokens; rows in the order in which the batches were made of them.
    """
    weights = torch.zeros(2, sum(len(batch.rows) for batch in batches), experts)

    def see(layer: Layer, batch: Batch, x: torch.Tensor, choice: Choice) -> None:
        row = batch.rows[:, None].expand_as(batch.ids)[batch.real]  # (tokens,)
        answer = batch.answer[batch.real]
        for kind, kept in enumerate((answer, torch.ones_like(answer))):
            for slot in range(choice.experts.shape[1]):
                index = (row[kept], choice.experts[kept, slot])
                weights[kind].index_put_(index, choice.weights[kept, slot].float(), accumulate=True)

    top_k = checkpoint.config["num_experts_per_tok"]
    LayerStream(checkpoint, list(batches), description=description).run(gated(checkpoint_gates(checkpoint), top_k), see)
    return weights


def expert_shares(recipe: Recipe, answers: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Per answer ({question, answer}) the share of its tokens' routing weight that each expert had, over all layers."""
    rows = [chat(row["question"], row["answer"], "") for row in answers]
    batches = encode_batches(load_tokenizer(recipe.fused), rows, batch_tokens=recipe.gate_training.batch_tokens)
    weights = routed_weight(Checkpoint(recipe.fused), batches, len(recipe.experts))[0]
    shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)
    names = [expert.name for expert in recipe.experts]
    return [dict(zip(names, row.tolist(), strict=True)) for row in shares]


@dataclass(frozen=True)
class TokenRoutes:
    """How each token of one text went in each sparse layer.

    `probabilities` `(layers, tokens, experts)` are the gates' softmax; `experts` and `weights`, both
    `(layers, tokens, top_k)`, are what is served.
    """

    probabilities: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


def token_routes(checkpoint: Checkpoint, rows: Sequence[Sequence[int]], batch_tokens: int = 4096) -> list[TokenRoutes]:
    """The routes of every row of token ids, by the checkpoint's own gates."""
    gates = checkpoint_gates(checkpoint)
    batches = make_batches(rows, batch_tokens=batch_tokens)
    seen: list[list[TokenRoutes]] = [[] for _ in rows]  # a layer each

    def see(layer: Layer, batch: Batch, x: torch.Tensor, choice: Choice) -> None:
        probabilities = torch.softmax(x.float() @ gates[layer.index].to(x.device).float().T, dim=-1).cpu()
        counts = batch.real.sum(dim=1).tolist()
        parts = zip(*(part.split(counts) for part in (probabilities, choice.experts, choice.weights)), strict=True)
        for row, part in zip(batch.rows.tolist(), parts, strict=True):
            seen[row].append(TokenRoutes(*part))

    LayerStream(checkpoint, batches).run(gated(gates, checkpoint.config["num_experts_per_tok"]), see)
    return [
        TokenRoutes(
            probabilities=torch.stack([layer.probabilities for layer in layers]),
            experts=torch.stack([layer.experts for layer in layers]),
            weights=torch.stack([layer.weights for layer in layers]),
        )
        for layers in seen
    ]
