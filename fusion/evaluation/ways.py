"""The ways to serve a family, each with its answer loss by domain on the evaluation's held-out rows.

    for way in ways(recipe, held_out(recipe), recipe.fused): print(way.name, way.measure())

Anchor and own experts; one dense model; whole experts, or adapters of the anchor, behind a router that reads the
question (rules, then classifier); the fused model under perfect routing, under every gate, behind every candidate for
its shared parts where its experts have drifted, and healed.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fusion.architecture import MANIFEST
from fusion.checkpoint import Checkpoint, read_json, written_aside
from fusion.data import ChatExample
from fusion.encoding import encode_batches, load_tokenizer
from fusion.evaluation.adapters import LORA_RANK, extracted
from fusion.evaluation.answer_loss import Nats, answer_nats
from fusion.evaluation.dense import DENSE, UNION, folder_of
from fusion.evaluation.evaluate import held_out_rows
from fusion.hardware import compute_dtype
from fusion.healed import is_healed
from fusion.layers import Gates, Route, Source, checkpoint_gates, forced, gated
from fusion.reader import Reader
from fusion.recipe import Recipe
from fusion.sections.fusing import SharedMethod
from fusion.shared import CANDIDATES, fused_behind
from fusion.sources import ModelSource, anchor_source, expert_sources, own_source
from fusion.steps import Step
from gate_training.compare import HIDDEN, mergekit_gates
from gate_training.examples import routing_data
from gate_training.feedback import feedback_file
from gate_training.labelling.combine import whole_experts
from gate_training.trainer import METHODS, fit_gates

ADAPTERS = "adapters"
MERGEKIT = ("mergekit random", "mergekit cheap_embed", HIDDEN)


@dataclass(frozen=True)
class Way:
    """One way: the files and settings that its losses depend on, and how those of each held-out row are measured."""

    name: str
    inputs: list[Path]
    measure: Callable[[], list[Nats]]
    settings: tuple[Any, ...] = ()


@dataclass(frozen=True)
class HeldOut:
    """The rows that every way is measured on, with the expert of each by its domain and by its question."""

    tokenizer: Any
    rows: list[ChatExample]
    right: list[int]
    picked: list[int]

    @property
    def domains(self) -> list[str]:
        """The domain of each row."""
        return [row.domain for row in self.rows]

    def losses(self, source: Source, route: Route, labels: Sequence[int], name: str) -> list[Nats]:
        """A model's losses, its tokens sent as `route` says of rows labelled with the experts `labels`."""
        return self._losses(self.rows, source, route, labels, name)

    def of_whole(self, sources: Sequence[ModelSource], experts: Sequence[int], name: str) -> list[Nats]:
        """The losses where each row is answered by one whole model: that of its expert in `experts`."""
        found: dict[int, Nats] = {}
        for index in sorted(set(experts)):
            mine = [number for number, expert in enumerate(experts) if expert == index]
            rows = [self.rows[number] for number in mine]
            measured = self._losses(rows, Reader(sources[index]), forced(0), [0] * len(rows), name)
            found |= dict(zip(mine, measured, strict=True))
        return [found[number] for number in range(len(self.rows))]

    def _losses(
        self, rows: Sequence[ChatExample], source: Source, route: Route, labels: Sequence[int], name: str
    ) -> list[Nats]:
        batches = encode_batches(self.tokenizer, rows, labels)
        return answer_nats(source, batches, route, f"answer loss, {name}", compute_dtype())


def held_out(recipe: Recipe) -> HeldOut:
    """The evaluation's rows. Raises UserError where none is left that was not trained on."""
    rows = [row for found in held_out_rows(recipe, list(recipe.domains)).values() for row in found]
    right = [recipe.expert_of(row.domain) for row in rows]
    picked = whole_experts(recipe, [row.question for row in rows])
    return HeldOut(load_tokenizer(anchor_source(recipe).folder), rows, right, picked)


def ways(recipe: Recipe, rows: HeldOut, folder: Path, adapters: bool = True) -> Iterator[Way]:
    """Every way that is there; `folder` has the fused model as merge and train-gates left it."""
    yield from _without_fusing(recipe, rows, adapters)
    yield from _fused(recipe, rows, folder)
    if _drifted(folder):
        yield from _behind_candidates(recipe, rows)
    if is_healed(recipe.fused):
        healed = Checkpoint(recipe.fused)
        route = gated(checkpoint_gates(healed), healed.config["num_experts_per_tok"])
        yield Way("fused, healed", [recipe.fused], lambda: rows.losses(healed, route, rows.right, "healed"))


def _without_fusing(recipe: Recipe, rows: HeldOut, adapters: bool) -> Iterator[Way]:
    anchor = anchor_source(recipe)
    own = [own_source(recipe, expert) for expert in recipe.experts]
    paths = [path for source in own for path in source.paths]

    def dense(source: ModelSource) -> Callable[[], list[Nats]]:
        return lambda: rows.losses(Reader(source), forced(0), [0] * len(rows.rows), source.name)

    def adapted() -> list[Nats]:
        made = extracted(recipe, folder_of(recipe, ADAPTERS))
        sources = [ModelSource(e.name, anchor.folder, made.get(e.name)) for e in recipe.experts]
        return rows.of_whole(sources, rows.picked, "adapters")

    yield Way("anchor", anchor.paths, dense(anchor))
    yield Way("own expert", paths, lambda: rows.of_whole(own, rows.right, "own experts"))
    yield Way("whole expert, by its question", paths, lambda: rows.of_whole(own, rows.picked, "routed whole experts"))
    merged = [path for source in expert_sources(recipe) for path in source.paths]
    if adapters:
        yield Way(f"anchor with LoRA adapters of rank {LORA_RANK}, by its question", merged, adapted)
    for name in (*DENSE, UNION):
        if (place := folder_of(recipe, name)).is_dir():
            yield Way(f"dense, {name}", [place], dense(ModelSource(name, place)))


def _fused(recipe: Recipe, rows: HeldOut, folder: Path) -> Iterator[Way]:
    checkpoint, inputs = Checkpoint(folder), [folder]
    top = checkpoint.config["num_experts_per_tok"]

    def by(gates: Callable[[], Gates], k: int, name: str) -> Callable[[], list[Nats]]:
        return lambda: rows.losses(checkpoint, gated(gates(), k), rows.right, name)

    yield Way("fused, perfect routing", inputs, lambda: rows.losses(checkpoint, forced(), rows.right, "labelled"))
    yield Way("fused, by its question", inputs, lambda: rows.losses(checkpoint, forced(), rows.picked, "by question"))
    for mode in MERGEKIT:
        found = by(lambda mode=mode: mergekit_gates(recipe, folder, [mode])[mode], top, mode)  # type: ignore[misc]
        settings = (recipe.evaluation.hidden_prompts, recipe.gate_training, recipe.domains)
        yield Way(f"fused, {mode}", inputs, found, settings)
    for method in METHODS:
        if (file := gates_file(recipe, method)).is_file():
            found = by(lambda file=file: _read_gates(file), top, method)  # type: ignore[misc]
            yield Way(f"fused, gates by {method}", [*inputs, file], found)
    for k in sorted({1, 2, top} & set(range(1, len(recipe.experts) + 1))):
        yield Way(own_gates(k), inputs, by(lambda: checkpoint_gates(checkpoint), k, f"top-{k}"))


def own_gates(k: int) -> str:
    """What the fused model is called as it is served, with `k` experts a token."""
    return f"fused, its own gates, top-{k}"


def _behind_candidates(recipe: Recipe, rows: HeldOut) -> Iterator[Way]:
    models = [path for source in (anchor_source(recipe), *expert_sources(recipe)) for path in source.paths]
    for method in CANDIDATES:

        def measure(method: SharedMethod = method) -> list[Nats]:
            with tempfile.TemporaryDirectory(dir=recipe.folder) as aside:
                source = fused_behind(recipe, method, Path(aside) / method)
                return rows.losses(source, forced(), rows.right, f"shared parts by {method}")

        yield Way(f"fused, perfect routing, shared parts by {method}", models, measure)


def _drifted(folder: Path) -> bool:
    """Whether the merge found an expert with other attention, norms, embeddings or head than the anchor."""
    return any(row["differs_at"] for row in read_json(folder / MANIFEST)["experts"])


def gates_file(recipe: Recipe, method: str) -> Path:
    """Where the gates that a method fits are kept."""
    return folder_of(recipe, "gates") / f"{method}.safetensors"


def gates_step(recipe: Recipe, method: str, folder: Path) -> Step:
    """The gates that `method` fits to the fused model in `folder`."""
    out = gates_file(recipe, method)

    def action() -> None:
        gates, _ = fit_gates(recipe, folder, routing_data(recipe, folder), method)
        with written_aside(out) as aside:
            save_file({str(layer): gate.contiguous() for layer, gate in gates.items()}, aside)

    parts = [recipe.gate_training, recipe.domains, [expert.domain for expert in recipe.experts]]
    learnt = [feedback_file(recipe)] if feedback_file(recipe).is_file() else []
    return Step(f"gates by {method}", parts, [folder, *learnt], [out], action)


def _read_gates(file: Path) -> Gates:
    return {int(layer): gate for layer, gate in load_file(file).items()}
