"""The first steps of a recipe's road, which make experts: branches of the anchor, and drifted ones led back to it.

    qwen-fusion branch configs/demo.yaml
    qwen-fusion anchor RECIPE

Each asks the teacher first, where an expert learns a teacher's answers, whatever it has not been asked yet.
"""

from functools import partial
from pathlib import Path
from typing import Any

from fusion.architecture import sparse_layers
from fusion.checkpoint import read_json
from fusion.data import ChatExample, choosing_rows, general_rows, load_examples, source_files, trained_on
from fusion.drift import sentence
from fusion.errors import UserError
from fusion.hub import resolve_model
from fusion.progress import console
from fusion.recipe import Recipe
from fusion.sampled import Sampler
from fusion.sections.data import DataSource, general_domain
from fusion.sections.fusing import Expert
from fusion.sections.training import AnchoringSettings, BranchSettings, TrainingSettings
from fusion.sources import (
    ModelSource,
    anchor_source,
    anchored_expert,
    original_source,
    trained_anchor,
    trained_expert,
)
from fusion.steps import Step, lock, run_step, run_steps


def branch(recipe: Recipe, only: str | None = None, force: bool = False) -> None:
    """Trains the anchor and the experts that the recipe says are to be made. Raises UserError where it names none."""
    experts = [expert for expert in recipe.experts if expert.branch and only in (None, expert.name)]
    if only is not None and not experts:
        raise UserError(f"the recipe has no expert '{only}' with a 'branch' section")
    if not experts and not recipe.anchor.pretrain:
        console.print("[dim]branch: the recipe names no expert to be trained[/dim]", highlight=False)
    if recipe.anchor.pretrain:
        _pretrain(recipe)
    for expert in experts:
        _sample(recipe, expert, expert.branch)
    if recipe.branches_at_once > 1:  # the longest first, so that none is left alone at the end
        experts.sort(key=lambda expert: -expert.branch.steps if expert.branch else 0)
    run_steps([_branch_step(recipe, expert) for expert in experts], recipe.folder, force, recipe.branches_at_once)


def _pretrain(recipe: Recipe) -> None:
    settings = recipe.anchor.pretrain
    assert settings is not None
    out = trained_anchor(recipe)

    def action() -> str:
        from fusion.demo_family import pretrain_anchor

        done = pretrain_anchor(out, settings)
        return f"anchor: {done['parameters']:,} parameters, {done['tokens']:,} tokens, loss {done['loss']:.3f}"

    code = Path(__file__).with_name("demo_family.py")
    step = Step("anchor", settings, [code, *source_files(settings.data)], [out / "config.json"], action)
    with lock(recipe.folder, "anchor"):  # commands at work on several experts make it once
        run_step(step, recipe.folder)


def _branch_step(recipe: Recipe, expert: Expert) -> Step:
    settings = expert.branch
    assert settings is not None
    source = _held_out(recipe, expert, settings)
    general = recipe.domains[general_domain(recipe.domains)].train if settings.general_share else None
    inputs = [anchor_source(recipe).folder, *source_files(settings.data, source, general)]
    inputs += _sampled_files(recipe, expert, settings)
    parts = [settings, source, general, recipe.routing.moe_layers]
    outputs = [trained_expert(recipe, expert)]
    return Step(f"branch {expert.name}", parts, inputs, outputs, partial(_branch_expert, recipe, expert))


def _held_out(recipe: Recipe, expert: Expert, settings: TrainingSettings) -> DataSource:
    """Where the rows that judge an expert's training come from."""
    return settings.held_out or recipe.domains[expert.domain].held_out


def _branch_expert(recipe: Recipe, expert: Expert) -> str:
    from fusion.branch import train_expert

    settings, anchor, out = expert.branch, anchor_source(recipe), trained_expert(recipe, expert)
    assert settings is not None
    rows, held_out = _rows(recipe, expert, settings)
    rows, notes = _learnt(recipe, expert, settings, rows)
    watched: list[ChatExample] = []
    if settings.answers == "sampled":  # references are in another style: their loss rises while answers get better
        rows, watched = _held_back(rows, settings.held_out_rows)
    layers, mixed = trained_layers(recipe), general_rows(recipe, settings)
    result = train_expert(anchor.folder, out, rows, held_out, settings, layers, mixed, notes=notes, watched=watched)
    low, high = result.score_gain_interval
    return (
        f"{expert.name}: {result.score_name} {result.score_before:.3f} -> {result.score_after:.3f} "
        f"(95% of the difference {low:+.3f} to {high:+.3f}), "
        f"loss {result.loss_before:.3f} -> {result.loss_after:.3f}, {result.tokens:,} tokens in "
        f"{result.seconds:.0f} s; moved: {sentence(result.moved)}"
    )


def learnt_rows(recipe: Recipe, expert: Expert, settings: BranchSettings) -> list[ChatExample]:
    """What a branched expert has learnt from: its data's rows, with the answers that its teacher was asked for."""
    rows, _ = _rows(recipe, expert, settings)
    return _learnt(recipe, expert, settings, rows)[0]


def _held_back(rows: list[ChatExample], count: int) -> tuple[list[ChatExample], list[ChatExample]]:
    """Rows to train on, and those of the last `count` questions, of a fifth at most."""
    questions = list(dict.fromkeys(row.question for row in rows))
    last = set(questions[len(questions) - min(count, len(questions) // 5) :])
    return [row for row in rows if row.question not in last], [row for row in rows if row.question in last]


def _rows(recipe: Recipe, expert: Expert, settings: TrainingSettings) -> tuple[list[ChatExample], list[ChatExample]]:
    """An expert's training rows and its held-out ones. Raises UserError where a prompt is in both."""
    rows = load_examples(settings.data, expert.domain, settings.rows, settings.seed)
    count = max(settings.held_out_rows, settings.score_rows)
    source = _held_out(recipe, expert, settings)
    held_out = choosing_rows(recipe, expert.domain, count, settings.seed + 1, source)
    for row in filter(trained_on(rows), held_out):
        raise UserError(
            f"expert '{expert.name}': the held-out prompt {row.question[:60]!r} is also in its training data: "
            "use another split or file"
        )
    return rows, held_out


def trained_layers(recipe: Recipe) -> list[int] | None:
    """The layers whose MLPs an expert may change: the sparse ones; None for all."""
    if recipe.routing.moe_layers is None:
        return None
    count = read_json(anchor_source(recipe).folder / "config.json")["num_hidden_layers"]
    return sparse_layers(count, recipe.routing.moe_layers)


def anchor(recipe: Recipe, only: str | None = None, force: bool = False) -> None:
    """Leads the recipe's drifted experts back to the anchor. Raises UserError where it names none."""
    experts = [expert for expert in recipe.experts if expert.anchor and only in (None, expert.name)]
    if not experts:
        raise UserError(f"the recipe has no expert{f' {only!r}' if only else ''} with an 'anchor' section")
    for expert in experts:
        _sample(recipe, expert, expert.anchor)
    steps = [_anchor_step(recipe, expert) for expert in experts]
    run_steps(steps, recipe.folder, force, recipe.branches_at_once)


def _anchor_step(recipe: Recipe, expert: Expert) -> Step:
    settings = expert.anchor
    assert settings is not None
    source = _held_out(recipe, expert, settings)
    models = [anchor_source(recipe), original_source(recipe, expert), _teacher(recipe, expert, settings)]
    inputs = [*(path for model in models for path in model.paths), *source_files(settings.data, source)]
    inputs += _sampled_files(recipe, expert, settings)
    parts = [settings, source, recipe.routing.moe_layers]
    out = anchored_expert(recipe, expert)
    return Step(f"anchor {expert.name}", parts, inputs, [out], partial(_anchor_expert, recipe, expert))


def _teacher(recipe: Recipe, expert: Expert, settings: BranchSettings | AnchoringSettings) -> ModelSource:
    """Whom an expert learns from: the model that the recipe names, or the anchor (branch), the drifted one (anchor)."""
    if settings.teacher is not None:
        return ModelSource(settings.teacher, resolve_model(settings.teacher))
    return anchor_source(recipe) if isinstance(settings, BranchSettings) else original_source(recipe, expert)


def _sampler(recipe: Recipe, expert: Expert, settings: BranchSettings | AnchoringSettings) -> Sampler | None:
    """How the answers that an expert learns are sampled; None where it learns the data's own."""
    anchoring = isinstance(settings, AnchoringSettings)
    if not (settings.method == "text" if isinstance(settings, AnchoringSettings) else settings.answers == "sampled"):
        return None
    store = recipe.folder / "samples" / f"{expert.name}.jsonl"
    return Sampler(_teacher(recipe, expert, settings), settings.sampling, store, imitate=anchoring)


def _sample(recipe: Recipe, expert: Expert, settings: BranchSettings | AnchoringSettings | None) -> None:
    """Asks the teacher, where there is one, whatever has not been asked yet, and prints the yield."""
    sampler = _sampler(recipe, expert, settings) if settings else None
    if sampler is None or settings is None:
        return
    rows, _ = _rows(recipe, expert, settings)
    if not sampler.missing(rows):
        console.print(f"[dim]sample {expert.name}: every question has its answers, skipped[/dim]", highlight=False)
        _print_yield(sampler, rows)
        return
    console.print(f"[bold]sample {expert.name}[/bold]", highlight=False)
    sampler.ask(rows, recipe.serving, recipe.folder / "logs" / f"teacher-{expert.name}.log")
    _print_yield(sampler, rows)


def _print_yield(sampler: Sampler, rows: list[ChatExample]) -> None:
    _, brought = sampler.learnt(rows)
    console.print(f"  {brought.sentence()}", highlight=False, soft_wrap=True)


def _sampled_files(recipe: Recipe, expert: Expert, settings: BranchSettings | AnchoringSettings) -> list[Path]:
    """The teacher and its answers, where an expert learns such."""
    sampler = _sampler(recipe, expert, settings)
    return [*sampler.teacher.paths, sampler.store] if sampler else []


def _learnt(
    recipe: Recipe, expert: Expert, settings: BranchSettings | AnchoringSettings, rows: list[ChatExample]
) -> tuple[list[ChatExample], dict[str, Any]]:
    """The rows to train on, with the teacher's answers where the expert learns these, and what to note of them."""
    sampler = _sampler(recipe, expert, settings)
    if sampler is None:
        return rows, {}
    learnt, brought = sampler.learnt(rows)
    return learnt, {"sampling": brought.as_dict()}


def _anchor_expert(recipe: Recipe, expert: Expert) -> str:
    from fusion.anchor import anchor_expert

    settings = expert.anchor
    assert settings is not None
    rows, held_out = _rows(recipe, expert, settings)
    rows, notes = _learnt(recipe, expert, settings, rows)
    result = anchor_expert(
        anchor_source(recipe),
        original_source(recipe, expert),
        _teacher(recipe, expert, settings) if settings.method == "logits" else None,
        anchored_expert(recipe, expert),
        rows,
        held_out,
        settings,
        trained_layers(recipe),
        notes,
        recipe.loading,
    )
    share = "no gain to retain" if result.retained_share is None else f"{result.retained_share:.2f} of the gain kept"

    def row(figures: dict[str, float]) -> str:
        return ", ".join(f"{name} {figure:.3f}" for name, figure in figures.items())

    moved = "; ".join(f"{name} moved: {sentence(found)}" for name, found in result.moved.items())
    return f"{expert.name}: {result.score_name} {row(result.scores)}; loss {row(result.losses)} ({share}); {moved}"
