"""`serve` in a process of its own, as the command line runs it."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from serving.engine import EngineSettings
from serving.serve import find_server

PROGRAM = """
import json, sys
from pathlib import Path
from fusion.errors import UserError
from serving.engine import EngineSettings
from serving.serve import serve
try:
    serve(EngineSettings(**json.loads(sys.argv[1])), port=0, log=Path(sys.argv[2]), state=Path(sys.argv[3]))
except UserError as error:
    print(error)
    sys.exit(2)
"""


def serve_apart(
    settings: EngineSettings, folder: Path, within_s: float = 30.0
) -> tuple[subprocess.Popen[str], str]:  # fmt: skip
    """The process, ready for requests, and the guard's address. Its log and state file are in `folder`."""
    state = folder / "state.json"
    command = [sys.executable, "-c", PROGRAM, json.dumps(asdict(settings)), str(folder / "vllm.log"), str(state)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        server = find_server(state)
        if server is not None:
            return process, server.url
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.terminate()
    raise AssertionError(f"not ready after {within_s} s: {process.communicate()[0]}")
