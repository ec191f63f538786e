"""Code of a model: what computes runs, and nothing else can be done, left behind, or waited for without end."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fusion import sandbox
from fusion.errors import UserError
from fusion.sandbox import run_python
from fusion.sandbox_child import NO_SANDBOX, OUTPUT_BYTES

BOMB = """
import os
made = 0
for _ in range(100):
    try:
        os.fork()
        made += 1
    except OSError:
        pass
print(made)
"""


@pytest.mark.parametrize(
    ("source", "printed"),
    [
        ("print(1 + 1)", "2\n"),
        ("import math, re, collections, itertools, heapq\nprint(math.comb(5, 2))", "10\n"),
        ("import datetime\nprint(datetime.datetime.strptime('2020', '%Y').year)", "2020\n"),
        ("import numpy as np\nprint(int(np.arange(4).sum()))", "6\n"),
        ("if __name__ == '__main__':\n    print(input())\nprint('no main')", "no main\n"),
        ("import numpy as np\nprint(np.random.default_rng(0).integers(1), np.linalg.det(np.eye(2)))", "0 1.0\n"),
        ("import typing\nclass A:\n    b: 'A'\nprint(typing.get_type_hints(A)['b'] is A)", "True\n"),
        ("print('ä 中')", "ä 中\n"),
    ],
)
def test_what_computes_runs(source: str, printed: str) -> None:
    done = run_python(source)
    assert done.passed
    assert done.output == printed


@pytest.mark.parametrize(
    "source",
    [
        "1 / 0",
        "assert 1 == 2",
        "def",
        "exit(0)",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import os\nos._exit(86)",
        "import sys\nsys.stderr.write('passed')\nexit(0)",
        "raise SystemExit",
        "exit(85)",
        "import does_not_exist",
        "x = bytearray(3 * 2**30)",
        "def f(): return f()\nf()",
    ],
)
def test_what_fails_or_leaves_early_has_not_passed(source: str) -> None:
    assert not run_python(source).passed


WORKS_OUTSIDE = (
    "open('/etc/passwd').read()",
    "open({path!r}, 'w').write('x')",
    "import os\nos.listdir('/')",
    "import os\nos.mkdir({path!r})",
    "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)",
    "import os\nos.fork()",
    "import subprocess\nsubprocess.run(['true'])",
    "import os\nos.system('true') and 1 / 0",
    "import threading\nthreading.Thread(target=print).start()",
    "import ctypes\nctypes.CDLL(None).socket(2, 1, 0) >= 0 or 1 / 0",
    "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
)


@pytest.mark.parametrize("source", WORKS_OUTSIDE)
def test_what_is_refused_below_would_work(tmp_path: Path, source: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = source.format(path=str(tmp_path / "there"), port=server.getsockname()[1])
        assert subprocess.run([sys.executable, "-c", told], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "source",
    [
        *WORKS_OUTSIDE,
        "import os\nos.remove({path!r})",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ],
)
def test_files_network_and_processes_are_out_of_reach(tmp_path: Path, source: str) -> None:
    path, reached = tmp_path / "there", threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert not run_python(source.format(path=str(path), port=port)).passed
        try:
            server.accept()
            reached.set()
        except TimeoutError:
            pass
    assert not reached.is_set()
    assert list(tmp_path.iterdir()) == []


def test_a_loop_without_end_is_ended_with_all_that_it_has() -> None:
    begin = time.monotonic()
    assert not run_python("while True: pass", seconds=1).passed
    assert not run_python("import time\ntime.sleep(60)", seconds=1).passed
    assert time.monotonic() - begin < 20


def test_a_fork_bomb_is_one_process() -> None:
    assert run_python(BOMB).output == "0\n"


def test_output_is_bounded() -> None:
    done = run_python(f"print('x' * {3 * OUTPUT_BYTES})")
    assert not done.passed
    assert len(done.output) <= OUTPUT_BYTES


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of mine")
    assert "of mine" not in run_python("import os\nprint(dict(os.environ))").output


def test_without_a_sandbox_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ran"
    child = tmp_path / "child.py"
    child.write_text(f"import os\nos.write(2, {NO_SANDBOX.encode()})\nos._exit(1)")
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(UserError, match="libseccomp"):
        run_python(f"open({str(path)!r}, 'w')")
    assert not path.exists()
    assert list(tmp_path.iterdir()) == [child]
