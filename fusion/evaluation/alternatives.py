"""What a family of experts can become, every way by answer loss: one dense model, whole experts, adapters, fused.

    python -m fusion.evaluation.alternatives configs/qwen2.5-0.5b-five-experts.yaml --set data_folder=../data

Makes the dense models (dense.py) and the gates of every method, then measures all ways (ways.py). Everything is kept
under OUTPUT/alternatives, way by way, and made again only where what it comes from has changed.
"""

import argparse
import hashlib
from functools import partial
from pathlib import Path

from fusion.checkpoint import read_json, write_json, write_text
from fusion.errors import run_main
from fusion.evaluation.dense import DENSE, dense_step, folder_of, union_step
from fusion.evaluation.ways import Losses, Way, gates_step, held_out, ways
from fusion.healed import as_merged
from fusion.progress import console
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.road import fused_folder, unhealed_folder
from fusion.steps import Step, run_step
from gate_training.trainer import METHODS


def compare(recipe: Recipe) -> dict[str, Losses]:
    """Every way's losses, what is there already taken as it is. Raises UserError where nothing has been merged yet."""
    with as_merged(fused_folder(recipe), unhealed_folder(recipe)) as folder:
        steps = [dense_step(recipe, name) for name in DENSE]
        if any(expert.branch for expert in recipe.experts):
            steps.append(union_step(recipe))
        for step in [*steps, *(gates_step(recipe, method, folder) for method in METHODS)]:
            run_step(step, recipe.folder)
        rows = held_out(recipe)
        digest = hashlib.sha256(repr([(row.messages, row.domain) for row in rows.rows]).encode()).hexdigest()
        found = {}
        for way in ways(recipe, rows, folder):
            file = folder_of(recipe, "losses") / f"{way.name.replace(', ', '-').replace(' ', '_')}.json"
            measure = partial(_keep, file, way)
            run_step(Step(way.name, [digest, rows.picked], way.inputs, [file], measure), recipe.folder)
            found[way.name] = read_json(file)
    return found


def _keep(file: Path, way: Way) -> str:
    losses = way.measure()
    write_json(file, losses)
    return ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())


def markdown(found: dict[str, Losses]) -> str:
    """A line a way: its losses by domain, their mean, the share of the experts' gain that it keeps."""
    anchor, own = found["anchor"], found["own expert"]
    gains = {name: anchor[name] - own[name] for name in anchor if anchor[name] - own[name] > 0.01}
    lines = ["| way | " + " | ".join(anchor) + " | mean | of the experts' gain kept: mean, worst |"]
    lines.append("| --- " * (len(anchor) + 3) + "|")
    for way, by_domain in found.items():
        kept = [(anchor[name] - by_domain[name]) / gain for name, gain in gains.items()]
        share = f"{sum(kept) / len(kept):.3f}, {min(kept):.3f}" if kept else "no gain"
        cells = [f"{loss:.3f}" for loss in by_domain.values()]
        mean = sum(by_domain.values()) / len(by_domain)
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {mean:.3f} | {share} |")
    return "\n".join([*lines, ""])


def main(*given: str) -> None:
    """Makes the alternatives, measures all ways, prints the table and leaves it in OUTPUT/alternatives."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion.evaluation.alternatives", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args(given)
    recipe = load_recipe(arguments.recipe, arguments.set)
    found = compare(recipe)
    write_json(folder_of(recipe, "losses.json"), found)
    write_text(folder_of(recipe, "losses.md"), markdown(found))
    console.print(markdown(found), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_main(main)
