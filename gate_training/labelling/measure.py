"""How often the label channels are right on questions whose words point to the wrong domain (confusing.yaml).

    python -m gate_training.labelling.measure configs/qwen2.5-0.5b-two-experts.yaml

The classifier learns the questions of the recipe's training rows. Likelihood, where the recipe's fused model exists,
goes by the questions themselves, which have no answers, and is right with the domain's expert. Prints a table, every
error of the combination, and one JSON object.
"""

import json
from importlib.resources import files
from pathlib import Path

import yaml

from fusion.data import chat, train_rows
from fusion.errors import run_main
from fusion.progress import quiet_libraries
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe
from gate_training.labelling.classifier import recipe_classifier
from gate_training.labelling.combine import label_questions
from gate_training.labelling.likelihood import answer_labels

quiet_libraries()


def confusing_questions(recipe: Recipe) -> list[tuple[str, str]]:
    """(domain, question) of the shipped set, as far as the recipe has the domain."""
    text = files("gate_training.labelling").joinpath("confusing.yaml").read_text(encoding="utf-8")
    return [(domain, question) for domain, question in yaml.safe_load(text)["questions"] if domain in recipe.domains]


def measure(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Shares right of each channel: {channel: {domain: share, "all": share}}; prints them and the errors."""
    wanted = confusing_questions(recipe)
    questions = [question for _, question in wanted]
    settings = recipe.gate_training
    classify = recipe_classifier(recipe, train_rows(recipe, settings.rows, settings.seed))
    channels = {
        "rules": label_questions(questions, recipe.domains, None),
        "classifier": label_questions(questions, recipe.domains, classify, rules_first=False),
        "combined": label_questions(questions, recipe.domains, classify),
    }
    right = {
        name: [found.domain == domain for found, (domain, _) in zip(labels, wanted, strict=True)]
        for name, labels in channels.items()
    }
    if (recipe.fused / "config.json").is_file():
        liked = answer_labels(recipe, recipe.fused, [chat("", question, domain) for domain, question in wanted])
        right["likelihood"] = [domain in found.serves for found, (domain, _) in zip(liked, wanted, strict=True)]
    shares = {name: _shares([domain for domain, _ in wanted], hits) for name, hits in right.items()}
    for (domain, question), label in zip(wanted, channels["combined"], strict=True):
        if label.domain != domain:
            print(f"{domain}, labelled {label.domain} ({label.evidence}): {question}")
    for name, row in shares.items():
        print(f"{name}: " + ", ".join(f"{domain} {share:.2f}" for domain, share in row.items()))
    disputed = sum(label.disputed for label in channels["combined"]) / len(wanted)
    print(f"rules and classifier disagree on {disputed:.0%} of {len(wanted)} questions")
    return shares


def _shares(wanted: list[str], hits: list[bool]) -> dict[str, float]:
    of = {name: [hit for hit, domain in zip(hits, wanted, strict=True) if domain == name] for name in wanted}
    return {**{name: sum(row) / len(row) for name, row in of.items()}, "all": sum(hits) / len(hits)}


def main(path: str, *overrides: str) -> None:
    """Prints what the channels of the recipe at `path` say of the shipped set."""
    print(json.dumps(measure(load_recipe(Path(path), list(overrides)))))


if __name__ == "__main__":
    run_main(main)
