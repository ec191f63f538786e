"""The gate training's report: JSON beside Markdown, and a picture of routing accuracy and of calibration."""

from pathlib import Path

from fusion.checkpoint import write_json, write_text, written_aside
from gate_training import judge
from gate_training.compare import ANCHOR, LABELLED, OWN, Losses, mean_loss, retained
from gate_training.held_out import BINS, Confidence
from gate_training.trainer import GateReport


def write_report(report: GateReport, folder: Path) -> None:
    """Writes gates.json, gates.md and gates.png into `folder`."""
    write_json(folder / "gates.json", report.as_dict())
    write_text(folder / "gates.md", markdown(report))
    draw(report, folder / "gates.png")


def markdown(report: GateReport) -> str:
    """The report as a Markdown section: accuracy per layer and domain, and how the tokens spread over the experts."""
    domains = list(report.layers[0].accuracy_by_domain)
    experts = list(report.layers[0].share_by_expert)
    lines = [
        f"Gates by `{report.method}` on {report.tokens:,} tokens labelled by `{report.labels}`; shares of "
        f"{report.held_out_tokens:,} held-out tokens that go to the labelled expert first, all tokens / answer tokens.",
        "The recipe's rules alone send to the same expert: "
        + ", ".join(f"{name} {share:.0%}" for name, share in report.rules_agreement.items())
        + " of held-out examples."
        + (f" The channels disagree on {report.disputed} training examples (labels.jsonl)." if report.disputed else ""),
        "",
        "| layer | all | " + " | ".join(domains) + " |",
        "| --- " * (len(domains) + 2) + "|",
    ]
    for row in report.layers:
        cells = [f"{row.accuracy:.3f} / {row.answer_accuracy:.3f}"]
        cells += [f"{row.accuracy_by_domain[d]:.3f} / {row.answer_accuracy_by_domain[d]:.3f}" for d in domains]
        lines.append(f"| {row.layer} | " + " | ".join(cells) + " |")
    if report.threshold is not None:
        lines += ["", f"Another expert than the general one needs a probability of {report.threshold} against it."]
    if report.compared:
        lines += ["", *compared_table(report.compared)]
    if report.active_parameters:
        costs = ", ".join(f"{count:,} ({name})" for name, count in report.active_parameters.items())
        lines += ["", f"Parameters that a token passes: {costs}."]
    if report.refined:
        loss = "{loss_before:.4f} -> {loss_after:.4f} at step {best_step} of {steps}".format(**report.refined)
        cost = "{tokens:,} tokens, {seconds:.0f} s".format(**report.refined)
        lines += ["", f"Refined through the whole model (`lm`): held-out loss, mean over domains, {loss}; {cost}."]
    if report.judged:
        lines += ["", "What feedback changed:", "", judge.markdown(report.judged)]
    lines += [
        "",
        "Share of held-out tokens per expert:",
        "",
        "| layer | " + " | ".join(experts) + " |",
        "| --- " * (len(experts) + 1) + "|",
    ]
    for row in report.layers:
        lines.append(f"| {row.layer} | " + " | ".join(f"{row.share_by_expert[e]:.3f}" for e in experts) + " |")
    last = report.layers[-1]
    lines += ["", f"Answer tokens of each domain by expert, layer {last.layer}:", ""]
    lines += ["| domain | " + " | ".join(experts) + " |", "| --- " * (len(experts) + 1) + "|"]
    for domain, row_ in last.confusion.items():
        lines.append(f"| {domain} | " + " | ".join(f"{row_[expert]:.3f}" for expert in experts) + " |")
    lines += [
        "",
        "How sure the gates are of answer tokens (entropy in nats; ln of the number of experts is not at all), and how "
        "often they are right where they are that sure (all tokens, mean over layers):",
        "",
        "| layer | " + " | ".join(str(row.layer) for row in report.layers) + " |",
        "| --- " * (len(report.layers) + 1) + "|",
        "| entropy | " + " | ".join(f"{row.entropy:.3f}" for row in report.layers) + " |",
        "",
        "| confidence | right | share of tokens |",
        "| --- | --- | --- |",
        *(f"| {found.confidence:.3f} | {found.accuracy:.3f} | {found.share:.4f} |" for found in _calibration(report)),
    ]
    return "\n".join(lines) + "\n"


def _calibration(report: GateReport) -> list[Confidence]:
    """Confidence against accuracy over all layers, in tenths of confidence; shares add up to 1."""
    bins: dict[int, list[Confidence]] = {}
    for row in report.layers:
        for found in row.calibration:
            bins.setdefault(min(int(found.confidence * BINS), BINS - 1), []).append(found)
    merged = []
    for _, members in sorted(bins.items()):
        share = sum(found.share for found in members)
        sure, right = (sum(getattr(f, key) * f.share for f in members) / share for key in ("confidence", "accuracy"))
        merged.append(Confidence(sure, right, share / len(report.layers)))
    return merged


def compared_table(losses: dict[str, Losses]) -> list[str]:
    """All that was compared: models and perfect routing first, then gates, the best first."""
    domains = list(next(iter(losses.values())))
    lines = [
        "Loss in nats per held-out answer token. `labelled` sends every token to its label's expert; gates serve with "
        "one or two experts a token, whichever they were fitted with. In brackets the share of the own expert's gain "
        "over the anchor that is retained, or where there is none the difference from the anchor; the last columns are "
        "those shares' mean and the worst.",
        "",
        "| gates | mean | " + " | ".join(domains) + " | retained | worst |",
        "| --- " * (len(domains) + 4) + "|",
    ]
    for name in sorted(losses, key=lambda name: (name not in (ANCHOR, OWN, LABELLED), mean_loss(losses[name]))):
        by_domain = retained(losses[name], losses)
        cells = [f"{mean_loss(losses[name]):.4f}"]
        for domain in domains:
            loss = losses[name][domain]
            share, change = by_domain.get(domain), loss - losses[ANCHOR][domain]
            cells.append(f"{loss:.4f} ({f'{change:+.3f}' if share is None else f'{share:.2f}'})")
        shares = list(by_domain.values())
        cells += [f"{sum(shares) / len(shares):.3f}", f"{min(shares):.3f}"] if shares else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(report: GateReport, path: Path) -> None:
    """Held-out routing accuracy over the layers, a line a domain, and how often gates are right that are so sure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [row.layer for row in report.layers]
    figure, (axes, sure) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=[3, 2], layout="constrained")
    for domain in report.layers[0].accuracy_by_domain:
        answers = [row.answer_accuracy_by_domain[domain] for row in report.layers]
        (line,) = axes.plot(layers, answers, marker="o", label=domain)
        everything = [row.accuracy_by_domain[domain] for row in report.layers]
        axes.plot(layers, everything, linestyle="--", color=line.get_color(), alpha=0.6)
    axes.set_xlabel("layer")
    axes.set_ylabel("routed to the labelled expert")
    axes.set_title("Held-out tokens: answers (solid), all (dashed)")
    axes.set_xticks(layers)
    lowest = min(min(row.accuracy_by_domain.values()) for row in report.layers)
    axes.set_ylim(max(0.0, lowest - 0.05), 1.01)
    found = _calibration(report)
    sure.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    sizes = [400 * tenth.share for tenth in found]
    sure.scatter([tenth.confidence for tenth in found], [tenth.accuracy for tenth in found], sizes, alpha=0.7)
    sure.set_xlim(0, 1.08)
    sure.set_ylim(0, 1.08)
    sure.set_xlabel("confidence of the gate's first choice")
    sure.set_ylabel("right")
    sure.set_title("All tokens, area: their share")
    figure.legend(loc="outside right center")  # over no line
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
    pyplot.close(figure)
