"""The container file is held against the code: what it copies, starts and asks is there, and it waits long enough."""

import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from typer.main import get_command

from fusion.cli import app
from fusion.sections.serving import Guarding
from serving.engine import GRACE_S, Engine
from serving.guard.paths import OPEN
from tests.serving.conftest import Guarded

ROOT = Path(__file__).parents[2]
FILE = ROOT / "configs" / "deploy" / "Containerfile"
Lines = dict[str, list[str]]


@pytest.fixture(scope="module")
def lines() -> Lines:
    """What stands behind each instruction, in order."""
    found: Lines = {}
    with FILE.open("rb") as file:
        for line in DockerfileParser(fileobj=file).structure:
            found.setdefault(line["instruction"], []).append(line["value"])
    return found


def test_it_serves_the_recipe_on_the_port_it_exposes(lines: Lines) -> None:
    program, verb, *options = json.loads(lines["ENTRYPOINT"][0])
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    given = command.make_context(verb, [*options, "configs/demo.yaml", "--set", "serving.guard.workers=2"]).params
    assert (given["host"], str(given["port"])) == ("0.0.0.0", lines["EXPOSE"][0])
    assert given["recipe"] == Path("configs/demo.yaml")


def test_its_health_is_that_the_engine_is_ready(lines: Lines, guarded: Callable[..., Guarded]) -> None:
    (_, options, command) = re.split(r"(.*)CMD ", lines["HEALTHCHECK"][0])
    program, flag, code = json.loads(command)
    address, path = re.findall(r"'(http://127\.0\.0\.1:\d+)(/\w+)'", code)[0]
    assert address.endswith(f":{lines['EXPOSE'][0]}")
    assert (program, path) == ("python", "/ready") and path in OPEN
    up, down = guarded(), guarded(upstream="http://127.0.0.1:9")  # nobody listens there
    codes = [
        subprocess.run([sys.executable, flag, code.replace(address, guard.url)], capture_output=True).returncode
        for guard in (up, down)
    ]
    assert codes == [0, 1]
    wait = inspect.signature(Engine).parameters["start_timeout_s"].default
    assert f"--start-period={wait:.0f}s" in options


def test_it_is_stopped_as_serve_is_drained(lines: Lines) -> None:
    assert lines["STOPSIGNAL"] == ["SIGTERM"]
    timeout = re.search(r"--stop-timeout (\d+)", FILE.read_text())
    assert timeout and int(timeout[1]) > Guarding().drain_s + GRACE_S
    assert lines["USER"][-1] not in ("root", "0")


def test_what_it_copies_and_installs_is_there(lines: Lines) -> None:
    for copied in lines["COPY"]:
        assert all((ROOT / name).exists() for name in copied.split()[:-1])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    name, default = lines["ARG"][0].split("=")
    assert name == "ENGINE" and {default, "cpu", "gpu"} <= set(extras)
    assert any(f'".[${name}]"' in run for run in lines["RUN"])
