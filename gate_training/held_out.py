"""How one layer's gate routes held-out tokens, by first choice: accuracy, confusion, entropy, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fusion.checkpoint import Checkpoint
from fusion.layers import Batch, Gates, LayerStream, gated
from fusion.recipe import Recipe
from gate_training.examples import RoutingData
from gate_training.methods.tokens import summed

BINS = 10  # of confidence


@dataclass(frozen=True)
class Confidence:
    """Tokens of like confidence (the gate's softmax at its first choice): its mean, how many are right, their share."""

    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True)
class LayerReport:
    """How one layer's gate routes held-out tokens: shares in [0, 1], per domain and per expert."""

    layer: int
    accuracy: float
    answer_accuracy: float
    accuracy_by_domain: dict[str, float]
    answer_accuracy_by_domain: dict[str, float]
    share_by_expert: dict[str, float]  # of held-out tokens, first choice
    confusion: dict[str, dict[str, float]]  # {domain: {expert: share of its answer tokens}}
    entropy: float  # of the gate's softmax on answer tokens, nats
    calibration: list[Confidence]


def layer_report(
    layer: int, gate: torch.Tensor, stream: LayerStream, batches: list[Batch], domains: Sequence[str], recipe: Recipe
) -> LayerReport:
    """What `gate` `(experts, hidden)` does with the inputs of `batches`; `domains` names each row's, by row number."""
    names = sorted(set(domains), key=list(recipe.domains).index)
    number = torch.tensor([names.index(domain) for domain in domains])  # (rows,)
    right = torch.tensor([recipe.expert_of(name) for name in names])
    chosen = torch.zeros(2, len(names), len(recipe.experts), dtype=torch.double)  # of all tokens, of answer tokens
    bins = torch.zeros(BINS, 3, dtype=torch.double)  # tokens, confidence, right ones
    entropy = torch.zeros(1, dtype=torch.double)
    for batch in batches:
        probabilities = torch.softmax(stream.inputs(batch).float() @ gate.float().T, dim=1)  # (tokens, experts)
        confidence, first = probabilities.max(dim=1)  # (tokens,)
        domain = number[batch.rows][:, None].expand_as(batch.ids)[batch.real]
        answer = batch.answer[batch.real]
        for kind, kept in enumerate((torch.ones_like(answer), answer)):
            one = torch.ones((), dtype=torch.double)
            chosen[kind].index_put_((domain[kept], first[kept]), one, accumulate=True)
        entropy -= torch.special.xlogy(probabilities, probabilities)[answer].double().sum()
        hit = first == right[domain]
        place = (confidence * BINS).long().clamp_max(BINS - 1)
        bins.index_add_(0, place, torch.stack([torch.ones_like(confidence), confidence, hit], dim=1).double())
    chosen, bins, entropy = summed(chosen), summed(bins), summed(entropy)
    tokens = chosen.sum(dim=2)  # (2, domains)
    hits = chosen[:, torch.arange(len(names)), right]
    accuracy, by_domain = hits.sum(dim=1) / tokens.sum(dim=1).clamp_min(1), hits / tokens.clamp_min(1)
    shares = chosen[0].sum(dim=0) / chosen[0].sum().clamp_min(1)
    experts = [expert.name for expert in recipe.experts]
    confusion = (chosen[1] / tokens[1, :, None].clamp_min(1)).tolist()
    return LayerReport(
        layer=layer,
        accuracy=float(accuracy[0]),
        answer_accuracy=float(accuracy[1]),
        accuracy_by_domain=dict(zip(names, by_domain[0].tolist(), strict=True)),
        answer_accuracy_by_domain=dict(zip(names, by_domain[1].tolist(), strict=True)),
        share_by_expert=dict(zip(experts, shares.tolist(), strict=True)),
        confusion={name: dict(zip(experts, row, strict=True)) for name, row in zip(names, confusion, strict=True)},
        entropy=float(entropy) / max(1.0, float(tokens[1].sum())),
        calibration=[
            Confidence(sure / count, found / count, count / float(bins[:, 0].sum()))
            for count, sure, found in bins.tolist()
            if count
        ],
    )


def layer_reports(recipe: Recipe, folder: Path, data: RoutingData, gates: Gates) -> list[LayerReport]:
    """Held-out routing of gates that are there already."""
    checkpoint, batches = Checkpoint(folder), data.held_out_batches()
    stream = LayerStream(checkpoint, batches, description="routing of held-out examples")
    reports = []
    for layer in stream:
        layer.attend()
        if layer.sparse:
            reports.append(layer_report(layer.index, gates[layer.index], stream, batches, data.domains, recipe))
        layer.mix(gated(gates, checkpoint.config["num_experts_per_tok"]))
    return reports
