"""Growing: an expert joins a fused checkpoint or leaves it, and whatever does not change stays the same file.

    qwen-fusion add-expert RECIPE NAME       (NAME is in the recipe and not yet in the checkpoint)
    qwen-fusion remove-expert RECIPE NAME    (NAME is in the checkpoint, and perhaps in the recipe)

The shared parts and the experts whose number stays are hard links to the old shards. The number of an expert is in its
tensors' names, so those behind the one that joins or leaves are written again: put what may leave last. Gate rows of
the others stay as they are, bit for bit; the new one is fitted against them (gate_training/methods/new_row.py).
"""

import shutil

import torch
from pydantic import ValidationError

from fusion import road
from fusion.architecture import MANIFEST
from fusion.checkpoint import Checkpoint, read_json
from fusion.errors import UserError
from fusion.healed import is_healed, restore
from fusion.layers import Gates, checkpoint_gates
from fusion.merge import Reuse, gates_are_trained, source_stamp, write_papers
from fusion.plan.findings import raise_on_error
from fusion.plan.preflight import check
from fusion.progress import console
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.sections.fusing import Expert
from fusion.sources import base_source, expert_source
from fusion.steps import run_step
from gate_training.methods.new_row import with_row

FIGURES = (
    "evaluation.json",
    "evaluation.md",
    "routing.png",
    "long.json",
    "long.md",
    "report.md",
    "answers.json",
    "traffic",
)
JOINING = "joining"  # in the manifest's note on gates: the expert whose row is still to be fitted


def add_expert(recipe: Recipe, name: str) -> None:
    """Puts an expert of the recipe into its fused checkpoint and fits its gate row.

    Interrupted, it goes on. Raises UserError where the checkpoint is not the recipe's but for that expert.
    """
    wanted = [expert.name for expert in recipe.experts]
    if name not in wanted:
        raise UserError(f"the recipe has no expert '{name}', it has {', '.join(wanted)}: add it there first")
    index, folder = wanted.index(name), road.fused_folder(recipe)
    if name not in _names(recipe):
        _refuse_other_changes(recipe, name)
        raise_on_error(recipe, check(recipe, trained=True))
        _take_healing_back(recipe)
        trained = gates_are_trained(folder)
        gates = {layer: _joined(rows, index, trained) for layer, rows in _gates(recipe).items()}
        note = {"method": "random", **({JOINING: name} if trained else {})}
        run_step(road.merge_step(recipe, Reuse(folder, gates, note)), recipe.folder, force=True)
        write_papers(recipe, folder)
    elif read_json(folder / MANIFEST)["gates"].get(JOINING) != name:
        raise UserError(f"{folder} has expert '{name}' already: `qwen-fusion merge` on the recipe makes it anew")
    if JOINING in read_json(folder / MANIFEST)["gates"]:
        from gate_training.trainer import Joining, train_gates

        joining = Joining(index, {layer: _left(rows, index) for layer, rows in _gates(recipe).items()})
        run_step(road.gates_step(recipe, lambda r, f: train_gates(r, f, joining)), recipe.folder, force=True)
        write_papers(recipe, folder)
    _take_figures_away(recipe)


def remove_expert(recipe: Recipe, name: str) -> None:
    """Takes an expert and its gate row out of the recipe's fused checkpoint.

    Raises UserError where the recipe without it contradicts itself, or the checkpoint is not the recipe's otherwise.
    """
    folder, have = road.fused_folder(recipe), _names(recipe)
    if name not in have:
        raise UserError(f"{folder} has no expert '{name}', it has {', '.join(have)}: name one of those")
    smaller = _without(recipe, name)
    _refuse_other_changes(smaller, name)
    _take_healing_back(recipe)
    index, trained = have.index(name), gates_are_trained(folder)
    gates = {layer: _left(rows, index) for layer, rows in _gates(recipe).items()}
    note = {key: value for key, value in read_json(folder / MANIFEST)["gates"].items() if key != "sha256"}
    run_step(road.merge_step(smaller, Reuse(folder, gates, note)), recipe.folder, force=True)
    write_papers(smaller, folder)
    if trained:
        from gate_training.trainer import measured

        run_step(road.gates_step(smaller, measured), recipe.folder, force=True)
        said = f"tokens of '{name}' go where the rows that stay send them: `train-gates` fits these to the fallback"
        console.print(said, highlight=False, soft_wrap=True)
    _take_figures_away(recipe)


def _take_figures_away(recipe: Recipe) -> None:
    """Removes what was measured on the experts of before."""
    stale = [path for name in FIGURES if (path := recipe.folder / name).exists()]
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if stale:
        said = f"{', '.join(path.name for path in stale)} told of the experts before: run `qwen-fusion evaluate` again"
        console.print(said, highlight=False, soft_wrap=True)


def _take_healing_back(recipe: Recipe) -> None:
    """Puts the plain merge back where it was healed. Raises UserError where its files are gone."""
    folder, kept = road.fused_folder(recipe), road.unhealed_folder(recipe)
    if is_healed(folder):
        if not kept.is_dir():
            raise UserError(f"{folder} is healed, and {kept} with what that replaced is gone: merge it again")
        restore(folder, kept)
        said = "healing is taken back, as it was of other experts: run `qwen-fusion heal` on the recipe afterwards"
        console.print(said, highlight=False, soft_wrap=True)


def _names(recipe: Recipe) -> list[str]:
    """The experts of the fused checkpoint, by number."""
    return [row["name"] for row in read_json(road.fused_folder(recipe) / MANIFEST)["experts"]]


def _gates(recipe: Recipe) -> Gates:
    return checkpoint_gates(Checkpoint(road.fused_folder(recipe)))


def _left(rows: torch.Tensor, index: int) -> torch.Tensor:
    """A gate `(experts, hidden)` without row `index`."""
    return torch.cat([rows[:index], rows[index + 1 :]])


def _joined(rows: torch.Tensor, index: int, trained: bool) -> torch.Tensor:
    """`rows` `(experts - 1, hidden)` with one more: zeros that are to be fitted, or random like the others."""
    row = torch.zeros_like(rows[0]) if trained else torch.randn(rows.shape[1]).to(rows) * rows.std()
    return with_row(rows, row, index)


def _without(recipe: Recipe, name: str) -> Recipe:
    """The recipe without an expert. Raises UserError where it then contradicts itself."""
    data = recipe.model_dump(mode="json")
    data["experts"] = [expert for expert in data["experts"] if expert["name"] != name]
    if len(data["experts"]) < 2:
        raise UserError(f"without expert '{name}' only one is left, which needs no fusing: serve it as it is")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        fix = "mend the recipe, or take the expert out of it, before it leaves the checkpoint"
        raise UserError(f"without expert '{name}' the recipe does not hold together ({said}): {fix}") from None


def _refuse_other_changes(recipe: Recipe, name: str) -> None:
    """Raises UserError unless the checkpoint is as the recipe says, but for expert `name` on one of the two sides."""
    folder, again = road.fused_folder(recipe), "run `qwen-fusion merge` on the recipe"
    if "quantized" in read_json(folder / MANIFEST):
        raise UserError(f"{folder} is quantised: grow the checkpoint that it was made from, and quantise that")
    if not recipe.shared.is_anchor:
        why = f"the shared parts are made of all experts (shared: {recipe.shared.method}), so they would be others"
        raise UserError(f"{recipe.at('shared')}{why}: {again}")
    have, wanted = ([n for n in names if n != name] for names in (_names(recipe), [e.name for e in recipe.experts]))
    if have != wanted:
        said = f"{folder} has, beside '{name}', the experts {', '.join(have)}, the recipe {', '.join(wanted)}"
        raise UserError(f"{said}: change one at a time, or {again}")
    old = load_recipe(folder / "recipe.yaml")
    if recipe.anchor != old.anchor:
        raise UserError(f"{recipe.at('anchor')}the anchor is another than that of {folder}: {again}")
    left = [expert for expert in old.experts if expert.name != name]
    sources = {"shared": base_source(old), **{expert.name: expert_source(old, expert) for expert in left}}
    noted = read_json(folder / MANIFEST).get("sources", {})
    moved = [n for n, source in sources.items() if noted.get(n) != source_stamp(source)]
    if moved:
        raise UserError(f"the model of '{moved[0]}' in {folder} has changed since it was merged: {again}")
    before = {expert.name: _of_merge(expert) for expert in old.experts}
    changed = [e.name for e in recipe.experts if e.name != name and before[e.name] != _of_merge(e)]
    if changed:
        raise UserError(f"the recipe says of expert '{changed[0]}' something else than {folder} was merged by: {again}")
    for key in ("moe_layers", "shared_expert"):
        ours, theirs = getattr(recipe.routing, key), getattr(old.routing, key)
        if ours != theirs:
            where = recipe.at("routing", key)
            raise UserError(f"{where}routing.{key} is {ours}, {folder} was merged with {theirs}: {again}")


def _of_merge(expert: Expert) -> dict[str, object]:
    """What of an expert's section decides its shards; how it is trained shows in its weights."""
    return expert.model_dump(mode="json", exclude={"branch", "anchor"})
