"""Small recipes for tests, built from Python so that each test names only what it is about."""

import json
from pathlib import Path
from typing import Any

from fusion.recipe import Recipe

QUESTIONS = {
    "general": ["Who lives here?", "What is the sky?", "Tell me a story.", "Where is home?"],
    "math": ["1+2=", "3*4=", "10-7=", "8/2="],
    "coding": ["def f(x): return", "class A: pass", "import os", "for i in x:"],
}
SETTINGS = {"rows": 4, "held_out_rows": 3, "batch_tokens": 128}  # of gate_training, where little is to be fitted


def write_rows(folder: Path, domain: str) -> Path:
    """A file of chat rows for one domain of QUESTIONS."""
    path = folder / f"{domain}.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{domain} {i}"}]}
        for i, q in enumerate(QUESTIONS[domain])
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def recipe_data(folder: Path, anchor: Path, experts: dict[str, Path], **sections: Any) -> dict[str, Any]:
    """A recipe's raw form: `experts` maps a domain of QUESTIONS to a model folder."""
    sources = {name: {"path": str(write_rows(folder, name))} for name in experts}
    return {
        "name": "test",
        "output": str(folder / "run"),
        "anchor": {"model": str(anchor)},
        "experts": [{"name": name, "domain": name, "model": str(path)} for name, path in experts.items()],
        "domains": {name: {"train": source, "held_out": source} for name, source in sources.items()},
        "gate_training": {"rows": 4, "held_out_rows": 4},
        "serving": {"max_model_len": 256, "sampling": {"max_tokens": 32}},
        **sections,
    }


def make_recipe(folder: Path, anchor: Path, experts: dict[str, Path], **sections: Any) -> Recipe:
    """`recipe_data` as a Recipe."""
    return Recipe.model_validate(recipe_data(folder, anchor, experts, **sections))


def with_settings(recipe: Recipe, **changes: object) -> Recipe:
    """The recipe with other `gate_training` settings."""
    return recipe.model_copy(update={"gate_training": recipe.gate_training.model_copy(update=changes)})
