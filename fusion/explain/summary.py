"""An explanation in the terminal: who took the text, the text in the experts' colours, shares, what the labels say.

console.print(summary(explanation))
"""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fusion.explain.explanation import Explanation

COLOURS = ("bright_blue", "dark_orange", "green3", "magenta", "gold1", "cyan", "red", "spring_green1", "grey62")
SHOWN = 400  # tokens of the text


def summary(explanation: Explanation) -> RenderableType:
    """The explanation in a screen: headline, text, table of shares, deciding tokens, opinions."""
    share = explanation.shares.judged[explanation.winner]
    parts = f"{len(explanation.layers)} sparse layers, top-{explanation.top_k} of {len(explanation.experts)} experts"
    sure = f"mean probability of the first choice {explanation.confidence:.2f}, entropy {explanation.entropy:.2f} of 1"
    headline = Text.assemble((explanation.winner, _style(explanation, explanation.winner)), " took ")
    headline.append(f"{share:.0%} of the {explanation.judged}").stylize("bold")
    return Group(
        headline, Text(f"{parts}; {sure}", "dim"), "", _text(explanation), "", _table(explanation), _why(explanation)
    )


def _style(explanation: Explanation, expert: str) -> str:
    """The expert's colour; experts beyond the last colour share it."""
    return f"bold {COLOURS[min(explanation.experts.index(expert), len(COLOURS) - 1)]}"


def _text(explanation: Explanation) -> Text:
    """Every token outside the template in the colour of the expert that has most of its weight over all layers."""
    text = Text()
    own = [i for i, token in enumerate(explanation.tokens) if token.part != "template"]
    for place, i in enumerate(own[:SHOWN]):
        token = explanation.tokens[i]
        if place and explanation.tokens[own[place - 1]].part != token.part:
            text.append("\n")
        text.append(token.text, _style(explanation, explanation.experts[_first_choice(explanation, i)]))
    if len(own) > SHOWN:
        text.append(f" … and {len(own) - SHOWN:,} more tokens", "dim")
    return text


def _first_choice(explanation: Explanation, token: int) -> int:
    weights = [0.0] * len(explanation.experts)
    for chosen, shares in zip(explanation.chosen, explanation.weights, strict=True):
        for expert, weight in zip(chosen[token], shares[token], strict=True):
            weights[expert] += weight
    return weights.index(max(weights))


def _table(explanation: Explanation) -> Table:
    table = Table("expert", box=None, pad_edge=False, header_style="dim")
    columns: list[dict[str, float]] = [explanation.shares.prompt, explanation.shares.everything]
    names = ["prompt", "everything"]
    if explanation.shares.answer is not None:
        columns, names = [columns[0], explanation.shares.answer, columns[1]], ["prompt", "answer", "everything"]
    for group in explanation.groups:
        names.append(f"{group.name} third")
        columns.append(group.shares.judged)
    for name in names:
        table.add_column(name, justify="right")
    for expert in sorted(explanation.experts, key=lambda name: -explanation.shares.judged[name]):
        cells = [f"{column[expert]:.0%}" for column in columns]
        table.add_row(Text(expert, _style(explanation, expert)), *cells)
    return table


def _why(explanation: Explanation) -> Text:
    text = Text("\n")
    if explanation.decided_by:
        text.append("where the lead rose: ", "dim")
        named = [f"{explanation.tokens[at.token].label!r} {at.rise:+.2f}" for at in explanation.decided_by]
        text.append(", ".join(named) + "\n")
    for opinion in explanation.opinions:
        sure = f" {opinion.probability:.0%}" if opinion.probability is not None else ""
        text.append(f"{opinion.channel}: ", "dim")
        text.append(opinion.expert, _style(explanation, opinion.expert))
        text.append(f"{sure} ({opinion.evidence}), ")
        text.append("agrees" if opinion.agrees else "disagrees", "green" if opinion.agrees else "yellow")
        text.append("\n")
    text.rstrip()
    return text
