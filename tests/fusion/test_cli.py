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

VERBS = (
    *("run", "branch", "plan", "merge", "train-gates", "rollback", "evaluate"),
    *("benchmark", "serve", "ask", "explain"),
)
ANCHORING = {"method": "text", "data": {"generated": "demo.math"}}
BRANCH = {"data": {"generated": "demo.math"}}
SERVING = {"max_model_len": 256, "sampling": {"max_tokens": 32}}


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
    assert verb == "plan" or head[0].startswith("plan of test: 1 error")  # `plan` itself prints to standard output


def test_merging_before_branching(tmp_path: Path, anchor: Path) -> None:
    path = write_recipe(tmp_path, anchor, {"model": None, "branch": BRANCH})
    sentence, _ = refused(in_child, tmp_path, "merge", path)
    assert "run `qwen-fusion branch`" in sentence


@pytest.mark.parametrize("verb", ["train-gates", "rollback", "evaluate", "serve"])
def test_what_comes_after_the_merge_asks_for_it(here: Call, tmp_path: Path, anchor: Path, verb: str) -> None:
    sentence, head = refused(here, tmp_path, verb, write_recipe(tmp_path, anchor))
    assert "does not exist yet: run `qwen-fusion" in sentence
    assert not head


@pytest.mark.parametrize("verb", ["ask", "explain"])
def test_asking_before_the_merge(here: Call, tmp_path: Path, anchor: Path, verb: str) -> None:
    sentence, head = refused(here, tmp_path, verb, write_recipe(tmp_path, anchor), "Who are you?")
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


def test_random_gates_are_not_taken_for_trained_ones(here: Call, tmp_path: Path, anchor: Path) -> None:
    path, html = write_recipe(tmp_path, anchor), tmp_path / "out.html"
    assert here("merge", path, "--quiet").code == 0
    for arguments in (("evaluate", path), ("explain", path, "Who?", "--html", html)):
        sentence, _ = refused(here, tmp_path, *arguments)
        assert "are random ones: run `qwen-fusion train-gates`" in sentence
    assert here("train-gates", path, "--quiet").code == 0
    assert "trained by cross-entropy" in (tmp_path / "run" / "fused" / "README.md").read_text(encoding="utf-8")
    outcome = here("explain", path, "Who?", "--html", html, "--json", "-")
    assert outcome.code == 0 and " of the prompt" in outcome.err
    assert json.loads(outcome.out)["tokens"][6]["text"] == "W"
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((" ",), "the prompt is empty"),
        ((), "give a prompt, or --file with one"),
        (("Who?", "--file", "prompt.txt"), "give a prompt, or --file with one"),
        (("--file", "none.txt"), "none.txt does not exist"),
        (("--file", "empty.txt"), "empty.txt is empty"),
        (("--file", "latin.txt"), "latin.txt is not UTF-8 text (byte 1)"),
        (("--file", "other.json"), "other.json is no conversation"),
        (("--file", "two.jsonl"), "two.jsonl is no conversation (Extra data"),
        (("--file", "answer.json"), "answer.json has no user message"),
        (("--file", "whole.json", "--with-answer"), "whole.json has an answer already"),
        (("Who?", "--html", "nowhere/out.html"), "--html nowhere/out.html: no such place for a file"),
        (("Who?", "--json", "nowhere/out.json"), "--json nowhere/out.json: no such place for a file"),
    ],
)
def test_what_cannot_be_explained(
    here: Call, tmp_path: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    user, answer = ({"role": role, "content": "1"} for role in ("user", "assistant"))
    files = {"prompt.txt": b"Who?", "empty.txt": b" \n", "latin.txt": "M\u00fcnchen".encode("latin-1")}
    files["other.json"] = b'{"prompt": "Who?"}'
    files["two.jsonl"] = 2 * (json.dumps({"messages": [user]}).encode() + b"\n")
    files["answer.json"] = json.dumps({"messages": [answer]}).encode()
    files["whole.json"] = json.dumps({"messages": [user, answer]}).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    path = write_recipe(tmp_path, anchor)
    monkeypatch.chdir(tmp_path)
    sentence, head = refused(here, tmp_path, "explain", path, *arguments)
    assert words in sentence
    assert not head


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
    assert plan["machine"]["cpu_cores"] > 0
    assert not (tmp_path / "run").exists()


def test_the_target_is_planned_without_any_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = Path(__file__).parents[2] / "configs" / "qwen2.5-7b-five-experts.yaml"
    outcome = in_child("plan", recipe, "--hardware", "4x4090d", "--json", "-", "--set", f"output={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert "30.43B parameters" in outcome.err
    assert "15.2 GB a card" in outcome.err
    assert "planned from recorded facts of Qwen/Qwen2.5-7B-Instruct" in outcome.err
    plan = json.loads(outcome.out)
    assert plan["budget"]["parameters"] == 30_429_038_080
    (row,) = [row for row in plan["capacity"] if row["weight_format"] == "bfloat16"]
    assert row["weights"] == plan["budget"]["bytes_per_card"] == 15_215_728_640
    assert f"{row['kv_tokens']:,}" in outcome.err
    assert plan["served_format"] == "bfloat16"
    assert {"hardware", "card_weights", "alternatives", "estimate"} <= plan.keys()
    assert {finding["severity"] for finding in plan["findings"]} == {"note", "warning"}


def test_a_plan_with_errors_is_printed_and_written_whole_before_it_fails(
    here: Call, tmp_path: Path, anchor: Path
) -> None:
    target, path = tmp_path / "plan.json", write_recipe(tmp_path, anchor, {"license": "cc-by-nc-4.0"})
    overrides = ("routing.moe_layers=[99]", "experts.general.model=nowhere")
    outcome = here("plan", path, "--json", target, *(part for key in overrides for part in ("--set", key)))
    assert outcome.code == 2
    plan = json.loads(target.read_text(encoding="utf-8"))
    kinds = [finding["severity"] for finding in plan["findings"]]
    assert kinds == sorted(kinds, key=["error", "warning", "note"].index)
    assert kinds.count("error") == 2
    for finding in plan["findings"]:
        assert set(finding) == {"severity", "where", "what", "why", "fix"}
        assert finding["what"] in outcome.out
    (last,) = outcome.err.splitlines()
    assert last.startswith("error: --set ")
    assert plan["findings"][0]["what"] in last


def test_weights_are_measured_on_request(
    here: Call, tmp_path: Path, anchor: Path, drifted_experts: dict[str, Path]
) -> None:
    path = write_recipe(tmp_path, anchor, {"model": str(drifted_experts["math"])})
    outcome = here("plan", path, "--weights", "--json", "-", "--quiet")
    plan = json.loads(outcome.out)
    assert outcome.code == 0, outcome.err
    assert set(plan["drift"]["experts"]) == {"general", "math"}
    assert (tmp_path / "run" / "drift" / "drift.json").is_file()


def test_weights_that_are_not_here_cannot_be_measured_but_the_plan_is_written(
    here: Call, tmp_path: Path, anchor: Path
) -> None:
    target, trained = tmp_path / "plan.json", "anchor={pretrain: {data: {generated: demo.anchor}}}"
    path = write_recipe(tmp_path, anchor, {"model": None, "branch": BRANCH})
    outcome = here("plan", path, "--weights", "--json", target, "--set", trained)
    assert outcome.code == 2
    assert json.loads(target.read_text(encoding="utf-8"))["budget"]["parameters"] > 0
    assert "which the recipe trains, are not on this machine" in outcome.err.splitlines()[-1]


def test_an_unknown_machine_is_one_sentence(here: Call, tmp_path: Path, anchor: Path) -> None:
    sentence, head = refused(here, tmp_path, "plan", write_recipe(tmp_path, anchor), "--hardware", "abacus")
    assert "no hardware profile is called 'abacus': there are 24gb, 4x4090d, cpu, h200" in sentence
    assert not head


def test_a_split_that_cannot_be_says_nothing_of_cards(here: Call, tmp_path: Path, anchor: Path) -> None:
    path = write_recipe(tmp_path, anchor, routing={"top_k": 1}, serving={**SERVING, "tensor_parallel_size": 2})
    outcome = here("plan", path, "--hardware", "24gb", "--json", "-")
    assert outcome.code == 2
    plan = json.loads(outcome.out)
    assert "2 ways need as many cards, RTX 4090 has 1" in plan["findings"][0]["what"]
    assert "capacity" not in plan
    assert here("plan", path, "--hardware", "4x4090d").code == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("shared=foo", "'regmean' or 'auto'"),
        ("output=''", "output: String should have at least 1 character"),
        ("domains.math.fallback=zzz", "falls back to 'zzz', which 'domains' does not have"),
        ("gate_training.classifier=x/y", "it labels nothing with gate_training.labels 'data'"),
        ("output=/proc/x", "output: /proc/x cannot be created; name another folder"),
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
    assert not head or head[0].startswith("plan of test: 1 error")  # of what is read before it, nothing
