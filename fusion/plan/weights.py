"""How far each expert has moved from the anchor, layer by layer: the figures that say whether a merge has a chance.

    qwen-fusion plan configs/demo-drifted.yaml --weights

Streamed: the anchor and all experts are read once, a few megabytes at a time. Writes drift.json, drift.md and
drift.png; values that are not finite are error findings.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

from fusion.checkpoint import write_json, write_text, written_aside
from fusion.drift import GROUPS, Difference, as_plain, by_group, chance, differences, strength
from fusion.errors import UserError
from fusion.hub import resolve_model
from fusion.plan.files import counted
from fusion.plan.findings import Finding, place_of_expert
from fusion.plan.models import describe, describe_anchor
from fusion.progress import bytes_bar
from fusion.recipe import Recipe
from fusion.sections.fusing import Expert
from fusion.source_weights import Weights
from fusion.sources import ModelSource, trained_expert

LIGHTEST, DARKEST = 1e-3, 1.0  # distances at the ends of the picture's scale


def measure(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Measures every expert whose weights are on this machine, writes the figures into `out` and returns them.

    Distances are ||W - W0|| / ||W0||. An expert is measured as it is before any anchoring, its adapter applied. Raises
    UserError where the anchor is not here, or a file is broken or does not fit.
    """
    started = time.monotonic()
    anchor = Weights(_anchor(recipe))
    sources = {expert.name: _expert(recipe, expert, anchor.source) for expert in recipe.experts}
    moved = {
        name: Weights(source) for name, source in sources.items() if source and source.paths != anchor.source.paths
    }
    rows: dict[str, list[Difference]] = {name: [] for name in moved}
    total = anchor.nbytes + sum(expert.nbytes for expert in moved.values())
    with bytes_bar() as bar:
        task = bar.add_task("drift", total=total)
        for found in differences(anchor, list(moved.values()), partial(bar.advance, task)):
            for name, difference in zip(moved, found, strict=True):
                rows[name].append(difference)
        # an adapter's update and a longer vocabulary's rows are not counted on the way
        bar.update(task, completed=total)
    result = {
        "anchor": str(recipe.anchor.model or "trained by the recipe"),
        "experts": {name: _figures(name, source, rows.get(name), anchor) for name, source in sources.items()},
        "findings": [finding.as_dict() for finding in not_finite(rows)],
        "bytes": total,
        "seconds": time.monotonic() - started,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "drift.json", result)
    write_text(out / "drift.md", markdown(result))
    draw(result, out / "drift.png")
    return result


def markdown(result: dict[str, Any]) -> str:
    """The figures as Markdown: a row an expert, then what they mean."""
    groups = [group for group in GROUPS if any(group in row["groups"] for row in _measured(result).values())]
    lines = []
    if groups:
        lines += ["How far each expert has moved from the anchor, ||W - W0|| / ||W0|| (cosine):", ""]
        lines += ["| expert | " + " | ".join(groups) + " | layers, attention |", "| --- " * (len(groups) + 2) + "|"]
    for name, row in _measured(result).items():
        cells = [f"{row['groups'][g]['distance']:.4f} ({row['groups'][g]['cosine']:.4f})" for g in groups]
        across = [layer["attention"]["distance"] for layer in row["layers"] if "attention" in layer]
        spread = f"{min(across):.4f} to {max(across):.4f}" if across else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {spread} |")
    lines += ["", *(f"- {name}: {row['verdict']}" for name, row in result["experts"].items()), ""]
    lines += [f"- {finding['severity']}: {Finding(**finding).sentence()}" for finding in result["findings"]]
    read = f"{result['bytes'] / 1e9:.2f} GB read in {result['seconds']:.1f} s."
    return "\n".join([*lines, *([""] if result["findings"] else []), read, ""])


def draw(result: dict[str, Any], path: Path) -> None:
    """The picture: a panel an expert, its groups by layer, the darker the further; nothing where none was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    panels = _measured(result)
    if not panels:
        return
    depth = max(len(row["layers"]) for row in panels.values())
    size = (max(6.0, 2.5 + 0.22 * depth), 0.9 + 1.55 * len(panels))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained")
    colours = pyplot.get_cmap("magma_r").with_extremes(bad="white")
    image = None
    for axis, (name, row) in zip(axes[:, 0], panels.items(), strict=True):
        groups = [group for group in GROUPS if group in row["groups"]]
        cells = []
        for group in groups:
            whole = row["groups"][group]["distance"]
            by_layer = [layer.get(group, {"distance": whole})["distance"] for layer in row["layers"]]
            cells.append([distance if distance > LIGHTEST else float("nan") for distance in by_layer])
        image = axis.imshow(cells, aspect="auto", cmap=colours, norm=LogNorm(LIGHTEST, DARKEST))
        labels = [f"{group} {row['groups'][group]['distance']:.3f}" for group in groups]
        axis.set_yticks(range(len(groups)), labels, fontsize=8)
        axis.set_title(f"{name}: {row['drift']}", fontsize=9, loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no layer 0.5
        axis.tick_params(axis="x", labelsize=8)
    axes[-1, 0].set_xlabel("layer (embeddings and head are the whole model's)", fontsize=8)
    bar = figure.colorbar(image, ax=axes[:, 0], ticks=[0.001, 0.01, 0.1, 1], format="%g")
    bar.set_label("moved, of the anchor's norm (0.001 or less is white)", fontsize=8)
    try:
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=130)
    finally:
        pyplot.close(figure)


def _anchor(recipe: Recipe) -> ModelSource:
    anchor = describe_anchor(recipe, trained=True)
    if anchor.folder is None:
        named = recipe.anchor.model or "which the recipe trains"
        raise UserError(f"the weights of the anchor, {named}, are not on this machine: download or train it first")
    return ModelSource("anchor", anchor.folder)


def _expert(recipe: Recipe, expert: Expert, anchor: ModelSource) -> ModelSource | None:
    """The expert as it is before any anchoring; None where its weights are not here."""
    if expert.branch:
        folder = trained_expert(recipe, expert)
        if not folder.is_dir():
            return None
        return ModelSource(expert.name, *((anchor.folder, folder) if expert.branch.lora_rank else (folder,)))
    found = describe(place_of_expert(expert.name), str(expert.model)).folder
    if found is None:
        return None
    return ModelSource(expert.name, found, resolve_model(expert.adapter, False) if expert.adapter else None)


def _figures(name: str, source: ModelSource | None, rows: list[Difference] | None, anchor: Weights) -> dict[str, Any]:
    """One expert's figures as plain data; without any where its weights are not here."""
    if source is None:
        return {"drift": None, "groups": {}, "layers": [], "verdict": "its weights are not on this machine"}
    if rows is None:  # the anchor itself
        return {"drift": "anchored", "groups": {}, "layers": [], "verdict": "it is the anchor"}
    groups = by_group(rows)
    depth = 1 + max((row.layer for row in rows if row.layer is not None), default=-1)
    by_layer: list[list[Difference]] = [[] for _ in range(depth)]
    for row in rows:
        if row.layer is not None:
            by_layer[row.layer].append(row)
    layers = [as_plain(by_group(found)) for found in by_layer]
    figures = {"groups": as_plain(groups), "layers": layers}
    broken = "it" if any(row.not_finite for row in rows) else ""
    broken = broken or ("the anchor" if any(row.anchor_not_finite for row in rows) else "")
    if broken:
        verdict = f"{broken} holds values that are not finite, so that every answer after the merge would be nonsense"
        return {"drift": "not finite", **figures, "verdict": verdict}
    return {"drift": strength(groups), **figures, "verdict": chance(groups)}


def not_finite(rows: dict[str, list[Difference]]) -> list[Finding]:
    """One finding a model that holds NaN or infinite values, the anchor among them; `rows`: by expert."""
    counts = {place_of_expert(name): {row.name: row.not_finite for row in found} for name, found in rows.items()}
    counts["anchor"] = {row.name: row.anchor_not_finite for found in rows.values() for row in found}
    findings = []
    for where, by_name in counts.items():
        broken = [name for name, count in by_name.items() if count]
        if broken:
            count = sum(by_name.values())
            values = "1 value" if count == 1 else f"{count:,} values"
            what = f"{values} in {counted(broken)} {'is' if count == 1 else 'are'} not finite"
            why = "one of them makes every answer of the fused model nonsense"
            findings.append(Finding("error", where, what, why, "make or download the model again"))
    return findings


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in result["experts"].items() if row["groups"]}
