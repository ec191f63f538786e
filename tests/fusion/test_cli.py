"""The command line: a user's mistake is one sentence and exit code 2, and leaves nothing behind."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.cli import main
from tests.recipes import recipe_data

VERBS = ("run", "branch", "plan", "merge", "train-gates", "evaluate", "serve", "ask")
ANCHORING = {"method": "text", "data": {"generated": "demo.math"}}
BRANCH = {"data": {"generated": "demo.math"}}


@dataclass(frozen=True)
class Outcome:
    """How a call of the command line ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


def in_child(*arguments: object) -> Outcome:
    """Runs the command line as a user does."""
    command = [sys.executable, "-m", "fusion.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in this process, which has imported torch already; an exception fails the test."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["qwen-fusion", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return Outcome(int(caught.value.code or 0), *capfd.readouterr())

    return call


def write_recipe(folder: Path, anchor: Path, expert: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A recipe of two experts, the second with the fields of `expert` on top (None takes a field away)."""
    data = recipe_data(folder, anchor, {"general": anchor, "math": anchor}, **sections)
    math = {**data["experts"][1], **(expert or {})}
    data["experts"][1] = {key: value for key, value in math.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def refused(call: Call, folder: Path, *arguments: object) -> tuple[str, list[str]]:
    """The one sentence of a command that fails by the user's mistake and leaves nothing, and what it printed before."""
    before = set(folder.rglob("*"))
    outcome = call(*arguments)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    *head, last = outcome.err.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in head if line.startswith("error: ")]
    left = {path.relative_to(folder).as_posix() for path in set(folder.rglob("*")) - before}
    assert left <= {"run", "run/steps.json"}
    return last, head


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(here: Call, verb: str) -> None:
    outcome = here(verb, "--help")
    assert outcome.code == 0, outcome.err
    assert "RECIPE" in outcome.out
    assert "--set" in outcome.out


def test_the_help_lists_every_verb() -> None:
    outcome = in_child("--help")
    assert outcome.code == 0
    assert all(verb in outcome.out for verb in VERBS)


def test_a_recipe_that_does_not_exist(here: Call, tmp_path: Path) -> None:
    sentence, head = refused(here, tmp_path, "run", tmp_path / "none.yaml")
    assert "none.yaml does not exist" in sentence
    assert not head


def test_a_key_that_the_schema_lacks(tmp_path: Path, anchor: Path) -> None:
    path = write_recipe(tmp_path, anchor, {"colour": "red"})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "colour" in text)
    sentence, head = refused(in_child, tmp_path, "plan", path)
    assert sentence == f"error: {path}, line {line}: experts.1.colour: unknown key"
    assert not head


def test_an_override_that_does_not_fit(here: Call, tmp_path: Path, anchor: Path) -> None:
    sentence, head = refused(here, tmp_path, "plan", write_recipe(tmp_path, anchor), "--set", "routing.top_k=none")
    assert sentence.startswith("error: --set routing.top_k=none: routing.top_k: ")
    assert not head


@pytest.mark.parametrize("verb", ["plan", "merge", "run"])
def test_a_model_folder_that_does_not_exist(here: Call, tmp_path: Path, anchor: Path, verb: str) -> None:
    path = write_recipe(tmp_path, anchor, {"model": str(tmp_path / "nowhere")})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text == "- name: math")
    sentence, head = refused(here, tmp_path, verb, path)
    assert sentence.startswith(f"error: {path}, line {line}: expert 'math': model '")
    assert "nowhere' is neither a folder nor a hub id" in sentence
    assert not head


def test_merging_before_branching(tmp_path: Path, anchor: Path) -> None:
    path = write_recipe(tmp_path, anchor, {"model": None, "branch": BRANCH})
    sentence, _ = refused(in_child, tmp_path, "merge", path)
    assert "run `qwen-fusion branch`" in sentence


@pytest.mark.parametrize("verb", ["train-gates", "evaluate", "serve"])
def test_what_comes_after_the_merge_asks_for_it(here: Call, tmp_path: Path, anchor: Path, verb: str) -> None:
    sentence, head = refused(here, tmp_path, verb, write_recipe(tmp_path, anchor))
    assert "does not exist yet: run `qwen-fusion" in sentence
    assert not head


def test_asking_before_the_merge(here: Call, tmp_path: Path, anchor: Path) -> None:
    sentence, head = refused(here, tmp_path, "ask", write_recipe(tmp_path, anchor), "Who are you?")
    assert "does not exist yet: run `qwen-fusion" in sentence
    assert not head


@pytest.mark.parametrize("verb", ["plan", "merge", "run"])
def test_a_teacher_that_cannot_be_had(here: Call, tmp_path: Path, anchor: Path, verb: str) -> None:
    path = write_recipe(tmp_path, anchor, {"anchor": {**ANCHORING, "teacher": "./nobody"}})
    sentence, _ = refused(here, tmp_path, verb, path)
    assert "expert 'math': its teacher: model './nobody' is neither a folder nor a hub id" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ask", "RECIPE", "Who?", "--max-tokens", "0"), "'--max-tokens'"),
        (("ask", "RECIPE"), "'question'"),
        (("plan", "RECIPE", "--colour"), "--colour"),
        (("melt", "RECIPE"), "melt"),
    ],
)
def test_a_wrong_command_line(here: Call, tmp_path: Path, anchor: Path, arguments: tuple[str, ...], words: str) -> None:
    path = write_recipe(tmp_path, anchor)
    sentence, head = refused(here, tmp_path, *(path if word == "RECIPE" else word for word in arguments))
    assert words in sentence
    assert not head


@pytest.mark.parametrize("content", ["true", "[]", '{"type": "nonsense"}', "not json"])
def test_a_file_that_is_no_schema(here: Call, tmp_path: Path, anchor: Path, content: str) -> None:
    path, schema = write_recipe(tmp_path, anchor), tmp_path / "schema.json"
    schema.write_text(content, encoding="utf-8")
    sentence, head = refused(here, tmp_path, "ask", path, "Who?", "--schema", schema)
    assert "schema.json" in sentence
    assert not head


def test_an_expert_that_is_not_to_be_trained(here: Call, tmp_path: Path, anchor: Path) -> None:
    sentence, _ = refused(here, tmp_path, "branch", write_recipe(tmp_path, anchor), "--expert", "math")
    assert "no expert 'math' with a 'branch' section" in sentence


def test_a_truncated_expert(here: Call, tmp_path: Path, anchor: Path) -> None:
    broken = Path(shutil.copytree(anchor, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    sentence, _ = refused(here, tmp_path, "merge", write_recipe(tmp_path, anchor, {"model": str(broken)}))
    assert f"{weights} cannot be read" in sentence


def test_random_gates_are_not_evaluated_as_trained_ones(here: Call, tmp_path: Path, anchor: Path) -> None:
    path = write_recipe(tmp_path, anchor)
    assert here("merge", path, "--quiet").code == 0
    sentence, _ = refused(here, tmp_path, "evaluate", path)
    assert "are random ones: run `qwen-fusion train-gates`" in sentence
    assert here("train-gates", path, "--quiet").code == 0
    assert "trained by cross-entropy" in (tmp_path / "run" / "fused" / "README.md").read_text(encoding="utf-8")


def test_a_port_in_use(here: Call, tmp_path: Path, anchor: Path) -> None:
    path = write_recipe(tmp_path, anchor)
    assert here("merge", path, "--quiet").code == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sentence, _ = refused(here, tmp_path, "serve", path, "--port", taken.getsockname()[1])
    assert "port" in sentence


def test_a_plan_is_json_on_request(here: Call, tmp_path: Path, anchor: Path) -> None:
    outcome = here("plan", write_recipe(tmp_path, anchor), "--json", "-")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["findings"] == []
    assert plan["budget"]["parameters"] > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("shared=foo", "'regmean' or 'auto'"),
        ("output=''", "output: String should have at least 1 character"),
        ("domains.math.fallback=zzz", "falls back to 'zzz', which 'domains' does not have"),
        ("gate_training.classifier=x/y", "it labels nothing with gate_training.labels 'data'"),
        ("output=/proc/x", "output: /proc/x cannot be created: name another folder"),
        ("experts.math.model=nowhere", "expert 'math': model 'nowhere' is neither a folder nor a hub id"),
        (
            "gate_training={labels: combined, classifier: nowhere}",
            "gate_training.classifier: model 'nowhere' is neither",
        ),
    ],
)
def test_the_plan_refuses_and_names_the_override(
    here: Call, tmp_path: Path, anchor: Path, override: str, said: str
) -> None:
    sentence, head = refused(here, tmp_path, "plan", write_recipe(tmp_path, anchor), "--set", override)
    assert sentence.startswith(f"error: --set {override}: ")
    assert said in sentence
    assert not head
