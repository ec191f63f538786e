"""New gates for a running server: vLLM stands still for as long as its workers read a few megabytes.

    swap_gates("http://127.0.0.1:41233", Path("runs/demo/fused/gates.safetensors")).still_s    # 0.06

Requests under way wait and go on with the new gates: what was computed of them by the old ones is dropped and computed
again, as are cached prefixes, so that every later answer is that of a fresh start. The routes for this are vLLM's
development routes (recipe: serving.live_gates); the guard passes none of them on.
"""

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusion.architecture import GATES_FILE
from fusion.errors import UserError
from fusion.recipe import Recipe
from serving.ask import STATE
from serving.client import reason
from serving.serve import find_state, manifest_shards, terminate_like_interrupt, write_state

TIMEOUT_S = 300.0  # a step under way ends first, which may be a long prompt's on a CPU


def tell_server(recipe: Recipe) -> str | None:
    """Gives the recipe's running server the fused model's gates; a line on what became of it.

    None where no server runs, or it has those gates. Raises UserError where vLLM does not take them.
    """
    place, folder = recipe.folder / STATE, recipe.fused
    state, shards = find_state(place, recipe.name), manifest_shards(folder)
    if state is None or state.shards == shards:
        return None
    if Path(state.checkpoint) != folder.absolute():
        return f"the server at {state.url} serves {state.checkpoint}, whose gates stay as they are"
    restart = f"until it is restarted (requests under way get {recipe.serving.guard.drain_s:g} s to end)"
    if {**state.shards, GATES_FILE: None} != {**shards, GATES_FILE: None}:
        return f"the server at {state.url} serves the experts and attention of before {restart}"
    if not state.live_gates:
        return f"the server at {state.url} serves the gates of before {restart}: serving.live_gates spares that"
    try:
        with terminate_like_interrupt():  # an engine must not be left paused
            swap = swap_gates(state.engine, folder / GATES_FILE)
    except UserError as error:
        raise UserError(
            f"the gates are in place, but the server at {state.url} goes on without them: {error}"
        ) from None
    write_state(place, replace(state, shards=shards))
    step = f"(the step under way took {swap.step_s:.2f} s more to end)"
    return f"the server at {state.url} has them as well, after {swap.still_s:.2f} s without service {step}"


@dataclass(frozen=True)
class Swap:
    """Seconds that a swap took: until the step under way had ended, and from then on without service."""

    step_s: float
    still_s: float


def swap_gates(engine: str, file: Path) -> Swap:
    """Puts the gate shard `file` into the vLLM at address `engine`.

    Raises UserError where the engine does not take the gates; it then goes on with those that it had.
    """
    wanted, called = hashlib.sha256(file.read_bytes()).hexdigest(), time.monotonic()
    with _paused(engine):
        begin = time.monotonic()
        try:
            told = _workers(engine, "load_gates", str(file.absolute()))
            for row in told:
                if row.get("sha256") != wanted:
                    why = row.get("error", f"{file} changed meanwhile")
                    raise UserError(f"vLLM at {engine} did not take the gates ({why}): run the command again")
            if not _post(engine, "/reset_prefix_cache?reset_running_requests=true").get("success"):
                raise UserError(
                    f"vLLM at {engine} keeps what it has cached with the gates of before: restart the server"
                )
        except BaseException:
            _workers(engine, "put_back_gates")
            raise
    return Swap(begin - called, time.monotonic() - begin)


@contextmanager
def _paused(engine: str) -> Iterator[None]:
    """Inside, the engine computes nothing and its requests wait."""
    try:
        _post(engine, "/pause?mode=keep&clear_cache=false")
        yield
    finally:
        _post(engine, "/resume")


def _workers(engine: str, method: str, *args: str) -> list[Any]:
    """What each worker returns of a method."""
    results = _post(engine, "/collective_rpc", {"method": method, "args": args}).get("results")
    if not isinstance(results, list):
        raise UserError(f"{engine} does not say what its workers made of {method}: restart the server")
    return results


def _post(engine: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object that vLLM answers with. Raises UserError where it does not answer, or not with success."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(engine + path, json.dumps(body or {}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise UserError(f"vLLM at {engine} answered {error.code} to {path}: {reason(error)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"vLLM at {engine} did not answer {path} ({error}): restart the server") from None
    return found
