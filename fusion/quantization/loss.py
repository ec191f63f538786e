"""What quantising has lost: by domain the answer loss before and after, and how much of the experts' gain that is."""

from typing import Any

import numpy as np

OFF = 0.02  # nats a token by which the original may lie beside what `evaluate` has found of it


def lost(
    rows: list[dict[str, Any]], figures: list[dict[str, float]], evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """The child's `figures` of held-out `rows` by domain, as nats a token, and over all answer tokens.

    The retained share is `evaluate`'s, by loss: what the fused model keeps of the own expert's gain over the anchor.
    Quantising loses (quantised - original) / (anchor - own) of it, the first two on these rows, the others from
    `evaluation`; None where `evaluate` has not run or found no gain.
    """
    domains: dict[str, Any] = {}
    for name in dict.fromkeys(row["domain"] for row in rows):
        part = [figure for row, figure in zip(rows, figures, strict=True) if row["domain"] == name]
        found = {**_means(part), "rows": len(part)}
        known = (evaluation or {}).get("domains", {}).get(name)
        before = known["retained_share_by_loss"] if known else None
        share = None
        if known and before is not None:
            share = (found["quantized"] - found["original"]) / (known["anchor"]["loss"] - known["own_expert"]["loss"])
        domains[name] = {
            **found,
            "retained_share": before,
            "retained_share_lost": share,
            "evaluated": known["fused_trained"]["loss"] if known else None,
        }
    shares = [domain["retained_share_lost"] for domain in domains.values() if domain["retained_share_lost"] is not None]
    return {
        "domains": domains,
        "all": _means(figures),
        "mean_retained_share_lost": float(np.mean(shares)) if shares else None,
    }


def _means(figures: list[dict[str, float]]) -> dict[str, Any]:
    tokens = sum(figure["tokens"] for figure in figures)
    sums = ("original", "quantized", "kl", "mean_abs", "same")
    means = {name: sum(figure[name] for figure in figures) / max(1, tokens) for name in sums}
    return {**means, "max_abs": max(figure["max_abs"] for figure in figures), "tokens": int(tokens)}


def markdown(result: dict[str, Any]) -> str:
    """The result of `quantize` as Markdown: sizes, losses by domain, what every expert was calibrated on."""
    sizes, loss = result["bytes"], result["loss"]
    groups = f", groups of {result['group_size']}" if result["group_size"] else ""
    share = sizes["quantized"] / sizes["original"]
    every = loss["all"]
    lines = [
        f"{result['scheme']}{groups}: {_size(sizes['original'])} become {_size(sizes['quantized'])} ({share:.2f}) in "
        f"{result['seconds']['all']:.0f} s with llm-compressor {result['versions']['llmcompressor']}.",
        "",
        f"Logits at {every['tokens']:,} answer tokens held out: mean difference {every['mean_abs']:.4f}, at most "
        f"{every['max_abs']:.2f}; KL {every['kl']:.5f} nats a token; the likeliest next token is the same at "
        f"{100 * every['same']:.1f}%.",
        "",
        "| domain | rows | answer loss before | after | KL | retained share before | lost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in loss["domains"].items():
        before, gone = row["retained_share"], row["retained_share_lost"]
        shares = "no gain measured | " if gone is None else f"{before:.4f} | {gone:+.4f}"
        lines.append(
            f"| {name} | {row['rows']} | {row['original']:.4f} | {row['quantized']:.4f} | {row['kl']:.5f} | {shares} |"
        )
    lines.append("")
    if loss["mean_retained_share_lost"] is not None:
        lines += [f"Retained share lost: mean {loss['mean_retained_share_lost']:+.4f}.", ""]
    other = [
        name
        for name, row in loss["domains"].items()
        if row["evaluated"] is not None and abs(row["evaluated"] - row["original"]) > OFF
    ]
    if other:
        lines += [
            f"`evaluate` has found another loss of the original for {', '.join(other)}: its shares are of another "
            "state, run it again.",
            "",
        ]
    if result["calibration"]:
        lines += ["| expert | tokens of its own domains | routed to it | calibrated on |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {row['own_domain']:,} | {row['routed_at_least']:,} | {row['seen_at_least']:,} |"
            for name, row in result["calibration"].items()
        ]
        lines += ["", "(the last two in the layer with the fewest)", ""]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
