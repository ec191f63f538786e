"""What `benchmark` found, as a Markdown table and as grouped bars."""

from pathlib import Path
from typing import Any

from fusion.checkpoint import written_aside

SHOWN = 12  # tasks of a group
COLUMNS = {"anchor": "anchor", "own_expert": "own expert", "router": "expert picked by a router", "fused": "fused"}


def markdown(result: dict[str, Any]) -> str:
    """One line a task: scores with their 95% intervals, what fusing brought and cost, the share kept of the gain."""
    columns = _columns(result)
    lines = [
        "| task (score, rows) | "
        + " | ".join(columns.values())
        + " | fused less anchor | less own expert | retained share |",
        "| --- " * (len(columns) + 4) + "|",
    ]
    for name, row in result["tasks"].items():
        cells = [_with_interval(row["scores"].get(column)) for column in columns]
        cells += [_with_interval(row["fused_minus"].get(column), "+.3f") for column in ("anchor", "own_expert")]
        cells.append(_with_interval(row["retained_share"]) or "no gain to retain")
        lines.append(f"| {name} ({row['metric']}, {row['rows']}) | " + " | ".join(cells) + " |")
    for name, row in result["tasks"].items():
        if "experts" in row:
            each = ", ".join(f"{expert} {score['value']:.3f}" for expert, score in row["experts"].items())
            best = _with_interval(row["fused_minus_best"], "+.3f")
            routed = _with_interval(row["fused_minus"].get("router"), "+.3f")
            lines += [
                "",
                f"{name}, every expert alone: {each}. Fused less the best of them ({row['best_expert']}, known only "
                f"from these rows): {best}; less the router: {routed}.",
            ]
    for name, row in result["tasks"].items():
        if 1 < len(row["by_task"]) <= SHOWN:
            said = [
                f"{task} " + ", ".join(f"{columns[c]} {by[c]:.3f}" for c in columns if c in by)
                for task, by in row["by_task"].items()
            ]
            lines += ["", f"{name} by task: {'; '.join(said)}."]
    more = {name: row["others"] for name, row in result["tasks"].items() if any(row["others"].values())}
    for name, others in more.items():
        said = [
            f"{columns[column]} " + ", ".join(f"{metric} {value:.3f}" for metric, value in values.items())
            for column, values in others.items()
        ]
        lines += ["", f"{name}: " + "; ".join(said) + "."]
    return "\n".join([*lines, ""])


def _columns(result: dict[str, Any]) -> dict[str, str]:
    """The models that are compared, by how the figures name them: dense ones only where they were asked."""
    asked = dict.fromkeys(column for row in result["tasks"].values() for column in row["scores"])
    known = {column: label for column, label in COLUMNS.items() if column in asked}
    return known | {column: f"dense, {column}" for column in asked if column not in COLUMNS}


def _with_interval(figure: dict[str, float] | None, form: str = ".3f") -> str:
    if figure is None:
        return ""
    return f"{figure['value']:{form}} [{figure['low']:.2f}, {figure['high']:.2f}]"


def draw(result: dict[str, Any], path: Path) -> None:
    """Grouped bars with intervals, one group a task."""
    from matplotlib.figure import Figure

    tasks = result["tasks"]
    figure = Figure(figsize=(max(6.0, 1.6 * len(tasks)), 4), layout="constrained")
    axes = figure.add_subplot()
    columns = _columns(result)
    width = 0.8 / len(columns)
    for place, (column, label) in enumerate(columns.items()):
        found = [(at, row["scores"][column]) for at, row in enumerate(tasks.values()) if column in row["scores"]]
        values = [score["value"] for _, score in found]
        errors = [
            [score["value"] - score["low"] for _, score in found],
            [score["high"] - score["value"] for _, score in found],
        ]
        at = [position + (place - (len(columns) - 1) / 2) * width for position, _ in found]
        axes.bar(at, values, width, yerr=errors, capsize=2, label=label)
    axes.set_xticks(range(len(tasks)), [f"{name}\n{row['metric']}" for name, row in tasks.items()])
    axes.set_ylabel("score")
    axes.set_ylim(0, 1)
    figure.legend(loc="outside upper center", ncols=len(columns))
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
