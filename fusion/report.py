"""report.md: what a run made and how good it is, with its pictures."""

from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

from fusion.architecture import MANIFEST
from fusion.checkpoint import read_json, write_text
from fusion.evaluation.table import markdown
from fusion.progress import console
from fusion.recipe import Recipe


def write_report(recipe: Recipe) -> Path:
    """Writes report.md into the recipe's output folder from what its steps left there; prints table and answers."""
    folder = recipe.folder
    table = markdown(read_json(folder / "evaluation.json"))
    answers = answers_markdown(read_json(folder / "answers.json"))
    manifest = read_json(recipe.fused / MANIFEST)
    experts = ", ".join(
        f"{row['name']} ({'anchored' if row['anchored'] else 'drifted'})" for row in manifest["experts"]
    )
    text = "\n".join(
        [
            f"# {recipe.name}",
            "",
            f"Fused on {date.today()} with qwen-fusion {version('qwen-fusion')}. Experts: {experts}.",
            "",
            "## Evaluation",
            "",
            table,
            "",
            "![Which expert each domain's tokens go to](routing.png)",
            "",
            "## Gates",
            "",
            (folder / "gates.md").read_text(encoding="utf-8"),
            "![Routing accuracy by layer](gates.png)",
            "",
            *(["## Healing", "", (folder / "healing.md").read_text(encoding="utf-8")] if "healed" in manifest else []),
            "## Answers",
            "",
            answers,
        ]
    )
    write_text(folder / "report.md", text)
    console.print(Markdown(table))
    console.print(Markdown(answers))
    console.print(f"report: {folder / 'report.md'}", highlight=False)
    return folder / "report.md"


def answers_markdown(answers: list[dict[str, Any]]) -> str:
    """Sample questions with answers and the experts that served them."""
    lines = []
    for row in answers:
        kind = " (JSON schema)" if row["json_schema"] else ""
        lines += [
            f"**{row['domain'] or 'question'}{kind}**: {row['question']}",
            "",
            "```",
            row["answer"],
            "```",
            f"served by {experts_line(row['experts'])}; {row['attempts']} attempt(s), "
            f"{row['completion_tokens']} tokens, {row['seconds']:.1f} s",
            "",
        ]
    return "\n".join(lines)


def experts_line(shares: dict[str, float]) -> str:
    """The experts by their share of an answer's tokens, the largest first, those under 1% left out."""
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ranked if share >= 0.01)
