"""The evaluation as a Markdown table, and its picture: which expert each domain's tokens go to."""

from pathlib import Path
from typing import Any

from fusion.checkpoint import written_aside

LABELS = {
    "anchor": "anchor",
    "own_expert": "own expert",
    "fused_random": "fused, random gates",
    "fused_hidden": "fused, `hidden` gates",
    "fused_trained": "fused, trained gates",
}

START_LABELS = {
    "expert": "its MLPs on the anchor's other parts",
    "halfway": "halfway to the anchor's",
    "anchor": "the anchor's MLPs",
    "transported": "transported",
}


def markdown(result: dict[str, Any]) -> str:
    """The result of `evaluate` as Markdown: scores, losses, retained shares, extra tasks."""
    columns = list(LABELS.values())
    lines = [
        "Task score on held-out rows (mean, 95% interval, rows), and answer loss in nats a token:",
        "",
        "| domain | " + " | ".join(columns) + " | retained share |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for name, domain in result["domains"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(domain[row]) for row in LABELS) + f" | {_share(domain)} |")
    for name, rows in result["extra"].items():
        cells = [_cell(rows[row]) if row in rows else "" for row in LABELS]
        change = rows["score_minus_anchor"]
        against = f"{change['value']:+.3f} [{change['low']:.2f}, {change['high']:.2f}] against the anchor"
        lines.append(f"| {name} (extra) | " + " | ".join(cells) + f" | {against} |")
    overall = "no gain to retain"
    if result["mean_retained_share"] is not None:
        overall = f"mean {result['mean_retained_share']:.3f}, worst {result['worst_retained_share']:.3f}"
    for found in result["mean_scores"]:
        cells = [_figure(found["scores"].get(row)) for row in LABELS]
        lines.append(f"| **mean score** of {_counted(found['rows'])} | {' | '.join(cells)} | {overall} |")
        overall = ""
    lines.append("")
    kept = {name: domain.get("retained_share_by_loss") for name, domain in result["domains"].items()}
    shares = {name: share for name, share in kept.items() if share is not None}
    if shares:
        bounds = {name: result["domains"][name].get("retained_share_by_loss_interval") for name in shares}
        by_domain = ", ".join(f"{name} {_with_bounds(share, bounds[name])}" for name, share in shares.items())
        mean, worst = sum(shares.values()) / len(shares), min(shares.values())
        lines += [f"Retained of the gain in answer loss: mean {mean:.3f}, worst {worst:.3f} ({by_domain}).", ""]
    no_gain = {name: domain["loss_minus_own"]["value"] for name, domain in result["domains"].items()}
    no_gain = {name: loss for name, loss in no_gain.items() if name not in shares}
    if no_gain:
        by_domain = ", ".join(f"{name} {loss:+.3f}" for name, loss in no_gain.items())
        lines += [f"No gain in answer loss to retain; nats a token above the own expert: {by_domain}.", ""]
    lines += _ways(result) + _moved(result) + _anchoring(result)
    if any(len(row) > 1 for row in result["experts_by_domain"].values()):
        lines += _cross(result)
    return "\n".join(lines)


WAY_LABELS = {
    "anchor": "anchor",
    "own_expert": "own expert",
    "labelled": "perfect routing",
    "top-1": "one expert a token",
    "top-2": "two experts a token",
}


def _ways(result: dict[str, Any]) -> list[str]:
    """What the fused model loses along other ways than the one that is served."""
    ways = result.get("ways", {})
    if not ways:
        return []
    lines = ["Answer loss by who answers a token, on the rows of the baselines:", ""]
    lines += ["| domain | " + " | ".join(WAY_LABELS[way] for way in ways) + " |", "| --- " * (len(ways) + 1) + "|"]
    for name in ways["anchor"]:
        lines.append(f"| {name} | " + " | ".join(_figure(losses[name]) for losses in ways.values()) + " |")
    means = [sum(losses.values()) / len(losses) for losses in ways.values()]
    return [*lines, f"| **mean** | {' | '.join(map(_figure, means))} |", ""]


def _moved(result: dict[str, Any]) -> list[str]:
    """How far the experts have moved, those that were led back to the anchor before and after; cosines in the JSON."""
    rows = dict(result.get("moved", {}))
    for name, groups in result.get("moved_anchored", {}).items():
        rows[f"{name}, anchored"] = groups
    if not rows:
        return []
    groups = list(next(iter(rows.values())))
    lines = ["How far each expert has moved from the anchor, ||W - W0|| / ||W0||:", ""]
    lines += ["| expert | " + " | ".join(groups) + " |", "| --- " * (len(groups) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_distance(row[group]["distance"]) for group in groups) + " |")
    return [*lines, ""]


def _distance(moved: float) -> str:
    """Three digits behind the point, five of what hardly moved."""
    return f"{moved:.5f}" if 0 < moved < 0.01 else f"{moved:.3f}"


def _anchoring(result: dict[str, Any]) -> list[str]:
    """What leading drifted experts back kept, and how far each start of the training got without any."""
    notes = result.get("anchoring", {})
    starts = list(dict.fromkeys(name for note in notes.values() for name in note["starts"]))
    if not notes:
        return []
    taught = any("teacher" in note["losses"] for note in notes.values())
    columns = ["anchor", "drifted", *(["teacher"] if taught else []), *(START_LABELS[n] for n in starts), "anchored"]
    lines = ["Drifted experts led back to the anchor, answer loss in nats a token (share of the gain kept):", ""]
    lines += ["| expert | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, note in notes.items():
        kept = note.get("starts_retained", {})
        cells = [_figure(note["losses"]["anchor"]), _figure(note["losses"]["expert"])]
        cells += [_figure(note["losses"]["teacher"]) if "teacher" in note["losses"] else ""] if taught else []
        cells += [_with_share(note["starts"].get(start), kept.get(start)) for start in starts]
        cells.append(_with_share(note["losses"]["anchored"], note["retained_share"]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _with_share(loss: float | None, share: float | None) -> str:
    return _figure(loss) + (f" ({share:.2f})" if share is not None else "")


def _cross(result: dict[str, Any]) -> list[str]:
    domains = list(dict.fromkeys(name for row in result["experts_by_domain"].values() for name in row))
    lines = ["Every expert alone on every domain:", "", "| expert | " + " | ".join(domains) + " |"]
    lines.append("| --- " * (len(domains) + 1) + "|")
    for expert, row in result["experts_by_domain"].items():
        lines.append(f"| {expert} | " + " | ".join(_figure(row.get(name)) for name in domains) + " |")
    return [*lines, ""]


def _cell(row: dict[str, Any]) -> str:
    low, high = row["score_interval"]
    return f"{row['score']:.3f} [{low:.2f}, {high:.2f}] of {row['rows']}; {row['loss']:.3f}"


def _counted(rows: dict[str, int]) -> str:
    """How many rows a domain: 5 x 40, or 5 x 38 to 40."""
    least, most = min(rows.values()), max(rows.values())
    return f"{len(rows)} x {least}" + (f" to {most}" if most > least else "")


def _share(domain: dict[str, Any]) -> str:
    if domain["retained_share"] is None:
        return f"no gain to retain; score {domain['score_minus_own']['value']:+.3f} against the own expert"
    return _with_bounds(domain["retained_share"], domain["retained_share_interval"])


def _with_bounds(value: float, bounds: list[float] | None) -> str:
    return f"{value:.3f} [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else f"{value:.3f}"  # none in older figures


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def draw_routing(result: dict[str, Any], path: Path) -> None:
    """A heatmap of domain x expert: the share of held-out answer tokens, and of all tokens, over all sparse layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routing = result["routing"]
    kinds = (("answer_tokens", "answer tokens"), ("all_tokens", "all tokens"))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (key, title) in zip(axes, kinds, strict=True):
        domains = list(routing[key])
        shares = [routing[key][name] for name in domains]  # (domains, experts)
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.set_xticks(range(len(routing["experts"])), routing["experts"], rotation=30, ha="right")
        axis.set_yticks(range(len(domains)), domains)
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                axis.text(x, y, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.55 else "black")
        axis.set_xlabel("expert")
        axis.set_title(f"Share of {title}")
    axes[0].set_ylabel("domain")
    figure.colorbar(image, ax=axes, shrink=0.8)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
    pyplot.close(figure)
