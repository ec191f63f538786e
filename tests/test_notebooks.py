"""The notebooks run from their first cell to their last, on a run of the demo's recipe with next to no training."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.test_road import finish, recipe

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SCREEN = 40  # lines of code that are read at once


def shows(source: str) -> bool:
    """Whether a cell says or draws something: it ends in a value, or in a loop that prints."""
    last = ast.parse(source).body[-1]
    return isinstance(last, ast.Expr | ast.For) and not source.endswith("close()")


@pytest.mark.timeout(1500)
def test_notebooks_run(tmp_path: Path) -> None:
    finish(recipe(tmp_path))
    environment = os.environ | {"QWEN_FUSION_RUN": str(tmp_path / "run")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", "--nbmake-timeout=600"]
    done = subprocess.run(
        [*command, *map(str, NOTEBOOKS)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.lstrip().startswith("." * len(NOTEBOOKS)), done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_keep_their_outputs_and_are_read_as_articles(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown"
    assert max(len(cell.source.split("\n")) for cell in code) <= SCREEN
    assert all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert all(cell.outputs for cell in code if shows(cell.source))
    if not path.name.startswith("03"):  # which is about texts
        assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert len(notebook.cells) - len(code) >= len(code) // 2
