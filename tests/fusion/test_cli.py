"""The command line in a child process: a user's mistake is one sentence and exit code 2, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recipes import recipe_data

VERBS = ("run", "branch", "plan", "merge", "train-gates", "evaluate", "serve", "ask")
ANCHORING = {"method": "logits", "data": {"generated": "demo.math"}}
BRANCH = {"data": {"generated": "demo.math"}}


def qwen_fusion(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "QWEN_FUSION_QUIET": "1", "COLUMNS": "300"}
    command = [sys.executable, "-m", "fusion.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)


def write_recipe(folder: Path, anchor: Path, expert: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A recipe of two experts, the second with the fields of `expert` on top (None takes a field away)."""
    data = recipe_data(folder, anchor, {"general": anchor, "math": anchor}, **sections)
    math = {**data["experts"][1], **(expert or {})}
    data["experts"][1] = {key: value for key, value in math.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def refused(folder: Path, *arguments: object) -> tuple[str, list[str]]:
    """Runs the command, checks that it fails as a user's mistake does, and returns the sentence and what came before."""
    before = sorted(folder.rglob("*"))
    done = qwen_fusion(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    *head, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in head if line.startswith("error: ")]
    left = [path for path in sorted(folder.rglob("*")) if path not in before]
    assert [path.name for path in left if path.is_dir() or path.name != "steps.json"] in ([], ["run"]), left
    return last, head


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = qwen_fusion(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "RECIPE" in done.stdout
    assert "--set" in done.stdout


def test_the_help_lists_every_verb() -> None:
    done = qwen_fusion("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    sentence, head = refused(tmp_path, "run", tmp_path / "none.yaml")
    assert "none.yaml does not exist" in sentence
    assert not head


def test_a_key_that_the_schema_lacks(tmp_path: Path, anchor: Path) -> None:
    path = write_recipe(tmp_path, anchor, {"colour": "red"})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "colour" in text)
    sentence, head = refused(tmp_path, "plan", path)
    assert sentence == f"error: {path}, line {line}: experts.1.colour: unknown key"
    assert not head


def test_an_override_that_does_not_fit(tmp_path: Path, anchor: Path) -> None:
    sentence, head = refused(tmp_path, "plan", write_recipe(tmp_path, anchor), "--set", "routing.top_k=none")
    assert sentence.startswith("error: --set routing.top_k=none: routing.top_k: ")
    assert not head


@pytest.mark.parametrize("verb", ["plan", "merge", "run"])
def test_a_model_folder_that_does_not_exist(tmp_path: Path, anchor: Path, verb: str) -> None:
    path = write_recipe(tmp_path, anchor, {"model": str(tmp_path / "nowhere")})
    sentence, head = refused(tmp_path, verb, path)
    assert "nowhere' is neither a folder nor a hub id" in sentence
    assert not head


def test_merging_before_branching(tmp_path: Path, anchor: Path) -> None:
    sentence, _ = refused(tmp_path, "merge", write_recipe(tmp_path, anchor, {"model": None, "branch": BRANCH}))
    assert "run `qwen-fusion branch`" in sentence


@pytest.mark.parametrize("verb", ["train-gates", "evaluate", "serve"])
def test_what_comes_after_the_merge_asks_for_it(tmp_path: Path, anchor: Path, verb: str) -> None:
    sentence, head = refused(tmp_path, verb, write_recipe(tmp_path, anchor))
    assert "does not exist yet: run `qwen-fusion" in sentence
    assert not head


@pytest.mark.parametrize("verb", ["merge", "run"])
def test_an_expert_that_needs_anchoring(tmp_path: Path, anchor: Path, verb: str) -> None:
    sentence, _ = refused(tmp_path, verb, write_recipe(tmp_path, anchor, {"anchor": ANCHORING}))
    assert "expert 'math' has an 'anchor' section, which this version cannot carry out yet" in sentence


def test_an_expert_that_does_not_exist_cannot_be_branched(tmp_path: Path, anchor: Path) -> None:
    sentence, _ = refused(tmp_path, "branch", write_recipe(tmp_path, anchor), "--expert", "math")
    assert "no expert 'math' with a 'branch' section" in sentence


def test_a_plan_is_json_on_request(tmp_path: Path, anchor: Path) -> None:
    done = qwen_fusion("plan", write_recipe(tmp_path, anchor), "--json", "-")
    assert done.returncode == 0, done.stderr
    plan = yaml.safe_load(done.stdout)
    assert plan["findings"] == []
    assert plan["budget"]["parameters"] > 0
    assert not (tmp_path / "run").exists()
