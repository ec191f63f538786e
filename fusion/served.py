"""Which experts served an answer: the conversation goes through the fused checkpoint's own gates once more."""

from collections.abc import Sequence
from typing import Any

import torch

from fusion.checkpoint import Checkpoint
from fusion.data import chat
from fusion.encoding import encode_batches, load_tokenizer
from fusion.layers import Batch, Choice, Layer, LayerStream, checkpoint_gates, gated
from fusion.recipe import Recipe


def expert_shares(recipe: Recipe, answers: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Per answer ({question, answer}) the share of its tokens' routing weight that each expert had, over all layers."""
    folder = recipe.fused
    checkpoint = Checkpoint(folder)
    rows = [chat(row["question"], row["answer"], "") for row in answers]
    batches = encode_batches(load_tokenizer(folder), rows, batch_tokens=recipe.gate_training.batch_tokens)
    weights = torch.zeros(len(rows), len(recipe.experts))

    def see(layer: Layer, batch: Batch, x: torch.Tensor, choice: Choice) -> None:
        row = batch.rows[:, None].expand_as(batch.ids)[batch.real]  # (tokens,)
        answer = batch.answer[batch.real]
        for slot in range(choice.experts.shape[1]):
            index = (row[answer], choice.experts[answer, slot])
            weights.index_put_(index, choice.weights[answer, slot].float(), accumulate=True)

    LayerStream(checkpoint, batches).run(
        gated(checkpoint_gates(checkpoint), checkpoint.config["num_experts_per_tok"]), see
    )
    shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)
    names = [expert.name for expert in recipe.experts]
    return [dict(zip(names, row.tolist(), strict=True)) for row in shares]
