"""Runs a command in a process group of its own and ends the whole group when the command or the parent ends.

The parent holds the other end of standard input: when the parent dies, however it dies, standard input ends, and the
group with it.

    process = start(["sleep", "600"], grace_s=2.0)
    python serving/supervisor.py GRACE_SECONDS COMMAND...
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any


def start(command: list[str], grace_s: float, **options: Any) -> subprocess.Popen[bytes]:
    """Starts `command` under `supervise`: closing the process's standard input ends it, as the end of this one does.

    `options` are Popen's.
    """
    supervised = [sys.executable, __file__, str(grace_s), *command]
    return subprocess.Popen(supervised, stdin=subprocess.PIPE, start_new_session=True, **options)


def supervise(command: list[str], grace_s: float) -> int:
    """Runs `command` until it exits or standard input ends, then ends its group; returns its exit code.

    A command that does not end within `grace_s` seconds after SIGTERM is killed; one ended by signal N gives 128 + N.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # only the parent decides
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_stdin, args=(child, grace_s), daemon=True).start()
    code = child.wait()
    _end_group(child.pid, grace_s=2.0)
    return code if code >= 0 else 128 - code


def _end_with_stdin(child: subprocess.Popen[bytes], grace_s: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    child.terminate()  # the command ends its own workers in order
    time.sleep(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _end_group(group: int, grace_s: float) -> None:
    end = time.monotonic() + grace_s
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < end:
            os.killpg(group, 0)  # raises once nobody is left
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], float(sys.argv[1])))
