"""A tiny fused checkpoint and its recipe, shared by all that fit or refine gates."""

import shutil
from pathlib import Path

import pytest

from fusion.merge import merge
from fusion.recipe import Recipe
from tests.recipes import SETTINGS, make_recipe


@pytest.fixture(scope="package")
def merged(tmp_path_factory: pytest.TempPathFactory, anchor: Path, anchored_experts: dict[str, Path]) -> Path:
    """A fused checkpoint with random gates; read only."""
    return merge(make_recipe(tmp_path_factory.mktemp("merged"), anchor, anchored_experts))


@pytest.fixture
def recipe(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> Recipe:
    return make_recipe(tmp_path, anchor, anchored_experts, gate_training=SETTINGS)


@pytest.fixture
def folder(recipe: Recipe, merged: Path) -> Path:
    """The recipe's own copy of the fused checkpoint."""
    return Path(shutil.copytree(merged, recipe.fused))
