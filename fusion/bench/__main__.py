"""What a merge costs: wall time and memory of `qwen-fusion merge` beside `mergekit-moe` and `cp`, and a plan's time.

    make bench-fusion BENCH="--sizes demo,1.5b,7b"

Runs alternate; before each, what it reads is evicted from the page cache, and each ends when its output is on the disk.
mergekit writes a shared expert more, which it demands, so times are compared a byte of output. The last line is JSON.
This process imports no torch: the peak memory that the kernel tells of a child begins with that of its parent.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusion.errors import UserError, run_main

REAL = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
EXPERTS = 5
MEMORY_EXPERTS = (2, 4, 8)
ROUNDS = {"demo": 3, "1.5b": 3, "7b": 3}
# GB on the disk at a time for the 7B shapes, five sources and two outputs: of embeddings and heads, and a layer
B7_REST, B7_LAYER = 7 * 2.18, 5 * 0.466 + (0.059 + 5 * 0.407) + (0.059 + 6 * 0.407)


@dataclass(frozen=True)
class Run:
    """One run: seconds until its output was on the disk, the child's peak memory, bytes read, written and put out."""

    seconds: float
    peak: int
    read: int
    written: int
    output: int

    @property
    def per_byte(self) -> float:
        """Seconds a byte of output."""
        return self.seconds / self.output


def main(*given: str) -> None:
    """Parses, runs, prints."""
    parser = argparse.ArgumentParser(prog="python -m fusion.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="demo,1.5b,7b", help="which of demo (after make demo), 1.5b, 7b")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-fusion"), help="on the disk to measure")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo/anchor"), help="the demo's anchor")
    arguments = parser.parse_args(given)
    sizes = arguments.sizes.split(",")
    if unknown := set(sizes) - ROUNDS.keys():
        raise UserError(f"--sizes {unknown.pop()}: name some of {', '.join(ROUNDS)}")
    folder: Path = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result: dict[str, Any] = {}
    try:
        for size in ROUNDS:
            if size in sizes:
                result |= measure(size, folder / size, arguments.demo)
                shutil.rmtree(folder / size)
        result["plan_seconds"] = plan_seconds(folder / "sparse")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))


def measure(size: str, folder: Path, demo: Path) -> dict[str, float]:
    """The ratios and peaks at one size, printed as a table as well."""
    make(size, folder, demo)
    runs: dict[str, list[Run]] = {"qwen-fusion merge": [], "mergekit-moe": [], "cp": []}
    ours, theirs = folder / "ours" / "fused", folder / "mergekit"
    for _ in range(ROUNDS[size]):
        shutil.rmtree(ours.parent, ignore_errors=True)
        runs["qwen-fusion merge"].append(run_ours(folder, EXPERTS))
        runs["cp"].append(
            run(["cp", "-r", "--reflink=never", str(ours), str(folder / "copy")], [ours], folder / "copy")
        )
        shutil.rmtree(folder / "copy")
        runs["mergekit-moe"].append(run_mergekit(folder, EXPERTS))
        shutil.rmtree(theirs)
    shutil.rmtree(ours.parent)
    print(f"\n{size}: {EXPERTS} experts, {ROUNDS[size]} runs each\n")
    print("| | seconds (median; least to most) | GB put out | GB read | GB written | s a GB | peak memory, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rows in runs.items():
        seconds = sorted(row.seconds for row in rows)
        middle = sorted(rows, key=lambda row: row.seconds)[len(rows) // 2]
        cells = [f"{statistics.median(seconds):.2f}; {seconds[0]:.2f} to {seconds[-1]:.2f}"]
        cells += [f"{n / 1e9:.3f}" for n in (middle.output, middle.read, middle.written)]
        cells += [f"{median(rows) * 1e9:.2f}", f"{max(row.peak for row in rows) / 1e9:.2f}"]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
    peaks: dict[str, list[int]] = {"ours": [], "mergekit": []}
    for count in MEMORY_EXPERTS:
        peaks["ours"].append(run_ours(folder, count).peak)
        shutil.rmtree(ours.parent)
        peaks["mergekit"].append(run_mergekit(folder, count).peak)
        shutil.rmtree(theirs)
    print(f"\npeak memory in GB with {', '.join(map(str, MEMORY_EXPERTS))} experts:", end=" ")
    print(
        "; ".join(f"{name} {', '.join(f'{peak / 1e9:.2f}' for peak in row)}" for name, row in peaks.items()), flush=True
    )
    result = {
        "merge_vs_mergekit": median(runs["qwen-fusion merge"]) / median(runs["mergekit-moe"]),
        "merge_vs_cp": median(runs["qwen-fusion merge"]) / median(runs["cp"]),
        "peak_rss_gb": max(peaks["ours"]) / 1e9,
        "peak_rss_gb_mergekit": max(peaks["mergekit"]) / 1e9,
    }
    return {name: round(value, 3) for name, value in result.items()}


def median(runs: list[Run]) -> float:
    """The median of the seconds a byte of output."""
    return statistics.median(run.per_byte for run in runs)


def make(size: str, folder: Path, demo: Path) -> None:
    """Makes the models of one size. Raises UserError where there is nothing to copy, or no room."""
    if size == "demo":
        if not (demo / "config.json").is_file():
            raise UserError(f"{demo} is no model: run `make demo` first, or leave demo out of --sizes")
        _models("copies", folder, str(demo))
    elif size == "1.5b":
        _models("copies", folder, REAL)
    else:
        free = shutil.disk_usage(folder.parent).free / 1e9
        depth = int((0.8 * free - B7_REST) / B7_LAYER)
        if depth < 1:
            raise UserError(f"{folder.parent} has {free:.0f} GB free, too little for a layer of the 7B shapes")
        _models("layers", folder, REAL, str(min(depth, 28)))


def _models(kind: str, folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "fusion.bench.models", kind, str(folder), str(EXPERTS), *arguments]
    subprocess.run(command, check=True)


def sources(folder: Path) -> list[Path]:
    """The models to merge."""
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def run_ours(folder: Path, count: int) -> Run:
    """Our merge, as a user runs it."""
    command = [sys.executable, "-m", "fusion.cli", "merge", str(recipe_of(folder, count)), "-q"]
    return run(command, sources(folder), folder / "ours" / "fused")


def run_mergekit(folder: Path, count: int) -> Run:
    """mergekit's, with random gates."""
    made = [str(path) for path in sources(folder)]
    config = json.loads((folder / "0" / "config.json").read_text(encoding="utf-8"))
    experts = [{"source_model": made[i % len(made)], "positive_prompts": [""]} for i in range(count)]
    data = {
        "base_model": made[0],
        "gate_mode": "random",
        "dtype": config.get("torch_dtype") or config["dtype"],
        "experts": experts,
        "shared_experts": [{"source_model": made[0], "positive_prompts": [""]}],
    }
    path = folder / "mergekit.yml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    program = [str(Path(sys.executable).with_name("mergekit-moe")), "--quiet"]
    program.append("--i-understand-this-is-not-useful-without-training")  # the gates come later
    return run([*program, str(path), str(folder / "mergekit")], sources(folder), folder / "mergekit")


def recipe_of(folder: Path, count: int) -> Path:
    """A recipe that merges the models of a folder, more experts than models repeating them."""
    made = sources(folder)
    source = {"generated": "demo.math"}
    names = [f"e{number}" for number in range(count)]
    data = {
        "name": "bench",
        "output": str(folder / "ours"),
        "anchor": {"model": str(made[0])},
        "experts": [{"name": n, "domain": n, "model": str(made[i % len(made)])} for i, n in enumerate(names)],
        "domains": {name: {"train": source, "held_out": source} for name in names},
        "serving": {"max_model_len": 256, "sampling": {"max_tokens": 32}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def run(command: list[str], reads: list[Path], output: Path) -> Run:
    """Runs a command, nothing of what it reads in the page cache, until its output is on the disk."""
    for folder in reads:
        each_file(folder, evict)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(command)} failed: {said[-2000:]}")
    each_file(output, sync)
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Run(seconds, usage.ru_maxrss * 1024, usage.ru_inblock * 512, usage.ru_oublock * 512, size)


def each_file(folder: Path, action: Callable[[int], Any]) -> None:
    """Calls `action` with the descriptor of every file in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                action(descriptor)
            finally:
                os.close(descriptor)


def sync(descriptor: int) -> None:
    """Waits until a file is on the disk."""
    os.fsync(descriptor)


def evict(descriptor: int) -> None:
    """Takes a file out of the page cache."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def plan_seconds(folder: Path) -> float:
    """The wall time of `qwen-fusion plan` on five full-size 7B models whose numbers are holes in their files."""
    _models("sparse", folder, REAL)
    apparent = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    command = [sys.executable, "-m", "fusion.cli", "plan", str(recipe_of(folder, EXPERTS))]
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    spread = f"{min(times):.2f} to {max(times):.2f}"
    print(f"\nplan: {seconds:.2f} s ({spread}) for {EXPERTS} models of {apparent / 1e9:.1f} GB in all", flush=True)
    return round(seconds, 3)


if __name__ == "__main__":
    run_main(main)
