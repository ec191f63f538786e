"""The gate trainer: layer by layer over the fused checkpoint, one layer's weights in memory.

    qwen-fusion train-gates configs/demo.yaml
    accelerate launch --num_processes 4 -m fusion.cli train-gates configs/qwen2.5-7b-five-experts.yaml

At every layer the tokens pass the attention, the gate is fitted on the exact input it will see when served (the output
of post_attention_layernorm, chat template applied), and the tokens move on through the experts that the fresh gate
picks, or through their label's (`propagation`). Held-out examples travel along, always by the gates, and are only
measured. `auto` fits with every such method and keeps the one with the least answer loss on them; `threshold: auto`
does so with how sure a gate has to be against the general expert; `lm` goes on from cross-entropy through the whole
model (gate_training/refine.py). An interrupted fit goes on after the last layer that was done. Processes share the
conversations; what they add up are sums.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState

from fusion.architecture import MANIFEST, gate_tensor
from fusion.checkpoint import Checkpoint, read_json
from fusion.errors import UserError
from fusion.hardware import compute_dtype
from fusion.kept_gates import keep_gates
from fusion.layers import Batch, Choice, Gates, LayerStream, Route, checkpoint_gates, forced, gated, joined
from fusion.merge import checkpoint_dtype, gates_are_trained, record_gates, write_gates
from fusion.plan.budget import budget
from fusion.recipe import Recipe
from fusion.sections.data import general_domain
from fusion.sources import anchor_source
from gate_training.compare import Losses, compared_name, held_out_losses, mean_loss, mergekit_gates, references
from gate_training.examples import RoutingData, routing_data, write_labels
from gate_training.feedback import read_feedback
from gate_training.held_out import LayerReport, layer_report, layer_reports
from gate_training.judge import judge
from gate_training.labelling.likelihood import token_targets
from gate_training.layer_tokens import LayerTokens, label_targets, token_marks
from gate_training.methods import cross_entropy, new_row, regression, ridge
from gate_training.methods.tokens import moments
from gate_training.resume import LayerNotes
from gate_training.statistics import Statistics
from gate_training.threshold import lean

METHODS = {
    "ridge": ridge.fit,
    "cross-entropy": cross_entropy.fit,
    "likelihood": cross_entropy.fit,  # on the experts' own likelihoods in the place of labels
    "regression": regression.fit,
}
THRESHOLDS = (0.6, 0.75, 0.9)  # that `threshold: auto` tries beside none


@dataclass(frozen=True)
class Joining:
    """An expert that joins the others: its number, and their gates by layer, `(experts - 1, hidden)`, which stay."""

    index: int
    gates: Gates


@dataclass(frozen=True)
class GateReport:
    """What the training saw and what came of it."""

    method: str
    labels: str
    tokens: int
    held_out_tokens: int
    rules_agreement: dict[str, float]  # per domain, of held-out examples
    disputed: int  # training examples whose label channels disagree
    layers: list[LayerReport]
    threshold: float | None = None  # against the general expert
    # where methods or thresholds were compared, by what is compared (gate_training/compare.py)
    compared: dict[str, Losses] = field(default_factory=dict)
    active_parameters: dict[str, int] = field(default_factory=dict)  # a token passes, by "top-k", where compared
    refined: dict[str, Any] | None = None  # method lm: gate_training.refine.Refined
    judged: dict[str, Any] | None = None  # where feedback was learnt from: gate_training.judge.Judgement

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def train_gates(
    recipe: Recipe, folder: Path, joining: Joining | None = None, feedback: Path | None = None
) -> GateReport:
    """Fits the gates of the fused checkpoint in `folder` and puts them in place; returns the held-out report.

    Trained gates that were there are kept for `rollback`. With the file `feedback` the new ones learn from its rows
    too, and are judged beside those: UserError, and the old ones stay, where they lose on any domain.

    With `joining` only that expert's row is fitted, by cross-entropy or, where the recipe keeps sums, by least squares.
    Raises UserError where the data leave an expert without examples.
    """
    settings = recipe.gate_training
    PartialState().wait_for_everyone()  # for the one that has prepared the folder
    data = routing_data(recipe, folder, feedback)
    if settings.method == settings.threshold == "auto" and PartialState().num_processes > 1:
        raise UserError(
            "method and threshold 'auto' together are the work of one process: launch one, or name a method"
        )
    if joining:
        method = settings.method if settings.method in ("ridge", "likelihood") else "cross-entropy"
        gates, report = fit_gates(recipe, folder, data, method, joining=joining)
    elif settings.method == "auto":
        gates, report = _best(recipe, folder, data)
    elif settings.method == "lm":
        if PartialState().num_processes > 1:
            raise UserError("gate_training.method 'lm' is the work of one process: launch one")
        gates, report = _refined(recipe, folder, data)
    else:
        gates, report = fit_gates(recipe, folder, data, settings.method)
    if settings.threshold == "auto" and not joining:
        gates, report = _calibrated(recipe, folder, data, gates, report)
    if feedback and gates_are_trained(folder):
        old = checkpoint_gates(Checkpoint(folder))
        judged = judge(recipe, folder, data, read_feedback(feedback, recipe), old, gates)
        report = replace(report, judged=judged.as_dict())
    if not is_helper():
        keep_gates(recipe, folder, gates)
        install_gates(folder, gates)
        record_gates(folder, report.method, report.labels, report.tokens, report.threshold)
        write_labels(data, recipe.folder / "labels.jsonl")
        LayerNotes.forget(recipe.folder)
    return report


def is_helper() -> bool:
    """Whether this is one of several processes that share the work, and not the one that keeps its result."""
    return not PartialState().is_main_process


def _best(recipe: Recipe, folder: Path, data: RoutingData) -> tuple[Gates, GateReport]:
    """The gates of the method with the least held-out answer loss, in the mean over domains.

    The report has those of every method and of mergekit's gates, with one and with two experts a token.
    """
    fitted = {name: fit_gates(recipe, folder, data, name) for name in METHODS}
    if is_helper():
        return fitted["ridge"]  # the comparison is one process's
    gates = {name: found for name, (found, _) in fitted.items()} | mergekit_gates(recipe, folder)
    compared = references(recipe, folder, data)
    active = {}
    for top_k in sorted({1, 2, recipe.routing.top_k} & set(range(1, len(recipe.experts) + 1))):
        losses = held_out_losses(folder, data, gates, top_k)
        active[f"top-{top_k}"] = _active_parameters(recipe, top_k)
        compared |= {compared_name(name, top_k): row for name, row in losses.items()}
    best = min(METHODS, key=lambda name: mean_loss(compared[compared_name(name, recipe.routing.top_k)]))
    chosen, report = fitted[best]
    return chosen, replace(report, compared=compared, active_parameters=active)


def _calibrated(
    recipe: Recipe, folder: Path, data: RoutingData, gates: Gates, report: GateReport
) -> tuple[Gates, GateReport]:
    """`gates`, or those of the same method under the threshold with the least held-out answer loss."""
    fitted: dict[float | None, tuple[Gates, GateReport]] = {None: (gates, report)}
    for threshold in THRESHOLDS:
        settings = recipe.gate_training.model_copy(update={"threshold": threshold})
        leaning = recipe.model_copy(update={"gate_training": settings})
        fitted[threshold] = fit_gates(leaning, folder, data, report.method)
    if is_helper():
        return gates, report
    names = {t: report.method if t is None else f"{report.method}, threshold {t}" for t in fitted}
    losses = held_out_losses(folder, data, {names[t]: found for t, (found, _) in fitted.items()})
    best = min(fitted, key=lambda t: mean_loss(losses[names[t]]))
    compared = report.compared or references(recipe, folder, data)
    compared = compared | {compared_name(name, recipe.routing.top_k): row for name, row in losses.items()}
    chosen, found = fitted[best]
    return chosen, replace(found, compared=compared, active_parameters=report.active_parameters)


def _active_parameters(recipe: Recipe, top_k: int) -> int:
    """The parameters that a token passes with `top_k` experts."""
    routing = recipe.routing.model_copy(update={"top_k": top_k})
    config = read_json(anchor_source(recipe).folder / "config.json")
    return budget(recipe.model_copy(update={"routing": routing}), config).active_parameters


def _refined(recipe: Recipe, folder: Path, data: RoutingData) -> tuple[Gates, GateReport]:
    """Gates by cross-entropy, refined by the answers' loss; both compared, the report that of the refined ones."""
    from gate_training.refine import refine  # transformers' Trainer takes seconds to import

    start, report = fit_gates(recipe, folder, data, "cross-entropy")
    gates, refined = refine(recipe, folder, start, data)
    compared = references(recipe, folder, data)
    losses = held_out_losses(folder, data, {"cross-entropy": start, "lm": gates})
    compared |= {compared_name(name, recipe.routing.top_k): row for name, row in losses.items()}
    layers = layer_reports(recipe, folder, data, gates)
    return gates, replace(report, method="lm", layers=layers, compared=compared, refined=asdict(refined))


def measured(recipe: Recipe, folder: Path) -> GateReport:
    """The report on gates that are in place already, trained as the manifest says."""
    data, note = routing_data(recipe, folder), read_json(folder / MANIFEST)["gates"]
    layers = layer_reports(recipe, folder, data, checkpoint_gates(Checkpoint(folder)))
    held_out = sum(len(row.ids) for row in data.held_out)
    disputed = sum(example.label.disputed for example in data.train_examples)
    noted = (note["method"], note["labels"], note["tokens"], held_out, data.rules_agreement, disputed, layers)
    return GateReport(*noted, note["threshold"])


def fit_gates(
    recipe: Recipe,
    folder: Path,
    data: RoutingData,
    method: str,
    top_k: int | None = None,
    joining: Joining | None = None,
) -> tuple[Gates, GateReport]:
    """The gates by layer, `(experts, hidden)` in the checkpoint's dtype, and the report on what is held out.

    Tokens move on through their first `top_k` experts (None: the checkpoint's).
    """
    settings, checkpoint = recipe.gate_training, Checkpoint(folder)
    dtype = getattr(torch, checkpoint_dtype(folder))
    top_k = top_k or checkpoint.config["num_experts_per_tok"]
    general = recipe.expert_of(general_domain(recipe.domains))
    threshold = None if settings.threshold == "auto" else settings.threshold
    incremental = method == "ridge" and settings.propagation == "labels"
    statistics = Statistics(recipe, folder, data) if incremental else None
    work = _laid_out(recipe, checkpoint, data, method, top_k, statistics)
    weights = read_json(folder / MANIFEST)["sha256"]
    missing = sorted(statistics.missing) if statistics else None
    index = joining.index if joining else None
    notes = LayerNotes(recipe.folder, (settings, method, top_k, data.digest(), weights, missing, index))
    gates, reports = notes.restore(work.stream)
    route = _labels_first(gates, top_k, work.trained) if settings.propagation == "labels" else gated(gates, top_k)
    for layer in work.stream:
        layer.attend()
        if layer.sparse:
            work.tokens.reach(layer)
            work.judges.reach(layer)
            sums = statistics.add(layer.index, work.tokens) if statistics else moments(work.tokens)
            if joining:
                rows = joining.gates[layer.index]
                gate = new_row.fit(work.tokens, work.judges, sums, settings, rows, joining.index)
            else:
                gate = METHODS[method](work.judges, sums, settings)
            if threshold is not None and not joining:
                gate = lean(gate, sums, general, threshold)
            gates[layer.index] = gate.to("cpu", dtype)  # tokens move on through what will be served, rounding included
            reports.append(
                layer_report(layer.index, gates[layer.index], work.stream, work.measured, data.domains, recipe)
            )
        layer.mix(route)
        notes.keep(layer.index, work.stream, gates, reports)
    if statistics:
        statistics.keep()
    counts = [sum(len(row.ids) for row in rows) for rows in (data.train, data.held_out)]
    disputed = sum(example.label.disputed for example in data.train_examples)
    return gates, GateReport(
        method, settings.labels, counts[0], counts[1], data.rules_agreement, disputed, reports, threshold
    )


@dataclass(frozen=True)
class _Work:
    """This process's share: the stream, what of it is trained on and what is held out, and the tokens a fit sees.

    `judges` choose what is chosen: the same tokens, or where sums stand for those, the held-out ones.
    """

    stream: LayerStream
    trained: list[Batch]
    measured: list[Batch]
    tokens: LayerTokens
    judges: LayerTokens


def _laid_out(
    recipe: Recipe, checkpoint: Checkpoint, data: RoutingData, method: str, top_k: int, statistics: Statistics | None
) -> _Work:
    """The conversations that this process streams. Raises UserError where there are too few for all processes."""
    process, experts = PartialState(), len(recipe.experts)
    trained = data.train_batches(statistics.missing if statistics else None)
    held_out = data.held_out_batches()
    for batches in filter(None, (trained, held_out)):
        if len(batches) < process.num_processes:
            raise UserError(
                f"{process.num_processes} processes are more than the {len(batches)} batches of routing examples: "
                "launch fewer, or lower gate_training.batch_tokens"
            )
    share = slice(process.process_index, None, process.num_processes)
    marks = [torch.zeros(0, 2, dtype=torch.bool), *token_marks(trained, checkpoint.config["hidden_size"])[share]]
    trained, measured = trained[share], held_out[share]
    targets = label_targets(trained, experts)
    if method == "likelihood":
        targets = torch.cat(token_targets(checkpoint, trained, experts, recipe.gate_training.window))
    batches = joined([trained, measured])
    before = sum(len(batch.rows) for batch in trained)
    trained, measured = batches[: len(trained)], batches[len(trained) :]
    measured = [replace(batch, rows=batch.rows - before) for batch in measured]  # as `data` numbers them
    stream = LayerStream(checkpoint, batches, dtype=compute_dtype(), description=f"gates by {method}")
    tokens = judges = LayerTokens(stream, trained, targets, torch.cat(marks), top_k if method == "regression" else None)
    if statistics:
        wanted = label_targets(measured, experts)
        judges = LayerTokens(stream, measured, wanted, torch.tensor([[False, True]]).expand(len(wanted), 2))
    return _Work(stream, trained, measured, tokens, judges)


def _labels_first(gates: Gates, top_k: int, trained: list[Batch]) -> Route:
    """What is trained on to its label's expert, what is held out by the gates."""
    labelled, by_gates = forced(), gated(gates, top_k)
    starts = {batch.start for batch in trained}

    def route(layer: int, x: torch.Tensor, batch: Batch) -> Choice:
        if batch.start not in starts:
            return by_gates(layer, x, batch)
        choice = labelled(layer, x, batch)
        padding = (0, top_k - 1)  # to as many experts a token as there are by gates
        return Choice(F.pad(choice.experts, padding, value=-1), F.pad(choice.weights, padding))

    return route


def install_gates(folder: Path, gates: Gates) -> None:
    """Replaces the checkpoint's gate shard; a reader sees the old gates or the new ones, never half of either."""
    dtype = getattr(torch, checkpoint_dtype(folder))
    write_gates(folder, {gate_tensor(layer): gate for layer, gate in gates.items()}, dtype)
