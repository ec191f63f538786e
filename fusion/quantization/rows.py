"""The rows that calibrate and judge a quantised model, as token ids: the other environment knows nothing of recipes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusion.checkpoint import read_json
from fusion.encoding import encode, load_tokenizer
from fusion.evaluation.evaluate import held_out_rows
from fusion.recipe import Recipe
from gate_training.examples import expert_labels, routing_examples

CALIBRATION_ROWS = 128  # of every domain, at most; GPTQ's own experiments use 128 texts in all


def calibration_rows(recipe: Recipe, checkpoint: Path) -> list[dict[str, Any]]:
    """Routing examples of every domain, each with the number of its expert: [{"ids", "expert"}]."""
    settings, tokenizer = recipe.gate_training, load_tokenizer(checkpoint)
    examples = routing_examples(recipe, "train", min(settings.rows, CALIBRATION_ROWS), checkpoint)
    encoded = [encode(tokenizer, row.example, settings.max_length) for row in examples]
    labels = expert_labels(recipe, examples)
    return [{"ids": row.ids, "expert": label} for row, label in zip(encoded, labels, strict=True)]


def comparison_rows(recipe: Recipe, checkpoint: Path) -> list[dict[str, Any]]:
    """The rows that `evaluate` judges by: [{"domain", "ids", "answer_start"}]."""
    tokenizer, limit = load_tokenizer(checkpoint), read_json(checkpoint / "config.json")["max_position_embeddings"]
    names = sorted(recipe.domains, key=recipe.expert_of)
    found = []
    for domain, rows in held_out_rows(recipe, names).items():
        encoded = [encode(tokenizer, row, limit) for row in rows]
        found += [{"domain": domain, **asdict(row)} for row in encoded if row.answer_start < len(row.ids)]
    return found


def tokens_seen(
    seen: dict[str, list[list[int]]], recipe: Recipe, calibration: list[dict[str, Any]]
) -> dict[str, dict[str, int]]:
    """What every expert was calibrated on: its own domains' tokens, and of the layer with the fewest, those that the
    gates sent it and all that it saw.

    `seen`: {layer's experts: [routed tokens by expert, further tokens of the expert's own domains]}.
    """
    own = [sum(len(row["ids"]) for row in calibration if row["expert"] == i) for i in range(len(recipe.experts))]
    return {
        expert.name: {
            "own_domain": own[index],
            "routed_at_least": min(routed[index] for routed, _ in seen.values()),
            "seen_at_least": min(routed[index] + further[index] for routed, further in seen.values()),
        }
        for index, expert in enumerate(recipe.experts)
    }
