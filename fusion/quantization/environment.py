"""The environment that llm-compressor runs in, made once with uv and kept in the user's cache.

    python = environment_python()   # ~/.cache/qwen-fusion/llm-compressor-0.14.0/bin/python

llm-compressor 0.14 needs transformers up to 5.17 and compressed-tensors 0.19, vLLM 0.32 compressed-tensors 0.17: no one
environment holds both. Its versions are in requirements.txt beside this file.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from fusion.checkpoint import cache_folder, file_hash, put_in_place, read_json, write_json
from fusion.errors import UserError
from fusion.progress import console

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
NOTE = "qwen-fusion.json"  # in the environment: what it was made from


def pinned(package: str) -> str:
    """The version of `package` in the other environment."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def environment_folder(cache: Path | None = None) -> Path:
    """Where the environment is kept: below `cache`, by default the user's."""
    return (cache or cache_folder()) / f"llm-compressor-{pinned('llmcompressor')}"


def environment_python(cache: Path | None = None) -> Path:
    """The interpreter of the environment, which is made where it is missing or was made of other requirements.

    Raises UserError where there is no uv, or the packages cannot be had.
    """
    folder = environment_folder(cache)
    wanted = {"requirements": file_hash(REQUIREMENTS), "python": sys.version.split()[0], "gpu": _has_gpu()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / NOTE).is_file() or read_json(folder / NOTE) != wanted:
            aside = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                _install(aside)
                write_json(aside / NOTE, wanted)
                put_in_place(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder / "bin" / "python"


def _install(folder: Path) -> None:
    uv = _uv()
    console.print(f"llm-compressor {pinned('llmcompressor')} is installed (once) in an environment of its own")
    _run([uv, "venv", "-q", "--relocatable", "--python", sys.executable, str(folder)])
    python = folder / "bin" / "python"
    _run([uv, "pip", "install", "-q", "--python", str(python), *wheel_options(), "-r", str(REQUIREMENTS)])
    _run([str(python), "-I", "-c", "import llmcompressor"])


def wheel_options() -> list[str]:
    """Where uv finds torch, as for `make setup`: folders of wheels, and PyTorch's own index by the machine's hardware.

    A CPU machine with a folder of wheels needs no index for torch.
    """
    places = shlex.split(os.environ.get("PIP_FIND_LINKS", ""))
    links = [option for place in places for option in ("--find-links", place)]
    if _has_gpu():
        return [*links, "--torch-backend", "auto"]
    return links or ["--torch-backend", "cpu"]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    uv = shutil.which("uv") or (str(beside) if beside.is_file() else None)
    if uv is None:
        raise UserError("llm-compressor is installed by uv, which is not here: pip install uv, then call this again")
    return uv


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        reason = next((line for line in lines if "×" in line or "error" in line.lower()), lines[-1])
        raise UserError(
            f"llm-compressor's environment cannot be made ({reason}): see that a package index is reachable"
        )
