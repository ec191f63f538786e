"""The whole road of a recipe, step by step: plan, branch, anchor, merge, train-gates, heal, evaluate, ask.

    qwen-fusion run configs/demo.yaml

Each function carries out one step and records it; `run` calls them all, and each skips itself when its inputs are as
they were.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markdown import Markdown

from fusion.architecture import GATES_FILE, sparse_layers
from fusion.checkpoint import INDEX, put_back, read_json, write_json, write_text
from fusion.data import load_examples, source_files
from fusion.errors import UserError
from fusion.hub import resolve_model
from fusion.plan.findings import Finding, raise_on_error, worst_first
from fusion.plan.models import SHAPES, describe_anchor
from fusion.plan.preflight import check
from fusion.plan.profile import HardwareProfile
from fusion.plan.survey import survey
from fusion.plan.table import print_findings, print_plan
from fusion.progress import console, quiet_libraries, size
from fusion.provenance import made
from fusion.recipe import Recipe
from fusion.road_experts import anchor, branch
from fusion.sections.data import DataSource
from fusion.sections.section import Location
from fusion.sources import (
    SHARED_NOTE,
    anchor_source,
    base_source,
    expert_sources,
    original_source,
    own_source,
    shared_expert_source,
    shared_parts,
)
from fusion.steps import Step, forget, run_step

if TYPE_CHECKING:
    from fusion.merge import Reuse
    from gate_training.trainer import GateReport

quiet_libraries()  # one bar a step is enough

LATER = ("merge", "train-gates", "heal", "evaluate", "ask")


def run(recipe: Recipe) -> None:
    """Every step in order, those with unchanged inputs skipped, and the report."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("`run` is the work of one process: launch several for `train-gates` alone")
    plan(recipe)
    if recipe.evaluation.contamination_ngram:
        from fusion.evaluation.evaluate import held_out_rows

        held_out_rows(recipe, list(recipe.domains))  # refuses what would be found out after the training
    branch(recipe)
    if any(expert.anchor for expert in recipe.experts):
        anchor(recipe)
    merge(recipe)
    train_gates(recipe)
    if recipe.heal:
        heal(recipe)
    evaluate(recipe)
    ask_samples(recipe)
    report(recipe)


def plan(
    recipe: Recipe,
    hardware: HardwareProfile | None = None,
    weights: bool = False,
    write: Callable[[dict[str, Any]], None] = lambda plan: None,
) -> dict[str, Any]:
    """Findings, sizes and what fits, printed and as plain data, which `write` is given.

    With `weights` also how far every expert has moved, measured on the weights. Raises UserError for the first error
    among the findings, once all has been printed and written, and where weights to be measured are not here.
    """
    findings = check(recipe) + _unusable(recipe)
    sizes: dict[str, Any] = {}
    config = _countable_anchor(recipe)
    if config is not None:
        fitting, sizes = survey(recipe, config, hardware)
        findings += fitting
    findings = worst_first(findings)
    result = {"recipe": recipe.name, "findings": [finding.as_dict() for finding in findings], **sizes}
    print_plan(result)
    try:
        if weights:
            from fusion.plan.weights import markdown, measure

            result["drift"] = measure(recipe, recipe.folder / "drift")
            more = [Finding(**row) for row in result["drift"]["findings"]]
            print_findings(more)
            console.print(Markdown(markdown(result["drift"])))
            findings = worst_first([*findings, *more])
            result["findings"] = [finding.as_dict() for finding in findings]
    finally:
        write(result)
    raise_on_error(recipe, findings[:1])
    return result


def _countable_anchor(recipe: Recipe) -> dict[str, Any] | None:
    """The anchor's config; None where it is not one whose fused model could be counted, which a finding says."""
    try:
        config = describe_anchor(recipe).config
        if config.get("model_type") != "qwen2" or any(key not in config for key in SHAPES):
            return None
        sparse_layers(config["num_hidden_layers"], recipe.routing.moe_layers)
    except UserError:
        return None
    return config


def _unusable(recipe: Recipe) -> list[Finding]:
    """Findings on what the road needs beside models: the classifier, the output folder, local data."""
    found = []
    if recipe.gate_training.classifier:
        try:
            resolve_model(recipe.gate_training.classifier)
        except UserError as error:
            found.append(Finding("error", "gate_training.classifier", str(error)))
    above = next(folder for folder in (recipe.folder, *recipe.folder.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError:
        found.append(Finding("error", "output", f"{recipe.folder} cannot be created", fix="name another folder"))
    for location, source, domain in _sources(recipe):
        try:
            for part in source.parts or (source,):
                if source_files(part):  # local data are read once: a broken row is better told now than after hours
                    load_examples(part, domain, 1)
        except UserError as error:
            found.append(Finding("error", ".".join(map(str, location)), str(error)))
    return found


def _sources(recipe: Recipe) -> Iterator[tuple[Location, DataSource, str]]:
    """Every data source of the recipe: where it is named, and the domain or task it is for."""
    for name, domain in recipe.domains.items():
        yield ("domains", name, "train"), domain.train, name
        yield ("domains", name, "held_out"), domain.held_out, name
    for i, expert in enumerate(recipe.experts):
        for key, section in (("branch", expert.branch), ("anchor", expert.anchor)):
            if section:
                yield ("experts", i, key, "data"), section.data, expert.domain
                if section.held_out:
                    yield ("experts", i, key, "held_out"), section.held_out, expert.domain
    for name, extra in recipe.evaluation.extra.items():
        yield ("evaluation", "extra", name), extra, name


def merge(recipe: Recipe, force: bool = False) -> None:
    """Merges the experts into the recipe's fused folder, behind the shared parts that the recipe asks for."""
    expert_sources(recipe)  # refuses what has yet to be made
    raise_on_error(recipe, check(recipe, trained=True))  # once more, now that every model is here
    if not recipe.shared.is_anchor:
        run_step(_shared_step(recipe), recipe.folder, force)
    run_step(merge_step(recipe), recipe.folder, force)
    from fusion.merge import write_papers

    write_papers(recipe, recipe.fused)


def merge_step(recipe: Recipe, reuse: "Reuse | None" = None) -> Step:
    """The merge, which takes over what `reuse` has, under the hash of all that decides its shards."""
    out = recipe.fused
    sources = [base_source(recipe), *expert_sources(recipe), shared_expert_source(recipe)]
    folders = [path for source in sources if source for path in source.paths]

    def action() -> str:
        from fusion.kept_gates import kept_folder
        from fusion.merge import merge as merge_models

        merge_models(recipe, out, reuse)
        for replaced in (unhealed_folder(recipe), kept_folder(recipe)):
            shutil.rmtree(replaced, ignore_errors=True)
        forget(recipe.folder, LATER[1:])  # the gates are random again
        stats = [path.stat() for path in out.glob("*.safetensors")]
        linked = sum(stat.st_nlink > 1 for stat in stats) if reuse else 0
        kept = f", {linked} of them the files of before" if linked else ""
        return f"{len(stats)} shards, {size(sum(stat.st_size for stat in stats))} in {out}{kept}"

    named = [expert.model_dump(mode="json", exclude={"branch", "anchor"}) for expert in recipe.experts]
    sections = [recipe.shared, recipe.routing, recipe.merging]
    parts = [recipe.name, recipe.license, named, *sections, recipe.gate_training.seed]
    return Step("merge", parts, folders, _merged_files(out), action)


def _shared_step(recipe: Recipe) -> Step:
    out = shared_parts(recipe)
    models = [anchor_source(recipe), *expert_sources(recipe)]
    data = _domain_files(recipe)
    inputs = [*(path for model in models for path in model.paths), *data]
    parts = [recipe.shared, recipe.domains, recipe.routing.moe_layers, [expert.domain for expert in recipe.experts]]

    def action() -> str:
        from fusion.shared import make_shared_parts

        return make_shared_parts(recipe, out).sentence()

    return Step("shared", parts, inputs, [out / SHARED_NOTE], action)


def train_gates(recipe: Recipe, force: bool = False, with_feedback: bool = False) -> None:
    """Fits the gates of the fused model as it was merged, before any healing, and writes their report.

    A running server takes them. Gates that were rolled back to stay unless this is asked for (`force`). What feedback
    says is learnt from then on; with that of the store (`with_feedback`) new gates are judged before they stay.
    """
    from fusion.healed import is_healed, restore
    from fusion.kept_gates import is_rolled_back
    from fusion.merge import gates_are_trained, write_papers
    from gate_training.feedback import FILE
    from gate_training.trainer import is_helper
    from gate_training.trainer import train_gates as train

    folder = fused_folder(recipe)
    pending = recipe.folder / ".feedback" / FILE if with_feedback else None
    if is_helper():
        train(recipe, folder, feedback=pending)
        return
    if pending:
        if is_healed(folder):
            raise UserError(
                f"{folder} is healed, its gates together with its attention: `qwen-fusion train-gates` first goes "
                "back to the merge, then --with-feedback, then `qwen-fusion heal`"
            )
        from gate_training.feedback_answers import fill_answers
        from serving.records.feedback import export

        rows = export(recipe, pending)
        answered = fill_answers(recipe, pending)
        said = f"{len(rows)} questions of feedback, {answered} of them answered by their expert now"
        console.print(f"  {said}", highlight=False)
    if recipe.heal is None:
        restore(folder, unhealed_folder(recipe))
    if is_rolled_back(folder) and not force:
        said = "train-gates: rolled back, and so it stays until `qwen-fusion train-gates` is called"
        console.print(f"[dim]{said}[/dim]", highlight=False, soft_wrap=True)
        return
    step = gates_step(recipe, partial(train, feedback=pending), pending)
    run_step(step, recipe.folder, force or not gates_are_trained(folder))
    write_papers(recipe, folder)
    _tell_server(recipe)


def rollback(recipe: Recipe) -> None:
    """Exchanges the gates and those that `train-gates` replaced by them, in the checkpoint and in a running server.

    Raises UserError where there are none, or where they are of other experts or of the model before it was healed.
    """
    from fusion.kept_gates import put_back_gates
    from fusion.merge import write_papers

    folder = gated_folder(recipe)
    note = put_back_gates(recipe, folder)
    write_papers(recipe, folder)
    said = f"gates by {note['method']} on {note['tokens']:,} tokens are in place again; the others are kept"
    console.print(f"[bold]rollback[/bold]: {said}", highlight=False, soft_wrap=True)
    _tell_server(recipe)


def _tell_server(recipe: Recipe) -> None:
    """Gives the recipe's running server the gates that are in place, and says so."""
    from serving.swap import tell_server

    line = tell_server(recipe)
    if line:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def gates_step(recipe: Recipe, train: "Callable[[Recipe, Path], GateReport]", feedback: Path | None = None) -> Step:
    """What puts gates in place and reports on them, under the hash of all that decides them.

    `feedback` is a file of more of it than the gates in place have learnt from.
    """
    from gate_training.feedback import feedback_file

    folder, learnt = fused_folder(recipe), feedback or feedback_file(recipe)

    def action() -> str:
        from fusion.healed import restore
        from gate_training.report import write_report

        restore(folder, unhealed_folder(recipe))
        result = train(recipe, folder)
        if feedback:
            feedback.replace(feedback_file(recipe))
            feedback.parent.rmdir()
        write_report(result, recipe.folder)
        last = result.layers[-1]
        return (
            f"{result.tokens:,} tokens; last gate right on {last.accuracy:.1%} of held-out tokens, "
            f"{last.answer_accuracy:.1%} of answer tokens"
        )

    weights = [path for path in _merged_shards(recipe) if path.name != GATES_FILE]
    data = [*_domain_files(recipe), *([learnt] if learnt.is_file() else [])]
    parts = [recipe.gate_training, recipe.domains, [expert.domain for expert in recipe.experts]]
    outputs = [folder / GATES_FILE, *(recipe.folder / f"gates.{kind}" for kind in ("json", "md", "png"))]
    return Step("train-gates", parts, [*weights, *data], outputs, action)


def heal(recipe: Recipe, force: bool = False) -> None:
    """Trains attention, norms and gates of the fused model end to end. Raises UserError where no section says how."""
    from fusion.heal import heal as heal_model
    from fusion.heal import markdown
    from fusion.healed import is_healed, restore
    from fusion.merge import write_papers

    if recipe.heal is None:
        raise UserError("the recipe has no 'heal' section: add one (`heal: {}` takes what is usual)")
    folder, path = gated_folder(recipe), recipe.folder / "healing.json"

    def action() -> str:
        restore(folder, unhealed_folder(recipe))
        result = heal_model(recipe, folder, unhealed_folder(recipe))
        write_text(recipe.folder / "healing.md", markdown(result.as_dict()))
        write_json(path, result.as_dict())
        before, after = (result.retained_share(row) for row in ("merged", "healed"))
        share = "no gain to retain" if before is None else f"{before:.2f} -> {after:.2f} of the experts' gain kept"
        return f"{share}, {result.tokens:,} tokens in {result.seconds:.0f} s"

    parts = [recipe.heal, recipe.domains, [expert.domain for expert in recipe.experts]]
    inputs = [*_merged_shards(recipe), *_model_files(recipe), *_domain_files(recipe)]
    outputs = [path, recipe.folder / "healing.md"]
    run_step(Step("heal", parts, inputs, outputs, action), recipe.folder, force or not is_healed(folder))
    write_papers(recipe, folder)


def unhealed_folder(recipe: Recipe) -> Path:
    """Where healing keeps the files that it replaces, as merge and train-gates left them."""
    return recipe.folder / "unhealed"


def _model_files(recipe: Recipe) -> list[Path]:
    """The anchor, the models that the experts are measured against, and those that they come from where they differ."""
    sources = [anchor_source(recipe)]
    for expert in recipe.experts:
        sources += dict.fromkeys((own_source(recipe, expert), original_source(recipe, expert)))
    return [path for source in sources for path in source.paths]


def _merged_shards(recipe: Recipe) -> list[Path]:
    """The fused model's weights as merge and train-gates left them, wherever they lie."""
    from fusion.healed import is_healed

    folder, kept = fused_folder(recipe), unhealed_folder(recipe)
    shards = sorted(folder.glob("[a-z]*.safetensors"))
    if not is_healed(folder):
        return shards
    return [kept / path.name if (kept / path.name).is_file() else path for path in shards]


def evaluate(recipe: Recipe, force: bool = False) -> dict[str, Any]:
    """Measures the fused model beside its experts; returns the figures."""
    from fusion.evaluation.evaluate import result_path

    gated_folder(recipe)
    run_step(evaluate_step(recipe), recipe.folder, force)
    result: dict[str, Any] = read_json(result_path(recipe))
    return result


def evaluate_step(recipe: Recipe) -> Step:
    """The evaluation, under the hash of all that decides its figures."""
    from fusion.evaluation.evaluate import evaluate as measure
    from fusion.evaluation.evaluate import result_path
    from fusion.evaluation.table import draw_routing, markdown

    path = result_path(recipe)

    def action() -> None:
        result = measure(recipe)
        draw_routing(result, recipe.folder / "routing.png")
        write_text(recipe.folder / "evaluation.md", markdown(result))
        write_json(path, result | {"made": made()})

    data = source_files(*recipe.evaluation.extra.values(), *(domain.held_out for domain in recipe.domains.values()))
    parts = [recipe.evaluation, recipe.domains, recipe.gate_training]
    inputs = [*_checkpoint_files(fused_folder(recipe)), *_model_files(recipe), *data]
    outputs = [path, *(recipe.folder / name for name in ("evaluation.md", "routing.png"))]
    return Step("evaluate", parts, inputs, outputs, action)


def evaluate_long(recipe: Recipe, force: bool = False) -> dict[str, Any]:
    """Measures anchor and fused model late in a long context; returns the figures."""
    from fusion.evaluation.long_context import evaluate_long as measure
    from fusion.evaluation.long_context import markdown

    gated_folder(recipe)
    path = recipe.folder / "long.json"

    def action() -> None:
        result = measure(recipe, recipe.evaluation.long_rows)
        write_text(recipe.folder / "long.md", markdown(result))
        write_json(path, result | {"made": made()})

    data = source_files(*(source for d in recipe.domains.values() for source in (d.train, d.held_out)))
    parts = [recipe.evaluation, recipe.domains, recipe.serving.max_model_len, recipe.serving.yarn_factor]
    inputs = [*_checkpoint_files(fused_folder(recipe)), *_model_files(recipe), *data]
    run_step(Step("evaluate-long", parts, inputs, [path, recipe.folder / "long.md"], action), recipe.folder, force)
    result: dict[str, Any] = read_json(path)
    return result


def ask_samples(recipe: Recipe, force: bool = False) -> list[dict[str, Any]]:
    """Asks the recipe's sample questions of a server that is started for them and stopped again."""
    from serving.ask import ask_all, ready_folder

    path = recipe.folder / "answers.json"

    def action() -> None:
        write_json(path, ask_all(recipe, recipe.serving.questions, reuse=False))

    asked = recipe.serving.model_dump(mode="json", exclude={"host", "port"})
    fused_folder(recipe)  # put back first where a kill has left it aside
    step = Step("ask", [asked, recipe.name], _checkpoint_files(ready_folder(recipe)), [path], action)
    run_step(step, recipe.folder, force)
    answers: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return answers


def report(recipe: Recipe) -> Path:
    """Writes report.md from what the steps left, and prints table and answers."""
    from fusion.report import write_report

    return write_report(recipe)


def _merged_files(folder: Path) -> list[Path]:
    """What a complete merge has left in `folder`."""
    index = folder / INDEX
    shards = set(read_json(index)["weight_map"].values()) if index.is_file() else set()
    return [folder / "config.json", index, *(folder / shard for shard in sorted(shards))]


def fused_folder(recipe: Recipe) -> Path:
    """The folder of the fused checkpoint. Raises UserError where there is none yet."""
    folder = recipe.fused
    put_back(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} does not exist yet: run `qwen-fusion merge` on the recipe first")
    return folder


def gated_folder(recipe: Recipe) -> Path:
    """The folder of the fused checkpoint, its gates trained. Raises UserError where there is none yet."""
    from fusion.merge import gates_are_trained

    folder = fused_folder(recipe)
    if not gates_are_trained(folder):
        raise UserError(f"the gates in {folder} are random ones: run `qwen-fusion train-gates` on the recipe first")
    return folder


def _checkpoint_files(folder: Path) -> list[Path]:
    """The files that decide what the fused model answers."""
    from fusion.merge import PAPERS

    return [path for path in sorted(folder.iterdir()) if path.name not in PAPERS]


def _domain_files(recipe: Recipe) -> list[Path]:
    """What the training and held-out rows of all domains are read from."""
    return source_files(*(source for domain in recipe.domains.values() for source in (domain.train, domain.held_out)))
