"""Rollback: the gates of before are back with all that is said of them, a second time is forth again, and no step and
no interruption loses either."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fusion import kept_gates, road
from fusion.architecture import GATES_FILE, MANIFEST
from fusion.checkpoint import file_hash, read_json
from fusion.errors import UserError
from fusion.kept_gates import REPORTS, is_rolled_back
from fusion.recipe import Recipe
from fusion.steps import step_hash
from fusion.verify import verify
from tests.recipes import make_recipe

Change = Callable[[Recipe], Recipe]


def by(recipe: Recipe, method: str) -> Recipe:
    settings = recipe.gate_training.model_copy(update={"method": method})
    return recipe.model_copy(update={"gate_training": settings})


def state(recipe: Recipe) -> dict[str, str]:
    """Every file of the checkpoint and of the gates' reports, by its hash."""
    files = [*recipe.fused.iterdir(), *(recipe.folder / name for name in REPORTS)]
    return {path.name: file_hash(path) for path in files if path.is_file()}


@pytest.fixture
def merged(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> Recipe:
    recipe = make_recipe(tmp_path, anchor, anchored_experts, gate_training={"rows": 4, "held_out_rows": 4})
    road.merge(recipe)
    return by(recipe, "cross-entropy")


@pytest.fixture
def twice(merged: Recipe) -> tuple[Recipe, dict[str, str], dict[str, str]]:
    """A recipe whose gates have been trained by ridge, then by cross-entropy, and both states."""
    road.train_gates(by(merged, "ridge"))
    first = state(merged)
    road.train_gates(merged)
    return merged, first, state(merged)


def test_back_and_forth_again(twice: tuple[Recipe, dict[str, str], dict[str, str]]) -> None:
    recipe, first, second = twice
    assert all(first[name] != second[name] for name in (GATES_FILE, "gates.json", "gates.md"))
    evaluation = step_hash(road.evaluate_step(recipe))
    for _ in range(2):
        road.rollback(recipe)
        back = state(recipe)
        papers = {MANIFEST, "README.md", "recipe.yaml"}
        assert {name for name in first if back[name] != first[name]} <= papers
        assert read_json(recipe.fused / MANIFEST)["gates"]["method"] == "ridge" and is_rolled_back(recipe.fused)
        assert "trained by ridge" in (recipe.fused / "README.md").read_text()
        assert not verify(recipe.fused).problems
        assert step_hash(road.evaluate_step(recipe)) != evaluation
        road.rollback(recipe)
        assert state(recipe) == second and step_hash(road.evaluate_step(recipe)) == evaluation


@pytest.mark.parametrize("method", ["cross-entropy", "ridge", "regression"])
def test_they_stay_until_gates_are_trained_by_command(
    twice: tuple[Recipe, dict[str, str], dict[str, str]], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _, second = twice
    road.rollback(recipe)
    back = state(recipe)
    changed = by(recipe, method)
    capsys.readouterr()
    road.merge(changed)
    road.train_gates(changed)
    assert "rolled back, and so it stays" in capsys.readouterr().err
    assert state(recipe)[GATES_FILE] == back[GATES_FILE] and is_rolled_back(recipe.fused)
    road.train_gates(recipe, force=True)
    assert state(recipe) == second
    road.rollback(recipe)
    assert state(recipe)[GATES_FILE] == back[GATES_FILE]


def test_the_same_gates_again_are_no_others(twice: tuple[Recipe, dict[str, str], dict[str, str]]) -> None:
    recipe, first, _ = twice
    road.train_gates(recipe, force=True)
    road.rollback(recipe)
    assert state(recipe)[GATES_FILE] == first[GATES_FILE]


def test_one_set_is_kept(twice: tuple[Recipe, dict[str, str], dict[str, str]]) -> None:
    recipe, _, second = twice
    road.rollback(recipe)
    road.rollback(recipe)
    road.train_gates(by(recipe, "regression"), force=True)
    road.rollback(by(recipe, "regression"))
    assert state(recipe)[GATES_FILE] == second[GATES_FILE]


def test_killed_in_the_middle_nothing_has_happened(
    twice: tuple[Recipe, dict[str, str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, first, second = twice

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kept_gates, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        road.rollback(recipe)
    assert state(recipe) == second
    monkeypatch.undo()
    road.rollback(recipe)
    assert state(recipe)[GATES_FILE] == first[GATES_FILE]


def merged_only(recipe: Recipe) -> Recipe:
    return recipe


def trained_once(recipe: Recipe) -> Recipe:
    road.train_gates(recipe)
    return recipe


def merged_again(recipe: Recipe) -> Recipe:
    road.train_gates(by(recipe, "ridge"))
    road.train_gates(recipe)
    road.merge(recipe, force=True)
    road.train_gates(recipe)
    return recipe


def an_expert_less(recipe: Recipe) -> Recipe:
    road.train_gates(by(recipe, "ridge"))
    road.train_gates(recipe)
    return recipe.model_copy(update={"experts": recipe.experts[:2]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (merged_only, "the gates in .* are random ones"),
        (trained_once, r"no gates to go back to: .* since general, math, coding were merged"),
        (merged_again, "no gates to go back to"),
        (an_expert_less, r"has the experts general, math, coding, the recipe general, math: .* `qwen-fusion merge`"),
    ],
)
def test_what_cannot_be_taken_back_is_one_sentence(merged: Recipe, change: Change, words: str) -> None:
    recipe = change(merged)
    before = {path.name: file_hash(path) for path in recipe.fused.iterdir()}
    with pytest.raises(UserError, match=words):
        road.rollback(recipe)
    assert before == {path.name: file_hash(path) for path in recipe.fused.iterdir()}


def test_gates_of_other_weights_are_refused(twice: tuple[Recipe, dict[str, str], dict[str, str]]) -> None:
    recipe, _, second = twice
    path = next(recipe.folder.glob(f"kept-gates/*/{MANIFEST}"))
    text = path.read_text()
    path.unlink()  # it is a link
    path.write_text(text.replace(read_json(recipe.fused / MANIFEST)["sha256"]["shared.safetensors"], "0"))
    with pytest.raises(UserError, match="are of other weights than"):
        road.rollback(recipe)
    assert state(recipe) == second
