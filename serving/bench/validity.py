"""What of the answers of a real model on a real vLLM is valid: with the guard, and in three ways without it.

- guard: constrained by the engine, checked, asked again at most twice
- engine alone: constrained by the engine, taken as it comes
- retry loop: nothing constrained; an answer that does not satisfy the schema is asked for again with the errors, three
  attempts in all, as the house's design has it
- nothing: one attempt, nothing constrained

Every way gets the same prompts, which state the schema, at temperature 0. A request ends in a valid answer, in an
explicit refusal (truncated, past the deadline, a schema that nothing satisfies), or in one that is wrong. The ways
of one request are asked one after another, so that the engine reads its prompt once. Every outcome is written down as
it comes (`logs/validity.jsonl` beside the recipe's run); a run that was interrupted goes on from there (remove the file
where the guard has changed since).
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.table import Table

from fusion.evaluation.intervals import mean_interval
from fusion.json_lines import cut_off_rest, whole_lines
from fusion.progress import console, progress_bar
from fusion.recipe import Recipe
from fusion.sections.serving import Guarding, Sampling
from serving.bench.calls import Call, calls
from serving.engine import EngineSettings
from serving.guard.bodies import decoded
from serving.guard.schema import CheckerCache
from serving.guard.settings import GuardSettings
from serving.guard.upstream import IDLE_S
from serving.guard.wanted import document_violations
from serving.serve import running_server

AT_ONCE = 48
MAX_TOKENS = 256
WINDOW = 4096
REPAIR = "Fix the following JSON errors:\n{errors}"
RIGHT_REFUSALS = ("output_truncated", "deadline", "unsatisfiable_schema")


@dataclass
class Outcome:
    """How one request ended: valid or not, its values right or not (None: any will do), attempts, tokens, refusal."""

    valid: bool
    right: bool | None = None
    attempts: int = 1
    tokens: int = 0
    first_valid: bool = False
    refused: str | None = None


@dataclass
class Way:
    """All outcomes of one way."""

    name: str
    outcomes: list[Outcome] = field(default_factory=list)

    def share(self, key: str) -> float:
        """The share of requests of which `key` holds."""
        return sum(bool(getattr(outcome, key)) for outcome in self.outcomes) / len(self.outcomes)


def run(recipe: Recipe, folder: Path | None, count: int) -> dict[str, Any]:
    """Asks everything in every way, prints the table, returns the figures of the benchmark's last line."""
    asked = calls(folder, count)
    model = served_model(recipe)
    whose = "BFCL's calls" if folder else "generated extractions (--bfcl names a folder of BFCL's calls)"
    console.print(f"{len(asked)} requests to {model}: {whose} and hard schemas", highlight=False, soft_wrap=True)
    engine = EngineSettings(
        model,
        "m",
        dtype=recipe.serving.dtype,
        tensor_parallel_size=recipe.serving.tensor_parallel_size,
        gpu_memory_utilization=recipe.serving.gpu_memory_utilization,
        max_model_len=WINDOW,
        cpu_kv_cache_bytes=max(recipe.serving.cpu_kv_cache_bytes, 2**30),
    )
    settings = GuardSettings("", Guarding(), Sampling(temperature=0.0, max_tokens=MAX_TOKENS), WINDOW)
    kept = Kept(recipe.folder / "logs" / "validity.jsonl", model, recipe.serving.dtype)
    with running_server(engine, settings, log=recipe.folder / "logs" / "bench.log") as server:
        assert server.engine is not None
        ways = asyncio.run(_ask_all(server.url, server.engine.url, asked, kept))
    kept.path.unlink()
    _print(ways)
    guard, alone, retried, once = ways
    answers = zip(guard.outcomes, alone.outcomes, retried.outcomes, once.outcomes, strict=True)
    explicit = [_right(mine, others) for mine, *others in answers]
    for call, outcome, is_right in zip(asked, guard.outcomes, explicit, strict=True):
        if not is_right:
            said = f"not as it should be ({outcome.refused}): {call.question[:100]!r}, {json.dumps(call.schema)[:200]}"
            console.print(said, highlight=False, soft_wrap=True, markup=False)
    return {
        "valid_or_explicit": round(sum(explicit) / len(explicit), 4),
        "valid_after_ladder": round(guard.share("valid"), 4),
        "first_attempt_valid": round(guard.share("first_valid"), 4),
        "engine_alone_valid": round(alone.share("valid"), 4),
        "retry_loop_valid": round(retried.share("valid"), 4),
    }


def _right(guarded: Outcome, others: Iterable[Outcome]) -> bool:
    """Whether an answer of the guard's is valid or explicit; what another way has an answer to can be satisfied."""
    if guarded.refused == "unsatisfiable_schema":
        return not any(other.valid for other in others)
    return guarded.valid or guarded.refused in RIGHT_REFUSALS


def served_model(recipe: Recipe) -> str:
    """The fused model, or the anchor as it is."""
    if (recipe.fused / "config.json").is_file():
        return str(recipe.fused)
    from fusion.sources import anchor_source

    return str(anchor_source(recipe).folder)


class Kept:
    """The outcomes of a run that may be interrupted, a line each; those of another model or request are not found."""

    def __init__(self, path: Path, model: str, dtype: str) -> None:
        self.path = path
        stat = (Path(model) / "config.json").stat()
        self._model = [str(Path(model).resolve()), stat.st_mtime_ns, dtype, MAX_TOKENS, WINDOW]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._outcomes = {key: Outcome(**outcome) for key, outcome in map(json.loads, whole_lines(path))}
        cut_off_rest(path)

    def key(self, way: str, call: Call) -> str:
        """What an outcome is found by."""
        return hashlib.sha256(json.dumps([self._model, way, astuple(call)]).encode()).hexdigest()

    def get(self, key: str) -> Outcome | None:
        """The outcome of an earlier run."""
        return self._outcomes.get(key)

    def add(self, key: str, outcome: Outcome) -> None:
        """Writes it down at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, asdict(outcome)]) + "\n")


async def _ask_all(guard: str, engine: str, asked: list[Call], kept: Kept) -> list[Way]:
    checkers = CheckerCache(len(asked))
    gate = asyncio.Semaphore(AT_ONCE)
    asks = {"guard": _guarded, "engine alone": _constrained, "retry loop": _retried, "nothing": _once}
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        with progress_bar() as bar:
            task = bar.add_task("structured answers", total=len(asked) * len(asks), unit="requests")

            async def ask(call: Call) -> list[Outcome]:
                outcomes = []
                async with gate:
                    for way, one in asks.items():
                        key = kept.key(way, call)
                        if (outcome := kept.get(key)) is None:
                            outcome = await one(session, guard if way == "guard" else engine, call, checkers)
                            if outcome.refused != "upstream_unavailable":  # as it is while a run is interrupted
                                kept.add(key, outcome)
                        outcomes.append(outcome)
                        bar.advance(task)
                return outcomes

            rows = await asyncio.gather(*map(ask, asked))
    return [Way(name, list(outcomes)) for name, outcomes in zip(asks, zip(*rows, strict=True), strict=True)]


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with session.post(f"{url}/v1/chat/completions", json={"model": "m", **body}) as answer:
        return answer.status, decoded(await answer.read())


def _messages(call: Call) -> list[dict[str, str]]:
    return [{"role": "user", "content": call.prompt}]


def _format(call: Call) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": call.schema}}


async def _guarded(session: aiohttp.ClientSession, url: str, call: Call, checkers: CheckerCache) -> Outcome:
    status, answer = await _post(session, url, {"messages": _messages(call), "response_format": _format(call)})
    if status != 200:
        error = answer["error"]
        attempts = error.get("attempts") or []
        return Outcome(False, attempts=len(attempts), tokens=_tokens(error), refused=str(error["code"]))
    attempts = answer["guard"]["attempts"]
    outcome = _judged(answer, call, checkers)
    outcome.attempts, outcome.first_valid = len(attempts), len(attempts) == 1
    return outcome


async def _constrained(session: aiohttp.ClientSession, url: str, call: Call, checkers: CheckerCache) -> Outcome:
    body = {"messages": _messages(call), "response_format": _format(call), "temperature": 0, "max_tokens": MAX_TOKENS}
    status, answer = await _post(session, url, body)
    return _judged(answer, call, checkers) if status == 200 else Outcome(False, refused=f"status {status}")


async def _once(session: aiohttp.ClientSession, url: str, call: Call, checkers: CheckerCache) -> Outcome:
    body = {"messages": _messages(call), "temperature": 0, "max_tokens": MAX_TOKENS}
    status, answer = await _post(session, url, body)
    return _judged(answer, call, checkers) if status == 200 else Outcome(False, refused=f"status {status}")


async def _retried(session: aiohttp.ClientSession, url: str, call: Call, checkers: CheckerCache) -> Outcome:
    messages, outcome, tokens = _messages(call), Outcome(False), 0
    for attempt in range(1, 4):
        status, answer = await _post(session, url, {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS})
        if status != 200:  # its messages have outgrown the window
            return Outcome(False, attempts=attempt, tokens=tokens, refused=f"status {status}")
        outcome = _judged(answer, call, checkers)
        tokens += outcome.tokens
        outcome.attempts, outcome.tokens, outcome.first_valid = attempt, tokens, attempt == 1 and outcome.valid
        if outcome.valid:
            return outcome
        text = answer["choices"][0]["message"]["content"] or ""
        errors = "\n".join(
            f"{v.path or '/'}: {v.detail or v.message}" for v in document_violations(text, checkers.get(call.schema))
        )
        messages = [*messages, {"role": "assistant", "content": text}]
        messages.append({"role": "user", "content": REPAIR.format(errors=errors)})
    return outcome


def _judged(answer: dict[str, Any], call: Call, checkers: CheckerCache) -> Outcome:
    """The outcome of an answer, judged here whoever has judged it before."""
    text = answer["choices"][0]["message"]["content"] or ""
    if document_violations(text, checkers.get(call.schema)):
        return Outcome(False, tokens=_tokens(answer))
    return Outcome(True, call.right(decoded(text.encode())), tokens=_tokens(answer), first_valid=True)


def _tokens(answer: dict[str, Any]) -> int:
    return int((answer.get("usage") or {}).get("completion_tokens") or 0)


def _print(ways: list[Way]) -> None:
    table = Table(title="structured answers of a real model")
    for name in ("", "valid (95%)", "at the first attempt", "values right", "attempts", "tokens", "refused"):
        table.add_column(name, justify="left" if name in ("", "refused") else "right")
    for way in ways:
        found = way.outcomes
        valid = mean_interval([float(outcome.valid) for outcome in found])
        known = [outcome.right is True for outcome in found if outcome.right is not None or not outcome.valid]
        refusals = Counter(outcome.refused for outcome in found if outcome.refused)
        table.add_row(
            way.name,
            f"{way.share('valid'):.3f} ({valid.low:.3f} to {valid.high:.3f})",
            f"{way.share('first_valid'):.3f}",
            f"{sum(known) / max(1, len(known)):.3f}",
            f"{sum(outcome.attempts for outcome in found) / len(found):.2f}",
            f"{sum(outcome.tokens for outcome in found) / len(found):.0f}",
            ", ".join(f"{count} {name}" for name, count in refusals.most_common()),
        )
    console.print(table)
