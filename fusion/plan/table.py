"""A plan on the terminal: the findings, then sizes and capacities as tables. Prints what the JSON holds, no more.

print_plan(road.plan(recipe))
"""

from typing import Any

from rich import box
from rich.table import Table

from fusion.plan.findings import SEVERITIES, Finding
from fusion.progress import console

COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
GROUP_NAMES = {"shared_expert": "shared expert", "dense_mlps": "dense MLPs"}


def print_plan(plan: dict[str, Any]) -> None:
    """Prints a plan's data: findings first, the worst of them at the top."""
    counts = {kind: sum(row["severity"] == kind for row in plan["findings"]) for kind in SEVERITIES}
    said = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count)
    console.print(f"[bold]plan[/bold] of {plan['recipe']}: {said or 'nothing found amiss'}", highlight=False)
    print_findings([Finding(**row) for row in plan["findings"]])
    if "capacity" in plan:
        console.print(f"  [bold]{_verdict(plan)}[/bold]", highlight=False, soft_wrap=True)
    if "budget" in plan:
        _print_budget(plan)
    if "capacity" in plan:
        _print_capacity(plan)
        _print_alternatives(plan["alternatives"])
        _print_estimate(plan["estimate"])


def _verdict(plan: dict[str, Any]) -> str:
    """Whether the machine serves what the recipe asks for, in a sentence."""
    length, wanted = plan["max_model_len"], plan["served_format"]
    row = next((row for row in plan["capacity"] if row["weight_format"] == wanted), None)
    if any(finding["severity"] == "error" for finding in plan["findings"]) or row is None:
        return f"{plan['hardware']['name']} does not serve this as the recipe says it: the errors say what would"
    sequences = row["kv_tokens"] // length
    many = f"the KV cache of {sequences} whole ones" if sequences > 1 else "the KV cache of one whole one"
    return f"{plan['hardware']['name']} serves it in {wanted}, requests of up to {length:,} tokens, with {many} at once"


def print_findings(findings: list[Finding]) -> None:
    """Prints findings, a line each; notes that say the same of several models share one."""
    notes: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.severity == "note":
            notes.setdefault((finding.why or finding.what, finding.fix), []).append(finding)
    said = [finding for finding in findings if finding.severity != "note"]
    for (why, fix), alike in notes.items():
        where, what = (", ".join(dict.fromkeys(each)) for each in zip(*((n.where, n.what) for n in alike), strict=True))
        said.append(Finding("note", where, what, why if why != what else "", fix))
    for finding in said:
        kind = f"[{COLOURS[finding.severity]}]{finding.severity}[/]"
        console.print(f"  {kind}: ", end="", highlight=False)
        console.print(finding.sentence(), markup=False, highlight=False, soft_wrap=True)


def _line(text: str) -> None:
    console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)


def _print_budget(plan: dict[str, Any]) -> None:
    sizes = plan["budget"]
    _line(
        f"{_millions(sizes['parameters'])} parameters ({sizes['parameters']:,}), "
        f"{_millions(sizes['active_parameters'])} active a token; {_gb(sizes['bytes'])} in {sizes['dtype']}, "
        f"{_gb(sizes['bytes_per_card'])} a card; KV cache {sizes['kv_bytes_per_token']:,} bytes a token, "
        f"{sizes['kv_bytes_per_token_per_card']:,} a card"
    )
    groups = [f"{GROUP_NAMES.get(name, name)} {count:,}" for name, count in sizes["groups"].items() if count]
    _line(f"of them {', '.join(groups)}")
    if machine := plan.get("machine"):
        where = f"{machine['gpus']} GPUs" if machine["gpus"] else "no GPU that vLLM can use"
        _line(f"this machine: {where}, CPU cores: {machine['cpu_cores']}; --hardware NAME says what fits a machine")


def _print_capacity(plan: dict[str, Any]) -> None:
    hardware, rows = plan["hardware"], plan["capacity"]
    engines = rows[0]["engines"]
    title = f"{hardware['name']}, {hardware['memory_gib']} GiB" + (" a card" if hardware["cards"] > 1 else "")
    served = f"the recipe serves {plan['served_format']}"
    table = _table(f"{title}, {served}: GB on the fullest card; reserves are estimates, not measured")
    numbers = ["weights", "activations", "graphs", "libraries", "KV cache", "KV tokens"]
    _columns(table, ["weights in"], numbers)
    for row in rows:
        parts = [_number(row[key]) for key in ("weights", "activations", "graphs", "other", "kv_bytes")]
        table.add_row(row["weight_format"], *parts, f"{row['kv_tokens']:,}")
    console.print(table)
    if engines > 1:
        _line(f"{engines} such engines find room side by side, and keep {engines} times as many tokens")
    table = _table("Sequences whose KV cache one engine holds, by max_model_len (~ with YaRN, - vLLM does not start)")
    lengths = [f"{'~' if length['yarn'] else ''}{length['max_model_len']:,}" for length in rows[0]["lengths"]]
    _columns(table, ["weights in"], lengths)
    for row in rows:
        sequences = (f"{length['sequences']:.1f}" if length["fits"] else "-" for length in row["lengths"])
        table.add_row(row["weight_format"], *sequences)
    console.print(table)
    if any(row["tensor_parallel"] != row["expert_parallel"] for row in plan["card_weights"]):
        pairs = (
            f"{row['weight_format']} {_number(row['tensor_parallel'])} and {_number(row['expert_parallel'])}"
            for row in plan["card_weights"]
        )
        _line(f"weights on the fullest card with tensor and with expert parallelism, GB: {', '.join(pairs)}")


def _print_alternatives(rows: list[dict[str, Any]]) -> None:
    table = _table("Without a merge: GB in all and on the fullest card, KV tokens of one engine, whether it starts")
    _columns(table, ["served by", "weights in"], ["GB", "a card", "KV tokens"])
    table.add_column("starts", no_wrap=True)
    for row in rows:
        engine, count = row["engine"], row["engines"]
        cells = (_number(row["weights"]), _number(row["weights_per_card"]), f"{engine['kv_tokens']:,}")
        name = f"{count} engine{'s' if count > 1 else ''}, {row['how']}"
        starts = "yes" if row["fits"] else "no"
        table.add_row(name, engine["weight_format"], *cells, starts + ("" if row["possible"] else " *"))
    console.print(table)
    for why in dict.fromkeys(f"* these experts cannot be {row['name']}: {row['why']}" for row in rows if row["why"]):
        _line(why)


def _table(title: str) -> Table:
    """A table under a line of its own: a title in the table would be broken to its width."""
    console.print(f"[bold]{title}[/bold]", highlight=False, soft_wrap=True)
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _columns(table: Table, names: list[str], numbers: list[str]) -> None:
    """Columns that are never cut, whatever the terminal's width."""
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)


def _print_estimate(bounds: dict[str, Any]) -> None:
    steps = ", ".join(
        f"{row['step']} {_gb(row['stays'])}" + (f" (and {_gb(row['meanwhile'])} meanwhile)" if row["meanwhile"] else "")
        for row in bounds["disk"]
    )
    _line(f"disk: {_gb(bounds['disk_bytes'])}: {steps}")
    _line(
        f"merge: reads {_gb(bounds['merge_reads'])}, writes {_gb(bounds['merge_writes'])}, at least "
        f"{_time(bounds['merge_s'])} at the profile's disk rates, about {_gb(bounds['merge_memory'])} of memory; "
        f"loading into vLLM at least {_time(bounds['load_s'])}"
    )
    speeds = ", ".join(
        f"{row['weight_format']} {row['decode']:,.0f} and {row['prefill']:,.0f}" for row in bounds["speeds"]
    )
    _line(f"upper bounds of decoding one sequence and of prefill, tokens/s: {speeds} (bandwidth and peak rate alone)")


def _number(count: float) -> str:
    """Bytes as GB, with more digits for small models."""
    return f"{count / 1e9:.1f}" if abs(count) >= 1e9 else f"{count / 1e9:.3f}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _gb(count: float) -> str:
    return f"{_number(count)} GB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"
