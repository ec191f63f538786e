"""Fixtures shared by all rooms."""

import os
from pathlib import Path

import pytest

from tests.families import write_model

os.environ["QWEN_FUSION_FLOAT32"] = "1"  # what tests compare to the last digits, in other processes as well

DOMAINS = ("general", "math", "coding")


@pytest.fixture(scope="session")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random anchor."""
    return write_model(tmp_path_factory.mktemp("anchor") / "model", seed=1)


@pytest.fixture(scope="session")
def anchored_experts(tmp_path_factory: pytest.TempPathFactory, anchor: Path) -> dict[str, Path]:
    """Three experts that are the anchor outside their MLPs."""
    folder = tmp_path_factory.mktemp("anchored")
    return {name: write_model(folder / name, seed=10 + i, anchor=anchor) for i, name in enumerate(DOMAINS)}


@pytest.fixture(scope="session")
def drifted_experts(tmp_path_factory: pytest.TempPathFactory, anchor: Path) -> dict[str, Path]:
    """Three experts that have moved in every tensor."""
    folder = tmp_path_factory.mktemp("drifted")
    return {name: write_model(folder / name, seed=20 + i, anchor=anchor, drift=True) for i, name in enumerate(DOMAINS)}
