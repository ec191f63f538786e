"""Fixtures of this room."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def other(tmp_path: Path, anchor: Path) -> Path:
    """A copy of the anchor that a test may change."""
    return Path(shutil.copytree(anchor, tmp_path / "other"))
