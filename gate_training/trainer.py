"""The gate trainer: layer by layer over the fused checkpoint, one layer's weights in memory.

    qwen-fusion train-gates configs/demo.yaml

At every layer the tokens pass the attention, the gate is fitted on the exact input it will see when served (the output
of post_attention_layernorm, chat template applied), and the tokens move on through the experts that the fresh gate
picks. Held-out examples travel along and are only measured.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fusion.architecture import gate_tensor
from fusion.checkpoint import Checkpoint
from fusion.encoding import encode_batches, load_tokenizer
from fusion.layers import Batch, Layer, LayerStream, gated, normalised_top_k, state_store
from fusion.merge import checkpoint_dtype, record_gates, write_gates
from fusion.recipe import Recipe
from gate_training.examples import RoutingExample, expert_labels, routing_examples, rules_agreement
from gate_training.methods import cross_entropy, ridge

METHODS = {"ridge": ridge.fit, "cross-entropy": cross_entropy.fit}


@dataclass(frozen=True)
class LayerReport:
    """How one layer's gate routes held-out tokens: shares in [0, 1], per domain and per expert."""

    layer: int
    accuracy: float
    answer_accuracy: float
    accuracy_by_domain: dict[str, float]
    answer_accuracy_by_domain: dict[str, float]
    share_by_expert: dict[str, float]  # of held-out tokens, first choice


@dataclass(frozen=True)
class GateReport:
    """What the training saw and what came of it."""

    method: str
    labels: str
    tokens: int
    held_out_tokens: int
    rules_agreement: dict[str, float]  # per domain, of held-out examples
    layers: list[LayerReport]

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
    gates, report = fit_gates(recipe, folder, train, held_out)
    install_gates(folder, gates)
    record_gates(folder, report.method, report.labels, report.tokens)
    return report


def fit_gates(
    recipe: Recipe, folder: Path, train: list[RoutingExample], held_out: list[RoutingExample]
) -> tuple[dict[int, torch.Tensor], GateReport]:
    """The gates by layer, `(experts, hidden)` in the checkpoint's dtype, and the report on `held_out`."""
    settings, checkpoint = recipe.gate_training, Checkpoint(folder)
    examples = [*train, *held_out]
    domains = [example.domain for example in examples]
    batches = encode_batches(
        load_tokenizer(folder),
        [example.example for example in examples],
        expert_labels(recipe, examples),
        settings.max_length,
        settings.batch_tokens,
    )
    dtype = getattr(torch, checkpoint_dtype(folder))
    experts, hidden = len(recipe.experts), checkpoint.config["hidden_size"]
    stream = LayerStream(checkpoint, batches, description="gates")
    inputs = _GateInputs(batches, len(train), hidden)
    gates: dict[int, torch.Tensor] = {}
    reports = []
    for layer in stream:
        layer.attend()
        if layer.sparse:
            inputs.fill(layer)
            gate = METHODS[settings.method](inputs, experts, hidden, settings)
            gates[layer.index] = gate.to(dtype)  # tokens move on through what will be served, rounding included
            reports.append(_measure(layer, gates[layer.index], batches, len(train), domains, recipe))
        layer.mix(gated(gates, checkpoint.config["num_experts_per_tok"]))
    counts = [0, 0]
    for batch in batches:
        for row, real in zip(batch.rows.tolist(), batch.real, strict=True):
            counts[row >= len(train)] += int(real.sum())
    agreement = rules_agreement(recipe, held_out)
    return gates, GateReport(settings.method, settings.labels, counts[0], counts[1], agreement, reports)


def install_gates(folder: Path, gates: dict[int, torch.Tensor]) -> None:
    """Replaces the checkpoint's gate shard; a reader sees the old gates or the new ones, never half of either."""
    dtype = getattr(torch, checkpoint_dtype(folder))
    write_gates(folder, {gate_tensor(layer): gate for layer, gate in gates.items()}, dtype)


class _GateInputs:
    """The training tokens' gate inputs at one layer, kept because a fit passes over them many times."""

    def __init__(self, batches: list[Batch], trained: int, hidden: int):
        chosen = [batch for batch in batches if bool((batch.rows < trained).any())]
        kept = [(batch.rows < trained)[:, None].expand_as(batch.ids)[batch.real] for batch in chosen]  # (tokens,) each
        labels = [batch.token_labels()[tokens] for batch, tokens in zip(chosen, kept, strict=True)]
        counts = [len(part) for part in labels]
        self._parts = list(zip(chosen, kept, state_store(sum(counts), hidden).split(counts), labels, strict=True))

    def fill(self, layer: Layer) -> None:
        """Takes the inputs of `layer`, after its attention."""
        for batch, kept, inputs, _ in self._parts:
            inputs.copy_(layer.gate_input(batch)[kept])

    def __call__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One pass: (gate inputs (tokens, hidden), expert labels (tokens,)) batch by batch."""
        for _, _, inputs, labels in self._parts:
            yield inputs, labels


def _measure(
    layer: Layer, gate: torch.Tensor, batches: list[Batch], trained: int, domains: list[str], recipe: Recipe
) -> LayerReport:
    """Held-out routing of one layer, by first choice."""
    names = sorted(set(domains), key=list(recipe.domains).index)
    right = {name: [0, 0, 0, 0] for name in names}  # tokens, right, answer tokens, right
    chosen_by_expert = torch.zeros(len(recipe.experts))
    for batch in batches:
        held_out = batch.rows >= trained
        if not held_out.any():
            continue
        first = normalised_top_k(layer.gate_input(batch).cpu() @ gate.float().T, 1).experts[:, 0]  # (tokens,)
        hit = torch.zeros(batch.ids.shape, dtype=torch.bool)
        hit[batch.real] = first == batch.token_labels()
        used = held_out[:, None].expand_as(batch.ids)[batch.real]
        chosen_by_expert += torch.bincount(first[used], minlength=len(recipe.experts))
        answer = batch.answer & batch.real
        for line in held_out.nonzero().flatten().tolist():
            counts = right[domains[int(batch.rows[line])]]
            counts[0] += int(batch.real[line].sum())
            counts[1] += int(hit[line].sum())
            counts[2] += int(answer[line].sum())
            counts[3] += int((hit[line] & answer[line]).sum())
    total = [sum(counts[i] for counts in right.values()) for i in range(4)]
    shares = chosen_by_expert / chosen_by_expert.sum().clamp_min(1)
    return LayerReport(
        layer=layer.index,
        accuracy=total[1] / max(total[0], 1),
        answer_accuracy=total[3] / max(total[2], 1),
        accuracy_by_domain={name: c[1] / max(c[0], 1) for name, c in right.items()},
        answer_accuracy_by_domain={name: c[3] / max(c[2], 1) for name, c in right.items()},
        share_by_expert={e.name: float(s) for e, s in zip(recipe.experts, shares, strict=True)},
    )
