"""The gates that train-gates replaces: kept beside the fused model, one set of them, and put back.

    qwen-fusion rollback RECIPE    (a second time: forth again)

A set is a gate shard with the manifest and the reports that were beside it, in a folder named by the shard's hash.
Both sets are there once gates have been put back, so that an interrupted exchange loses neither.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from fusion.architecture import GATES_FILE, MANIFEST
from fusion.checkpoint import Checkpoint, file_hash, link_file, read_json, staged_folder, write_json
from fusion.errors import UserError
from fusion.healed import is_healed
from fusion.layers import Gates, checkpoint_gates
from fusion.merge import gates_are_trained, other_experts
from fusion.recipe import Recipe

# in the recipe's folder, and the feedback that they learnt from
REPORTS = ("gates.json", "gates.md", "gates.png", "labels.jsonl", "feedback.jsonl")
ROLLED_BACK = "rolled_back"  # in the manifest's note on gates: they were put back in the place of newer ones


def kept_folder(recipe: Recipe) -> Path:
    """Where the sets lie."""
    return recipe.folder / "kept-gates"


def is_rolled_back(folder: Path) -> bool:
    """Whether the checkpoint's gates were put back in the place of newer ones, by its manifest."""
    return ROLLED_BACK in read_json(folder / MANIFEST)["gates"]


def keep_gates(recipe: Recipe, folder: Path, new: Gates) -> None:
    """Keeps the trained gates of the checkpoint in `folder`, and no others, before `new` ones replace them."""
    if not gates_are_trained(folder):
        return
    old = checkpoint_gates(Checkpoint(folder))
    if all(torch.equal(old[layer], gate) for layer, gate in new.items()):
        return
    here = _keep(recipe, folder)
    for other in set(here.parent.iterdir()) - {here}:  # what was being written and was not is among them
        shutil.rmtree(other)


def put_back_gates(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Exchanges the checkpoint's gates and those before them; returns the manifest's note on those now in place.

    Raises UserError where there are none, or where experts or shared parts are no longer those they were trained with.
    """
    manifest = read_json(folder / MANIFEST)
    _refuse_others(recipe, folder)
    others = set(kept_folder(recipe).glob("[!.]*")) - {_place(recipe, folder)}
    if not others:
        names = ", ".join(row["name"] for row in manifest["experts"])
        said = f"{folder} has no gates to go back to: those in place are the first that were trained since {names} were"
        raise UserError(f"{said} merged, and `train-gates` keeps what it replaces from now on")
    (before,) = others
    kept = read_json(before / MANIFEST)
    if kept["sha256"] != manifest["sha256"]:
        raise UserError(
            f"the gates in {before} are of other weights than {folder} has: `qwen-fusion train-gates` fits new"
        )
    note = {key: value for key, value in kept["gates"].items() if key != ROLLED_BACK}
    if ROLLED_BACK not in manifest["gates"]:
        note[ROLLED_BACK] = True
    _keep(recipe, folder)
    with staged_folder(folder) as aside:
        for path in folder.iterdir():
            link_file(path, aside / path.name)
        link_file(before / GATES_FILE, aside / GATES_FILE)
        write_json(aside / MANIFEST, {**manifest, "gates": note})
    for name in REPORTS:
        (recipe.folder / name).unlink(missing_ok=True)
        if (before / name).is_file():
            link_file(before / name, recipe.folder / name)
    return note


def _place(recipe: Recipe, folder: Path) -> Path:
    """Where the set that is in place is kept, or would be."""
    return kept_folder(recipe) / file_hash(folder / GATES_FILE)[:16]


def _keep(recipe: Recipe, folder: Path) -> Path:
    """Keeps the set that is in place; returns where."""
    here = _place(recipe, folder)
    if not here.is_dir():
        with staged_folder(here) as aside:
            for path in (folder / GATES_FILE, folder / MANIFEST, *(recipe.folder / name for name in REPORTS)):
                if path.is_file():
                    link_file(path, aside / path.name)
    return here


def _refuse_others(recipe: Recipe, folder: Path) -> None:
    if said := other_experts(recipe, folder):
        raise UserError(f"{said}: gates of other experts are of no use, run `qwen-fusion merge` on the recipe")
    if is_healed(folder):
        said = f"{folder} was healed since, its gates together with its attention"
        raise UserError(f"{said}: `qwen-fusion train-gates` on the recipe trains gates of the merge as it was before")
