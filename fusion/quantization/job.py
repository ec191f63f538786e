"""Jobs of fusion/quantization/child.py in llm-compressor's environment, behind a progress bar.

report = run_job(python, {"do": "compare", ...}, work, "compare")
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.progress import progress_bar

CHILD = Path(__file__).with_name("child.py")
NOT_ITS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # of this environment
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_CAUSE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*")


def run_job(python: Path, job: dict[str, Any], work: Path, description: str) -> dict[str, Any]:
    """Does `job` by the interpreter `python` with `work` for its files; returns the child's report.

    Raises UserError with the last error of its log where it fails.
    """
    paths = {name: work / f"{job['do']}.{name}" for name in ("json", "report", "log")}
    offload = work / "offload"
    offload.mkdir(parents=True)
    paths["json"].write_text(
        json.dumps({**job, "report": str(paths["report"]), "offload": str(offload)}), encoding="utf-8"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NOT_ITS} | OFFLINE
    command = [str(python), "-I", str(CHILD), str(paths["json"])]
    with paths["log"].open("w", encoding="utf-8") as log, progress_bar() as bar:
        task = bar.add_task(description, total=None, unit="layers")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as child:
            try:
                for done, total in _progress(child.stdout or ()):
                    bar.update(task, completed=done, total=total)
            except BaseException:  # Ctrl-C: it would go on for hours
                child.kill()
                raise
    shutil.rmtree(offload)
    if child.returncode:
        raise UserError(f"llm-compressor failed: {_cause(paths['log'], child.returncode)}")
    report: dict[str, Any] = read_json(paths["report"])
    return report


def _progress(lines: Iterable[str]) -> Iterator[tuple[int, int]]:
    """(done, total) of the child's own lines; libraries print others."""
    for line in lines:
        if line.startswith('{"done"'):
            said = json.loads(line)
            yield said["done"], said["total"]


def _cause(log: Path, code: int) -> str:
    """The child's error in a line. A signal leaves none: 9 is most often the kernel's answer to too little memory."""
    if code < 0:
        return f"it was ended by signal {-code}" + (", most likely for want of memory" if code == -9 else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return ([line for line in lines if _CAUSE.match(line)] or lines or [f"exit code {code}"])[-1]
