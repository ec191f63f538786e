"""Minutes of mixed requests through the guard while vLLM is killed behind it: every request ends, service comes back.

    make soak            # python -m serving.bench.soak configs/demo.yaml, after `make demo`: ten minutes

A guard in front of a real vLLM gets plain, checked, streamed and live requests all the time. Twice vLLM is killed
without a word and started again on its port; the guard is left alone. Every request has to end in one well-formed
answer: what was asked for, or an error that says what happened. The last line is one JSON object; exit code 1 where a
request did not end well, service did not come back, or the guard's memory or open files have grown.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from fusion.errors import UserError, run_main
from fusion.progress import console, progress_bar
from fusion.recipe_file import load_recipe
from serving.bench.processes import guard, open_files, resident_mb
from serving.bench.validity import served_model
from serving.engine import Engine, EngineSettings, is_healthy
from serving.guard.schema import Checker

KILLS = (0.25, 0.6)  # of the time
START_SECONDS = 900
DEADLINE_S = 60
GROWTH = 1.25  # of memory, from the first kill to the end
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain stream": {"stream": True},
    "checked": FORMAT,
    "checked stream": {**FORMAT, "stream": True},
    "live stream": {**FORMAT, "stream": True, "guard": {"live": True}},
}


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path, help="whose fused model answers, or its anchor where nothing is fused yet")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=8)
    given = parser.parse_args(arguments)
    if not 0 < given.minutes < float("inf") or given.connections < 1:
        raise UserError("--minutes and --connections are greater than 0")
    recipe = load_recipe(given.recipe)
    model = served_model(recipe)
    log = recipe.folder / "logs" / "soak.log"
    settings = EngineSettings(model, "m", dtype=recipe.serving.dtype, max_model_len=recipe.serving.max_model_len)
    with Engine(settings, log) as engine, guard(engine.url, None, f"deadline_s={DEADLINE_S}") as (url, pid):
        found = asyncio.run(_soak(url, pid, engine, 60 * given.minutes, given.connections))
    sys.stdout.write(json.dumps(found) + "\n")
    (memory, later), (files, files_later) = found["memory_mb"], found["open_files"]
    grown = later > GROWTH * memory or files_later > files + 4 * given.connections
    if found["malformed"] or found["back_after_s"].count(None) or grown:
        sys.exit(1)


async def _soak(url: str, pid: int, engine: Engine, seconds: float, connections: int) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    malformed: list[str] = []
    began = time.monotonic()
    before: tuple[float, int] | None = None
    back: list[float | None] = []
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S + 30)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def asks(place: int) -> None:
            turn = place
            while time.monotonic() - began < seconds:
                kind = list(KINDS)[turn % len(KINDS)]
                turn += 1
                try:
                    outcome = await _one(session, url, KINDS[kind])
                except Exception as error:
                    malformed.append(f"{kind}: {type(error).__name__}: {error}"[:200])
                    continue
                outcomes[outcome] += 1
                if outcome != "valid":  # vLLM is away, and says so at once
                    await asyncio.sleep(0.2)

        async def kills() -> None:
            nonlocal before
            for share in KILLS:
                await asyncio.sleep(max(0.0, began + share * seconds - time.monotonic()))
                before = before or (resident_mb(pid), open_files(pid))
                back.append(await asyncio.to_thread(_kill_and_start, engine, url))

        with progress_bar() as bar:
            task = bar.add_task("soak", total=round(seconds), unit="s")

            async def shows() -> None:
                while (spent := time.monotonic() - began) < seconds:
                    bar.update(task, completed=round(spent), description=f"soak, {outcomes.total()} requests")
                    await asyncio.sleep(1)

            await asyncio.gather(kills(), shows(), *(asks(place) for place in range(connections)))
        after = resident_mb(pid), open_files(pid)
    for said in malformed[:5]:
        console.print(f"[red]{said}[/red]", highlight=False)
    first = before or after
    return {
        "requests": outcomes.total() + len(malformed),
        "outcomes": dict(outcomes.most_common()),
        "malformed": len(malformed),
        "kills": len(back),
        "back_after_s": back,
        "memory_mb": [first[0], after[0]],
        "open_files": [first[1], after[1]],
    }


def _kill_and_start(engine: Engine, url: str) -> float | None:
    """Kills vLLM with all its processes, starts it again; seconds from then to the guard's being ready, None: never."""
    assert engine._process is not None
    for process in psutil.Process(engine._process.pid).children(recursive=True):
        process.kill()
    engine.stop()
    began = time.monotonic()
    engine.start()
    while time.monotonic() - began < START_SECONDS:
        if is_healthy(url, path="/ready"):
            return round(time.monotonic() - began, 1)
        time.sleep(0.5)
    return None


async def _one(session: aiohttp.ClientSession, url: str, fields: dict[str, Any]) -> str:
    """How a request ended: valid, or the code of its error. Raises whatever is wrong with an answer that is neither."""
    body = {"model": "m", "messages": [{"role": "user", "content": "17+25="}], "max_tokens": 60, **fields}
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        content = await answer.read()
        if answer.content_type == "text/event-stream":
            return _stream(content, "response_format" in fields)
        value = json.loads(content)
        if answer.status != 200:
            return str(value["error"]["code"])
        return _text(value["choices"][0]["message"]["content"] or "", "response_format" in fields)


def _stream(content: bytes, checked: bool) -> str:
    parts = [part for part in content.decode().split("\n\n") if part.strip() and not part.startswith(":")]
    if parts.pop() != "data: [DONE]":
        raise ValueError("a stream without [DONE]")
    events = [json.loads(part.removeprefix("data: ")) for part in parts]
    if events and "error" in events[-1]:
        return str(events[-1]["error"]["code"])
    return _text("".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]), checked)


def _text(text: str, checked: bool) -> str:
    if checked and (wrong := Checker(SCHEMA).violations(json.loads(text))):
        raise ValueError(wrong[0].message)
    return "valid"


if __name__ == "__main__":
    run_main(main)
