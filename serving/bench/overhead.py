"""What the guard adds to a request and how many it takes a second, on one core, before a stub that answers at once.

The guard runs on the last core of this machine, stub and load generator (serving/bench/load.py) on the first. Latency
is that of requests at a fixed rate, less the stub's own; throughput is taken separately, with every connection busy.
Before the same stub, on the same core: LiteLLM's proxy, in an environment of its own, made where it is missing.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from fusion.errors import UserError
from fusion.progress import console
from serving.bench.processes import becomes_healthy, guard, on_core, pinned, resident_mb
from serving.bench.stub import SCHEMA
from serving.engine import free_port

RATE = 500  # requests a second
CONNECTIONS = (1, 32, 256)
STRUCTURED = {"response_format": {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA}}}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "checked": STRUCTURED}
WARM_REQUESTS = 20_000  # before memory is looked at for the first time
LITELLM = "litellm[proxy]==1.108.*"


def run(seconds: float, soak_requests: int) -> dict[str, Any]:
    """Measures all of it, prints the table, returns the figures of the benchmark's last line."""
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    with pinned([sys.executable, "-m", "serving.bench.stub"], first, subprocess.PIPE) as stub:
        assert stub.stdout is not None
        direct = f"http://127.0.0.1:{int(stub.stdout.readline())}"
        rows = {"stub alone": _loads(direct, first, seconds)}
        with guard(direct, last) as (url, pid):
            rows["guard"] = _loads(url, first, seconds)
            memory = _memory(url, pid, first, soak_requests)
        rows |= _litellm(direct, first, last, seconds)
    _print(rows, memory, first == last)
    ours, stub_alone = rows["guard"], rows["stub alone"]
    added = {kind: ours[kind, 32, RATE]["p50_ms"] - stub_alone[kind, 32, RATE]["p50_ms"] for kind in KINDS}
    peer = rows.get("LiteLLM")
    return {
        "added_p50_ms": round(added["checked"], 3),
        "added_p50_ms_plain": round(added["plain"], 3),
        "requests_per_s_per_core": round(ours["checked", 32, None]["requests_per_s"]),
        "requests_per_s_per_core_plain": round(ours["plain", 32, None]["requests_per_s"]),
        "vs_litellm": _ratio(ours, peer),
        "memory_mb": memory,
    }


Rows = dict[tuple[str, int, int | None], dict[str, float]]


def _ratio(ours: Rows, peer: Rows | None) -> float | None:
    if peer is None:
        return None
    return round(ours["plain", 32, None]["requests_per_s"] / peer["plain", 32, None]["requests_per_s"], 2)


def _loads(url: str, core: int, seconds: float) -> Rows:
    found: Rows = {}
    for kind in KINDS:
        for rate in (None, RATE):
            for connections in CONNECTIONS:
                found[kind, connections, rate] = _load(url, core, KINDS[kind], connections, seconds, rate)
    return found


def _load(
    url: str,
    core: int,
    fields: dict[str, Any],
    connections: int,
    seconds: float,
    rate: int | None = None,
    most: int = 0,
) -> dict[str, float]:
    command = [sys.executable, "-m", "serving.bench.load", url, f"--connections={connections}"]
    command += [f"--seconds={seconds}", f"--fields={json.dumps(fields)}", f"--requests={most}"]
    command += [f"--rate={rate}"] if rate else []
    done = subprocess.run(command, preexec_fn=on_core(core), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    if found["errors"] or not found["requests"]:
        said = f"{found['errors']} of {found['requests']} answers at {url} were errors: its figures mean nothing"
        raise UserError(f"{said}; see what it says there, and run this again")
    return found


def _memory(url: str, pid: int, core: int, requests: int) -> list[float]:
    """Resident megabytes after the first 20,000 requests and after all of them, checked ones."""
    sizes = []
    for count in (WARM_REQUESTS, requests - WARM_REQUESTS):
        if count > 0:
            _load(url, core, STRUCTURED, 32, 3600, most=count)
            sizes.append(resident_mb(pid))
    return sizes


def _litellm(upstream: str, first: int, last: int, seconds: float) -> dict[str, Rows]:
    """LiteLLM's rows; none where its environment cannot be made."""
    folder = Path.home() / ".cache" / "qwen-fusion" / "litellm"
    program = folder / "bin" / "litellm"
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    if not program.is_file():
        made = Path(uv).is_file() and all(
            subprocess.run([uv, *command], check=False).returncode == 0
            for command in (
                ["venv", "-q", "--python", sys.executable, str(folder)],
                ["pip", "install", "-q", "--python", str(folder / "bin" / "python"), LITELLM],
            )
        )
        if not made:
            console.print("LiteLLM's environment could not be made: its row is left out", highlight=False)
            return {}
    port = free_port()
    config = folder / "bench.yaml"
    model = {"model": "openai/m", "api_base": f"{upstream}/v1", "api_key": "sk-1"}
    config.write_text(json.dumps({"model_list": [{"model_name": "m", "litellm_params": model}]}))
    local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    with pinned([str(program), "--config", str(config), "--port", str(port)], last, env=local) as process:
        url = f"http://127.0.0.1:{port}"
        if not becomes_healthy(process, url, "/health/liveliness"):
            console.print("LiteLLM's proxy did not start: its row is left out", highlight=False)
            return {}
        return {"LiteLLM": {("plain", 32, None): _load(url, first, {}, 32, seconds)}}


def _print(rows: dict[str, Rows], memory: list[float], one_core: bool) -> None:
    table = Table(title="in front of a stub, on one core")
    for name in ("", "request", "connections", "requests a second", "p50 ms", "p95 ms", "p99 ms"):
        table.add_column(name, justify="left" if name in ("", "request") else "right")
    for who, found in rows.items():
        for (kind, connections, rate), row in found.items():
            said = f"{row['requests_per_s']:,.0f}" + (f" (fixed rate {rate})" if rate else "")
            table.add_row(
                who, kind, str(connections), said, *(f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
            )
    console.print(table)
    console.print(f"guard's memory after {WARM_REQUESTS:,} requests and after all: {memory} MB", highlight=False)
    if one_core:
        console.print("[yellow]one core for all of it: the guard's figures are too low[/yellow]")
