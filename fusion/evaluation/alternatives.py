"""What a family of experts can become, every way by answer loss: one dense model, whole experts, adapters, fused.

    python -m fusion.evaluation.alternatives configs/qwen2.5-0.5b-five-experts.yaml --set data_folder=../data

Makes the dense models (dense.py) and the gates of every method, then measures all ways (ways.py). Everything is kept
under OUTPUT/alternatives, way by way, and made again only where what it comes from has changed. On a 0.5B and one core
`union` (as long a training as all branches) and `likelihood` take an hour each, `adapters` of experts that drifted a
quarter: `--without union,likelihood,adapters`.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from fusion.checkpoint import read_json, write_json, write_lines, write_text
from fusion.errors import UserError, run_main
from fusion.evaluation.answer_loss import Nats, by_domain
from fusion.evaluation.dense import DENSE, UNION, dense_step, folder_of, union_step
from fusion.evaluation.intervals import Interval, difference
from fusion.evaluation.ways import ADAPTERS, Way, gates_step, held_out, own_gates, ways
from fusion.healed import as_merged
from fusion.progress import console
from fusion.provenance import made
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from fusion.road import fused_folder, unhealed_folder
from fusion.steps import Step, run_step
from gate_training.compare import mean_loss
from gate_training.trainer import METHODS

MADE = (*DENSE, UNION, ADAPTERS, *METHODS)


def compare(recipe: Recipe, without: Collection[str] = ()) -> tuple[dict[str, list[Nats]], list[str]]:
    """Every way's losses by row, what is there already taken as it is; the rows' domains.

    Dense models, adapters and gates named in `without` are not made. Raises UserError where nothing is merged yet.
    """
    with as_merged(fused_folder(recipe), unhealed_folder(recipe)) as folder:
        steps = [dense_step(recipe, name) for name in DENSE if name not in without]
        if UNION not in without and any(expert.branch for expert in recipe.experts):
            steps.append(union_step(recipe))
        steps += [gates_step(recipe, method, folder) for method in METHODS if method not in without]
        for step in steps:
            run_step(step, recipe.folder)
        rows = held_out(recipe)
        digest = hashlib.sha256(repr([(row.messages, row.domain) for row in rows.rows]).encode()).hexdigest()
        found = {}
        for way in ways(recipe, rows, folder, adapters=ADAPTERS not in without):
            file = folder_of(recipe, "losses") / f"{way.name.replace(', ', '-').replace(' ', '_')}.json"
            measure = partial(_keep, file, way, rows.domains)
            parts = [digest, rows.picked, *way.settings]
            run_step(Step(way.name, parts, way.inputs, [file], measure), recipe.folder)
            found[way.name] = [tuple(row) for row in read_json(file)]
    return found, rows.domains


def _keep(file: Path, way: Way, domains: list[str]) -> str:
    measured = way.measure()
    write_json(file, measured)
    return ", ".join(f"{domain} {loss:.3f}" for domain, loss in by_domain(measured, domains).items())


def markdown(found: dict[str, list[Nats]], domains: Sequence[str], beside: str) -> str:
    """A line a way: its losses by domain, their mean, that less the mean of way `beside`, what it keeps of the gains.

    Gains are the experts', where 95% of the differences between anchor and own expert have one.
    """
    losses = {way: by_domain(rows, domains) for way, rows in found.items()}
    anchor, own = losses["anchor"], losses["own expert"]
    gains = {}
    for name in anchor:
        mine = [number for number, domain in enumerate(domains) if domain == name]
        before, after = ([found[way][number] for number in mine] for way in ("anchor", "own expert"))
        if _less(before, after, [name] * len(mine)).low > 0:
            gains[name] = anchor[name] - own[name]
    head = ["way", *anchor, "mean", f"less that of *{beside}*", "of the experts' gain kept: mean, worst"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for way, loss in losses.items():
        kept = [(anchor[name] - loss[name]) / gain for name, gain in gains.items()]
        share = f"{sum(kept) / len(kept):.3f}, {min(kept):.3f}" if kept else "no gain"
        less = _less(found[way], found[beside], domains)
        cells = [*(f"{nats:.3f}" for nats in loss.values()), f"{mean_loss(loss):.3f}"]
        cells.append("" if way == beside else f"{less.value:+.3f} [{less.low:+.3f}, {less.high:+.3f}]")
        lines.append(f"| {way} | {' | '.join(cells)} | {share} |")
    return "\n".join([*lines, ""])


def _less(first: Sequence[Nats], second: Sequence[Nats], domains: Sequence[str]) -> Interval:
    """The mean over domains of one way's loss less another's, paired by row."""
    tokens: Counter[str] = Counter()
    for (_, count), domain in zip(first, domains, strict=True):
        tokens[domain] += count
    weights = [len(domains) / (len(tokens) * tokens[domain]) for domain in domains]
    pair = ([nats * weight for (nats, _), weight in zip(rows, weights, strict=True)] for rows in (first, second))
    return difference(*pair)


def main(*given: str) -> None:
    """Makes the alternatives, measures all ways, prints the table and leaves it in OUTPUT/alternatives."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion.evaluation.alternatives", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--without", default="", metavar="NAME,NAME", help=f"not to be made: {', '.join(MADE)}")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args(given)
    without = [name for name in map(str.strip, arguments.without.split(",")) if name]
    if unknown := sorted(set(without) - set(MADE)):
        raise UserError(f"--without {', '.join(unknown)}: what can be left out is {', '.join(MADE)}")
    recipe = load_recipe(arguments.recipe, arguments.set)
    found, domains = compare(recipe, without)
    table = markdown(found, domains, own_gates(recipe.routing.top_k))
    tokens = [count for _, count in found["anchor"]]  # of the same rows in every way
    head = {"recipe": recipe.name, "seed": recipe.evaluation.seed, "made": made(), "domains": domains, "tokens": tokens}
    losses = [{"way": way, "nats": [nats for nats, _ in rows]} for way, rows in found.items()]
    write_lines(folder_of(recipe, "losses.jsonl"), [head, *losses])
    write_text(folder_of(recipe, "losses.md"), table)
    console.print(table, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_main(main)
