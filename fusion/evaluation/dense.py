"""One dense model in the place of a family: mergekit's average, TIES and DARE of it, or one trained on all its data.

run_step(dense_step(recipe, "TIES"), recipe.folder)   # OUTPUT/alternatives/TIES
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fusion.checkpoint import read_json, staged_folder
from fusion.data import choosing_rows
from fusion.plan.budget import planned_dtype
from fusion.recipe import Recipe
from fusion.road_experts import learnt_rows, trained_layers
from fusion.sections.training import BranchSettings
from fusion.sources import anchor_source, original_source, whole_model
from fusion.steps import Step

DENSE: dict[str, tuple[str, dict[str, float]]] = {  # mergekit's method and its parameters of every model
    "average": ("linear", {"weight": 1.0}),
    "TIES": ("ties", {"weight": 1.0, "density": 0.5}),
    "DARE": ("dare_ties", {"weight": 1.0, "density": 0.5}),
}
UNION = "union"
SUMMED_IN = "float32"  # and rounded once, to what the anchor is stored in


def folder_of(recipe: Recipe, name: str) -> Path:
    """Where an alternative model is kept."""
    return recipe.folder / "alternatives" / name


def dense_step(recipe: Recipe, name: str) -> Step:
    """One dense model of the experts, merged by mergekit on the anchor."""
    method, parameters = DENSE[name]
    anchor, out = anchor_source(recipe), folder_of(recipe, name)
    sources = [original_source(recipe, expert) for expert in recipe.experts]

    def action() -> str:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        with staged_folder(out) as aside, ExitStack() as stack:
            folders = [str(stack.enter_context(whole_model(source))) for source in sources]
            if method != "linear":  # what has not moved from the base adds nothing to a sum of task vectors
                folders = [path for path in folders if path != str(anchor.folder)]
            config: dict[str, Any] = {
                "merge_method": method,
                "models": [{"model": path, "parameters": parameters} for path in folders],
                "parameters": {"normalize": True},
                "dtype": SUMMED_IN,
                "out_dtype": planned_dtype(read_json(anchor.folder / "config.json")),
            }
            if method != "linear":
                config["base_model"] = str(anchor.folder)
            options = MergeOptions(copy_tokenizer=True, random_seed=0, quiet=True, write_model_card=False)
            run_merge(MergeConfiguration.model_validate(config), str(aside), options)
        return f"{name}: mergekit {method} of {len(folders)} models"

    inputs = [path for source in (anchor, *sources) for path in source.paths]
    return Step(f"alternative {name}", [method, parameters, SUMMED_IN], inputs, [out], action)


def union_step(recipe: Recipe) -> Step:
    """One dense model trained on what all branched experts have learnt from, for the steps of all of them.

    All else is as the first of them was trained.
    """
    anchor, out = anchor_source(recipe), folder_of(recipe, UNION)
    branched = [(expert, expert.branch) for expert in recipe.experts if expert.branch]
    steps = sum(settings.steps for _, settings in branched)
    settings: BranchSettings = branched[0][1].model_copy(
        update={"steps": steps, "evaluate_every": max(1, steps // 8), "allow_no_gain": True, "answers": "reference"}
    )

    rows = [row for expert, own in branched for row in learnt_rows(recipe, expert, own)]
    held_out = [
        row for expert, own in branched for row in choosing_rows(recipe, expert.domain, own.held_out_rows, own.seed + 1)
    ]

    def action() -> str:
        from fusion.branch import train_expert

        result = train_expert(anchor.folder, out, rows, held_out, settings, trained_layers(recipe))
        return f"{UNION}: loss {result.loss_before:.3f} -> {result.loss_after:.3f}, {result.tokens:,} tokens"

    data = [settings, [[row.messages for row in found] for found in (rows, held_out)]]
    return Step(f"alternative {UNION}", data, [anchor.folder], [out], action)
