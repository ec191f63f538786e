"""Processes of a benchmark: on one core or on all, ended with the block that started them.

with guard("http://127.0.0.1:9000", core=1) as (url, pid): ...
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from serving.engine import free_port, is_healthy

START_SECONDS = 180


def on_core(core: int | None) -> Callable[[], None] | None:
    """For Popen's preexec_fn: keeps the process on one core; None on all."""
    return None if core is None else lambda: os.sched_setaffinity(0, {core})


@contextmanager
def pinned(
    command: list[str], core: int | None, stdout: int = subprocess.DEVNULL, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process on one core, ended with the block."""
    process = subprocess.Popen(
        command,
        preexec_fn=on_core(core),
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def guard(upstream: str, core: int | None = None, *settings: str) -> Iterator[tuple[str, int]]:
    """`qwen-fusion guard` in front of `upstream`, with settings `key=value`: its address and process id."""
    port = free_port()
    command = [sys.executable, "-m", "fusion.cli", "guard", "--upstream", upstream, "--port", str(port)]
    command += [part for setting in settings for part in ("--set", setting)]
    with pinned(command, core) as process:
        url = f"http://127.0.0.1:{port}"
        if not becomes_healthy(process, url, "/health"):
            raise UserError(f"the guard did not start: try `qwen-fusion guard --upstream {upstream}`")
        yield url, process.pid


def becomes_healthy(process: subprocess.Popen[Any], url: str, path: str) -> bool:
    """Whether a server answers at `url` before it ends, and in time."""
    end = time.monotonic() + START_SECONDS
    while not is_healthy(url, path=path):
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def resident_mb(pid: int) -> float:
    """Resident memory of a process in megabytes."""
    status = Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2]
    return round(int(status.split()[0]) / 1024, 1)


def open_files(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
