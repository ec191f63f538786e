"""Python code that a model wrote, run in a child process that can compute and nothing else.

    run_python("print(1 + 1)").output

The child (fusion/sandbox_child.py) has limits on time and memory and a seccomp filter that leaves it no file, no
network and no other process: https://docs.kernel.org/userspace-api/seccomp_filter.html.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusion.errors import UserError
from fusion.sandbox_child import NO_SANDBOX

SECONDS = 10  # of a core
MEMORY_BYTES = 2**30
WALL = 3  # a busy machine gives a child a third of a core, say
CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Done:
    """Whether the code ran to its end without an error, and what it printed."""

    passed: bool
    output: str
    timed_out: bool = False


def run_python(source: str, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Done:
    """Runs code to its end, at most `seconds` of a core; leaving early (`exit()`) is not passing.

    By the clock that may take WALL times as long. Raises UserError where the machine cannot make a sandbox: code is
    never run without one.
    """
    token = secrets.token_hex(16)  # what the child says last, which code that leaves early does not
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), str(seconds), str(memory_bytes)],
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            cwd="/",
            start_new_session=True,
        )
        try:
            child.communicate(f"{token}\n{source}".encode("utf-8", "replace"), timeout=WALL * seconds)
        except subprocess.TimeoutExpired:
            return Done(False, "", timed_out=True)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for file in (output, errors):
            file.seek(0)
        said = errors.read()
        if said.startswith(NO_SANDBOX.encode()):
            raise UserError(
                "code of a model is run in a sandbox alone, and this machine has no libseccomp, or no seccomp: "
                "install it (apt install libseccomp2), or leave out what is scored by tests_passed"
            )
        passed = child.returncode == 0 and said.endswith(token.encode())
        return Done(passed, output.read().decode("utf-8", "replace"))
