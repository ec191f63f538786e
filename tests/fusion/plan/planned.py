"""What the tests of sizes and capacity share: shipped recipes with their models' recorded facts, and profiles."""

from pathlib import Path
from typing import Any

from fusion.plan.budget import Weight, model_weights, planned_config
from fusion.plan.models import known
from fusion.plan.profile import HardwareProfile, load_profile
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe

CONFIGS = Path(__file__).parents[3] / "configs"
FIVE, TWO = "qwen2.5-7b-five-experts", "qwen2.5-7b-two-experts"


def shipped(name: str = FIVE, *overrides: str) -> tuple[Recipe, dict[str, Any]]:
    """A shipped recipe and the recorded config of its anchor, whatever this machine has."""
    recipe = load_recipe(CONFIGS / f"{name}.yaml", list(overrides))
    config = known(str(recipe.anchor.model)).config
    assert config is not None
    return recipe, config


def fused(recipe: Recipe, anchor_config: dict[str, Any]) -> tuple[dict[str, Any], list[Weight]]:
    """The fused model's config and weights."""
    config = planned_config(recipe, anchor_config)
    return config, model_weights(config)


def profile(name: str = "4x4090d", **changes: Any) -> HardwareProfile:
    """A shipped profile, with other figures where they are given."""
    return load_profile(name, CONFIGS).model_copy(update=changes)
