"""The gate trainer: layer by layer over the fused checkpoint, one layer's weights in memory.

    qwen-fusion train-gates configs/demo.yaml

At every layer the tokens pass the attention, the gate is fitted on the exact input it will see when served (the output
of post_attention_layernorm, chat template applied), and the tokens move on through the experts that the fresh gate
picks. Held-out examples travel along and are only measured. `auto` fits with every such method and keeps the one with
the least answer loss on them; `lm` goes on from cross-entropy through the whole model (gate_training/refine.py).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import one_hot

from fusion.architecture import gate_tensor
from fusion.checkpoint import Checkpoint
from fusion.layers import Batch, Gates, Layer, LayerStream, gated, joined, state_store
from fusion.merge import checkpoint_dtype, record_gates, write_gates
from fusion.recipe import Recipe
from gate_training.compare import held_out_losses, mean_loss
from gate_training.examples import RoutingExample, encoded_examples, routing_examples, rules_agreement
from gate_training.labelling.likelihood import token_targets
from gate_training.methods import Tokens, cross_entropy, held_back, moments, regression, ridge

BINS = 10  # of confidence
METHODS = {
    "ridge": ridge.fit,
    "cross-entropy": cross_entropy.fit,
    "likelihood": cross_entropy.fit,  # on the experts' own likelihoods in the place of labels
    "regression": regression.fit,
}


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


@dataclass(frozen=True)
class GateReport:
    """What the training saw and what came of it."""

    method: str
    labels: str
    tokens: int
    held_out_tokens: int
    rules_agreement: dict[str, float]  # per domain, of held-out examples
    layers: list[LayerReport]
    # nats per held-out answer token, {gates: {domain: loss}}, where methods were compared
    compared: dict[str, dict[str, float]] = field(default_factory=dict)
    refined: dict[str, Any] | None = None  # method lm: gate_training.refine.Refined

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def train_gates(recipe: Recipe, folder: Path) -> GateReport:
    """Fits the gates of the fused checkpoint in `folder` and puts them in place; returns the held-out report.

    Raises UserError where the data leave an expert without examples.
    """
    settings = recipe.gate_training
    train = routing_examples(recipe, "train", settings.rows)
    held_out = routing_examples(recipe, "held_out", settings.held_out_rows)
    if settings.method == "auto":
        gates, report = _best(recipe, folder, train, held_out)
    elif settings.method == "lm":
        gates, report = _refined(recipe, folder, train, held_out)
    else:
        gates, report = fit_gates(recipe, folder, train, held_out, settings.method)
    install_gates(folder, gates)
    record_gates(folder, report.method, report.labels, report.tokens)
    return report


def _best(
    recipe: Recipe, folder: Path, train: list[RoutingExample], held_out: list[RoutingExample]
) -> tuple[Gates, GateReport]:
    """The gates of the method with the least held-out answer loss, in the mean over domains; all losses reported."""
    fitted = {name: fit_gates(recipe, folder, train, held_out, name) for name in METHODS}
    compared = held_out_losses(recipe, folder, held_out, {name: gates for name, (gates, _) in fitted.items()})
    best = min(METHODS, key=lambda name: mean_loss(compared[name]))
    gates, report = fitted[best]
    return gates, replace(report, compared=compared)


def _refined(
    recipe: Recipe, folder: Path, train: list[RoutingExample], held_out: list[RoutingExample]
) -> tuple[Gates, GateReport]:
    """Gates by cross-entropy, refined by the answers' loss; both compared, the report that of the refined ones."""
    from gate_training.refine import refine  # transformers' Trainer takes seconds to import

    start, report = fit_gates(recipe, folder, train, held_out, "cross-entropy")
    gates, refined = refine(recipe, folder, start, train, held_out)
    compared = held_out_losses(recipe, folder, held_out, {"cross-entropy": start, "lm": gates})
    layers = _measure_gates(recipe, folder, gates, held_out)
    return gates, replace(report, method="lm", layers=layers, compared=compared, refined=asdict(refined))


def _measure_gates(recipe: Recipe, folder: Path, gates: Gates, held_out: list[RoutingExample]) -> list[LayerReport]:
    """Held-out routing of gates that are there already."""
    checkpoint, batches = Checkpoint(folder), encoded_examples(recipe, folder, held_out)
    inputs = _GateInputs(batches, [], checkpoint.config["hidden_size"], None)
    reports = []
    for layer in LayerStream(checkpoint, batches, description="gates by lm"):
        layer.attend()
        if layer.sparse:
            inputs.fill(layer)
            domains = [example.domain for example in held_out]
            reports.append(_measure(layer.index, gates[layer.index], inputs, batches, domains, recipe))
        layer.mix(gated(gates, checkpoint.config["num_experts_per_tok"]), inputs.of if layer.sparse else None)
    return reports


def fit_gates(
    recipe: Recipe,
    folder: Path,
    train: list[RoutingExample],
    held_out: list[RoutingExample],
    method: str,
    top_k: int | None = None,
) -> tuple[Gates, GateReport]:
    """The gates by layer, `(experts, hidden)` in the checkpoint's dtype, and the report on `held_out`.

    Tokens move on through their first `top_k` experts (None: the checkpoint's).
    """
    settings, checkpoint = recipe.gate_training, Checkpoint(folder)
    trained, measured = (encoded_examples(recipe, folder, rows) for rows in (train, held_out))
    domains = [example.domain for example in (*train, *held_out)]
    dtype = getattr(torch, checkpoint_dtype(folder))
    experts, hidden = len(recipe.experts), checkpoint.config["hidden_size"]
    top_k = top_k or checkpoint.config["num_experts_per_tok"]
    if method == "likelihood":
        targets = token_targets(checkpoint, trained, experts, settings.window)
    else:
        targets = [one_hot(batch.token_labels(), experts).float() for batch in trained]
    batches = joined([trained, measured])
    stream = LayerStream(checkpoint, batches, description=f"gates by {method}")
    inputs = _GateInputs(batches, targets, hidden, top_k if method == "regression" else None)
    gates: Gates = {}
    reports = []
    for layer in stream:
        layer.attend()
        if layer.sparse:
            inputs.fill(layer)
            gate = METHODS[method](inputs, moments(inputs), settings)
            gates[layer.index] = gate.to(dtype)  # tokens move on through what will be served, rounding included
            reports.append(_measure(layer.index, gates[layer.index], inputs, batches[len(trained) :], domains, recipe))
        layer.mix(gated(gates, top_k), inputs.of if layer.sparse else None)
    counts = [sum(int(batch.real.sum()) for batch in part) for part in (trained, measured)]
    agreement = rules_agreement(recipe, held_out)
    return gates, GateReport(method, settings.labels, counts[0], counts[1], agreement, reports)


def install_gates(folder: Path, gates: Gates) -> None:
    """Replaces the checkpoint's gate shard; a reader sees the old gates or the new ones, never half of either."""
    dtype = getattr(torch, checkpoint_dtype(folder))
    write_gates(folder, {gate_tensor(layer): gate for layer, gate in gates.items()}, dtype)


class _GateInputs:
    """All tokens' gate inputs at one layer, kept because a fit passes over them many times."""

    def __init__(self, batches: list[Batch], targets: list[torch.Tensor], hidden: int, top_k: int | None):
        """The first batches are trained on `targets`, `(tokens, experts)` each; with `top_k` their costs are kept."""
        counts = [int(batch.real.sum()) for batch in batches]
        parts = state_store(sum(counts), hidden).split(counts)
        self._held_back = _held_back(batches[: len(targets)])
        self._batches, self._targets, self._top_k = batches, targets, top_k
        self._inputs = {batch.start: part for batch, part in zip(batches, parts, strict=True)}
        self._costs: list[torch.Tensor | None] = [None] * len(targets)

    def fill(self, layer: Layer) -> None:
        """Takes the inputs of `layer`, after its attention, and what each expert makes of them where that counts."""
        for batch in self._batches:
            self.of(batch).copy_(layer.gate_input(batch))
        if self._top_k is not None:
            for i, targets in enumerate(self._targets):
                outputs = layer.every_expert(self.of(self._batches[i]).to(layer.device))
                self._costs[i] = regression.costs(outputs.cpu(), targets, self._top_k)

    def of(self, batch: Batch) -> torch.Tensor:
        """The gate inputs of a batch, `(tokens, hidden)`."""
        return self._inputs[batch.start]

    def __call__(self) -> Iterator[Tokens]:
        """One pass over the tokens to be trained on, batch by batch."""
        parts = zip(self._batches, self._targets, self._held_back, self._costs, strict=False)
        for batch, targets, left_out, costs in parts:
            yield Tokens(self.of(batch), targets, left_out, left_out & batch.answer[batch.real], costs)


def _held_back(batches: list[Batch]) -> list[torch.Tensor]:
    """The tokens of the conversations that are held back, `(tokens,)` a batch."""
    labels = torch.empty(sum(len(batch.rows) for batch in batches), dtype=torch.long)  # (rows,)
    for batch in batches:
        labels[batch.rows] = batch.labels
    chosen = held_back(labels)
    return [chosen[batch.rows][:, None].expand_as(batch.ids)[batch.real] for batch in batches]


def _measure(
    layer: int, gate: torch.Tensor, inputs: _GateInputs, batches: list[Batch], domains: list[str], recipe: Recipe
) -> LayerReport:
    """Held-out routing of one layer, by first choice."""
    names = sorted(set(domains), key=list(recipe.domains).index)
    number = torch.tensor([names.index(domain) for domain in domains])  # (rows,)
    right = torch.tensor([recipe.expert_of(name) for name in names])
    chosen = torch.zeros(2, len(names), len(recipe.experts))  # of all tokens, of answer tokens
    bins = torch.zeros(BINS, 3)  # tokens, confidence, right ones
    entropy = 0.0
    for batch in batches:
        probabilities = torch.softmax(inputs.of(batch) @ gate.float().T, dim=1)  # (tokens, experts)
        confidence, first = probabilities.max(dim=1)  # (tokens,)
        domain = number[batch.rows][:, None].expand_as(batch.ids)[batch.real]
        answer = batch.answer[batch.real]
        for kind, kept in enumerate((torch.ones_like(answer), answer)):
            chosen[kind].index_put_((domain[kept], first[kept]), torch.ones(()), accumulate=True)
        entropy -= float(torch.special.xlogy(probabilities, probabilities)[answer].sum())
        hit = (first == right[domain]).float()
        place = (confidence * BINS).long().clamp_max(BINS - 1)
        bins.index_add_(0, place, torch.stack([torch.ones_like(hit), confidence, hit], dim=1))
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
        entropy=entropy / max(1.0, float(tokens[1].sum())),
        calibration=[
            Confidence(sure / count, found / count, count / float(bins[:, 0].sum()))
            for count, sure, found in bins.tolist()
            if count
        ],
    )
