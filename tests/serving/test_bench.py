"""The benchmark's parts: requests with answers that are judged as they should be, a stub, a load that counts."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from serving.bench.calls import Call, calls, hard_calls, normalised
from serving.bench.load import measure
from serving.bench.stub import DOCUMENT, SCHEMA
from serving.bench.validity import Kept, Outcome
from serving.guard.schema import Checker
from tests.serving import fake_engine
from tests.serving.test_asgi import Start
from tests.serving.upstream import Status, completion


def test_bfcls_types_become_json_schemas() -> None:
    given = {
        "type": "dict",
        "properties": {
            "type": {"type": "string", "default": "x"},  # a parameter of that name
            "pair": {"type": "tuple", "items": {"type": "float"}},
            "free": {"type": "any"},
        },
        "required": ["pair"],
    }
    found = normalised(given)
    assert found == {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "pair": {"type": "array", "items": {"type": "number"}},
            "free": {},
        },
        "required": ["pair"],
    }
    assert Checker(found).violations({"pair": [1, 2.5]}) == []


def bfcl(folder: Path) -> Path:
    """A folder of one call, as BFCL has them."""
    function = {"name": "f", "description": "Does it.", "parameters": {"type": "dict", "properties": {}}}
    row = {"id": "a", "question": [[{"role": "user", "content": "Do it."}]], "function": [function]}
    truth = {
        "id": "a",
        "ground_truth": [
            {"f": {"city": ["Paris", "paris, France"], "n": [2, ""], "at": [{"x": [1.0], "y": 0.5}, {"x": [1.0]}]}}
        ],
    }
    (folder / "possible_answer").mkdir()
    for name in ("simple", "multiple"):
        (folder / f"BFCL_v4_live_{name}.json").write_text(json.dumps(row) + "\n")
        (folder / "possible_answer" / f"BFCL_v4_live_{name}.json").write_text(json.dumps(truth) + "\n")
    return folder


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ({"city": "PARIS", "n": 2, "at": {"x": 1}}, True),
        ({"city": "PARIS", "at": {"x": 1, "y": 0.5}}, True),
        ({"city": "PARIS", "at": {"x": 1, "y": 0.6}}, False),
        ({"city": "Paris (France)", "at": {"x": 1.0}}, True),
        ({"city": "Lyon", "at": {"x": 1.0}}, False),
        ({"city": "Paris", "at": {"x": 2}}, False),
        ({"city": "Paris", "n": 3, "at": {"x": 1}}, False),
        ({"city": "Paris", "at": {"x": 1}, "other": 1}, False),
        ({"n": 2, "at": {"x": 1}}, False),
        ([], False),
    ],
)
def test_values_are_judged_by_bfcls_rule(tmp_path: Path, value: Any, right: bool) -> None:
    (first,) = calls(bfcl(tmp_path), 1)[len(hard_calls()) :]
    assert "Do it." in first.prompt and "Does it." in first.prompt and json.dumps(first.schema) in first.prompt
    assert first.right(value) is right
    with pytest.raises(UserError, match="lower --requests"):
        calls(tmp_path, 2)  # both files have one call, and the same one


def test_without_bfcl_there_are_generated_ones_whose_answers_satisfy_their_schemas() -> None:
    found = calls(None, 30)
    assert len(found) == 30 + len(hard_calls())
    for call in found[-30:]:
        assert Checker(call.schema).violations(call.wanted) == []
        assert call.right(call.wanted) is True and call.right({}) is False
    with pytest.raises(UserError, match="does not exist"):
        calls(Path("nowhere"), 1)


def test_hard_schemas_can_be_used_and_refuse_something() -> None:
    for call in hard_calls():
        checker = Checker(call.schema)
        assert any(checker.violations(value) for value in ({"no": "such thing"}, [], 0, {})), call.question
    assert Call("?", {}).right(1) is None


def test_the_stub_answers_what_its_schema_asks() -> None:
    assert Checker(SCHEMA).violations(DOCUMENT) == []
    process = subprocess.Popen([sys.executable, "-m", "serving.bench.stub"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        closed = asyncio.run(measure(url, {}, 4, 0.4))
        assert closed.errors == 0 and closed.requests > 100 and closed.p50_ms > 0
        opened = asyncio.run(measure(url, {"response_format": {}}, 4, 0.8, rate=100))
        assert opened.errors == 0 and 60 <= opened.requests <= 85  # three quarters of it count
        assert asyncio.run(measure(url, {}, 2, 30, requests=50)).requests in (50, 51)
    finally:
        process.terminate()
        process.wait(10)


def test_an_error_is_counted_as_one(guarded: Start) -> None:
    guard = guarded(completion("x"), Status(500))
    found = asyncio.run(measure(guard.url, {}, 1, 0.4))
    assert found.errors >= found.requests - 1 > 0


def run_before_a_fake_engine(folder: Path, module: str, *options: str) -> dict[str, Any]:
    """The last line of a benchmark of which the engine is a fake one."""
    recipe, fused = folder / "recipe.yaml", folder / "out" / "fused"
    text = Path("configs/demo.yaml").read_text(encoding="utf-8")
    recipe.write_text(re.sub("(?m)^output: .*", f"output: {fused.parent}", text), encoding="utf-8")
    fused.mkdir(parents=True)
    (fused / "config.json").write_text("{}")
    path = fake_engine.install(folder / "fake")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{path}{os.pathsep}{Path.cwd()}",
        "FAKE_ENGINE_PIDS": str(folder / "pids"),
        "QWEN_FUSION_QUIET": "1",
    }
    command = [sys.executable, "-m", module, str(recipe), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_validity_is_asked_in_every_way_and_counted(tmp_path: Path) -> None:
    found = run_before_a_fake_engine(tmp_path, "serving.bench", "--part", "validity", "--requests", "5")
    # the fake always says {"name": "Mia", "ok": true} where it is constrained, and 42 where it is not
    for key in ("valid_after_ladder", "first_attempt_valid", "engine_alone_valid"):
        assert 0 < found[key] < 0.3
    assert found["valid_after_ladder"] >= found["engine_alone_valid"] == found["first_attempt_valid"]
    assert found["valid_or_explicit"] == found["valid_after_ladder"]  # used-up attempts are no right refusal
    assert 0 < found["retry_loop_valid"] < 0.3 and found["added_p50_ms"] is None


def test_outcomes_of_an_interrupted_run_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path, call = tmp_path / "logs" / "validity.jsonl", Call("How many?", {"type": "integer"})
    kept = Kept(path, str(tmp_path), "auto")
    kept.add(kept.key("guard", call), Outcome(False, attempts=3, refused="output_truncated"))
    kept.add(kept.key("nothing", call), Outcome(True))
    path.write_text(path.read_text()[:-9])  # killed while it wrote
    again = Kept(path, str(tmp_path), "auto")
    assert again.get(again.key("guard", call)) == Outcome(False, attempts=3, refused="output_truncated")
    assert again.get(again.key("nothing", call)) is None
    assert again.get(again.key("guard", Call("How much?", call.schema))) is None
    other = Kept(path, str(tmp_path), "float32")
    assert other.get(other.key("guard", call)) is None


def test_every_request_of_a_soak_ends_though_the_engine_is_killed(tmp_path: Path) -> None:
    options = ("--minutes", "0.2", "--connections", "3")
    found = run_before_a_fake_engine(tmp_path, "serving.bench.soak", *options)
    assert found["malformed"] == 0 and found["kills"] == 2 and None not in found["back_after_s"]
    assert found["outcomes"]["valid"] > 20 and set(found["outcomes"]) <= {"valid", "upstream_unavailable"}
    assert found["outcomes"]["upstream_unavailable"] >= 2 and sum(found["outcomes"].values()) == found["requests"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["configs/none.yaml"],
        ["configs/demo.yaml", "--requests", "0"],
        ["configs/demo.yaml", "--bfcl", "nowhere", "--part", "validity"],
    ],
)
@pytest.mark.parametrize("module", ["serving.bench", "serving.bench.soak"])
def test_bad_arguments_are_a_sentence(module: str, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()
