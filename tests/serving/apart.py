"""`serve` and `guard` in processes of their own, as the command line runs them."""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from serving.engine import EngineSettings
from serving.serve import find_server

SAID = "serve.log"
COMMAND = [sys.executable, "-m", "fusion.cli", "guard"]
PROGRAM = """
import json, sys
from pathlib import Path
from fusion.errors import UserError
from serving.engine import EngineSettings
from serving.serve import serve
try:
    log, state, port = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    serve(EngineSettings(**json.loads(sys.argv[1])), port=port, log=log, state=state)
except UserError as error:
    print(error)
    sys.exit(2)
"""


def serve_apart(
    settings: EngineSettings, folder: Path, within_s: float = 30.0, port: int = 0
) -> tuple[subprocess.Popen[str], str]:
    """The process, ready for requests, and the guard's address. In `folder` are its state file, vLLM's log, and SAID.

    A file takes what it says, since the guard's log of requests would fill a pipe that nobody reads, and wait.
    """
    state, said = folder / "state.json", folder / SAID
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        json.dumps(asdict(settings)),
        str(folder / "vllm.log"),
        str(state),
        str(port),
    ]
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        server = find_server(state)
        if server is not None:
            return process, server.url
        assert process.poll() is None, said.read_text()
        time.sleep(0.05)
    process.terminate()
    process.wait()
    raise AssertionError(f"not ready after {within_s} s: {said.read_text()}")


def guard_apart(upstream: str, *settings: str) -> tuple[subprocess.Popen[str], str]:
    """`qwen-fusion guard` in front of a server, and its address."""
    options = [part for setting in ("log=none", *settings) for part in ("--set", setting)]
    command = [*COMMAND, "--upstream", upstream, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r"on (http://[^/]+)/v1", process.stderr.readline())
    assert found is not None
    return process, found.group(1)
