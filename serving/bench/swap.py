"""How long a server gives no service while its gates change, and whether any request notices.

    python -m serving.bench.swap configs/demo.yaml                                      # after `make demo`
    python -m serving.bench.swap configs/demo.yaml --set serving.tensor_parallel_size=2

The fused model is served with its own gates, which are exchanged with others (each expert's row is its neighbour's) and
back while plain and streamed requests are answered. An odd number of times, so that the others are there in the end:
the recipe's questions are asked, one at a time, before the first swap, after the last, and of a server that is started
with those gates. `still` is the time without service, `step` what the step under way took to end before it. The last
line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from fusion.architecture import GATES_FILE
from fusion.errors import UserError, run_main
from fusion.progress import console
from fusion.recipe_file import load_recipe
from serving.ask import engine_settings, guard_settings
from serving.client import chat
from serving.serve import RunningServer, running_server
from serving.swap import swap_gates

PAUSE_S = 1.0  # between two swaps
MAX_TOKENS = 16
USUAL = ("What is the capital of Austria?", "17+25=")  # where the recipe has no questions


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path, help="whose fused model is served")
    parser.add_argument("--swaps", type=int, default=5, help="an odd number")
    parser.add_argument("--clients", type=int, default=4, help="requests under way, half of them streams")
    parser.add_argument("--set", action="append", metavar="SECTION.KEY=VALUE", help="one value of the recipe")
    given = parser.parse_args(arguments)
    if given.swaps < 1 or given.swaps % 2 == 0 or given.clients < 1:
        raise UserError("--swaps is an odd number, and --clients at least 1")
    recipe = load_recipe(given.recipe, given.set)
    settings = replace(engine_settings(recipe), live_gates=True)
    guard = replace(guard_settings(recipe), guard=recipe.serving.guard.model_copy(update={"log": "none"}))
    questions = [row.question for row in recipe.serving.questions] or list(USUAL)
    log = recipe.folder / "logs" / "vllm-swap.log"
    with tempfile.TemporaryDirectory(dir=recipe.folder) as folder:
        other = _with_other_gates(recipe.fused, Path(folder))
        with running_server(settings, guard, log=log) as server:
            assert server.engine is not None
            before, swaps = _answers(server, questions), []
            with _load(server, questions, given.clients) as counted:
                for number in range(given.swaps):
                    time.sleep(PAUSE_S)
                    file = (recipe.fused if number % 2 else other) / GATES_FILE
                    swaps.append(swap_gates(server.engine.url, file))
            swapped = _answers(server, questions)
        with running_server(replace(settings, model=str(other)), guard, log=log) as server:
            fresh = _answers(server, questions)
    found = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "swaps": given.swaps,
        "still_s_median": round(statistics.median(swap.still_s for swap in swaps), 3),
        "still_s_max": round(max(swap.still_s for swap in swaps), 3),
        "step_s_max": round(max(swap.step_s for swap in swaps), 3),
        "requests": counted["ended"],
        "failed": counted["failed"],
        "answers_changed": swapped != before,
        "equals_fresh_start": swapped == fresh,
    }
    table = Table("figure", "value")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    sys.stdout.write(json.dumps(found) + "\n")


def _with_other_gates(fused: Path, folder: Path) -> Path:
    """A checkpoint in `folder` that is the fused one but for gates whose rows have moved on by one expert."""
    from fusion.checkpoint import Checkpoint, link_file
    from fusion.layers import checkpoint_gates
    from gate_training.trainer import install_gates

    for path in fused.iterdir():
        link_file(path, folder / path.name)
    install_gates(folder, {layer: rows.roll(1, 0) for layer, rows in checkpoint_gates(Checkpoint(folder)).items()})
    return folder


def _answers(server: RunningServer, questions: list[str]) -> list[str]:
    """The greedy answers, one after another."""
    asked = [[{"role": "user", "content": question}] for question in questions]
    return [chat(server.url, server.model, row, temperature=0, max_tokens=MAX_TOKENS).text for row in asked]


@contextmanager
def _load(server: RunningServer, questions: list[str], clients: int) -> Iterator[dict[str, int]]:
    """Inside, every client has a request under way; once the block has ended, how many have `ended` and `failed`."""
    counted, over, lock = {"ended": 0, "failed": 0}, threading.Event(), threading.Lock()

    def ask(client: int) -> None:
        number = client
        while not over.is_set():
            good = _ends_well(server, questions[number % len(questions)], stream=client % 2 == 1)
            number += 1
            with lock:
                counted["ended" if good else "failed"] += 1

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield counted
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _ends_well(server: RunningServer, question: str, stream: bool) -> bool:
    """Whether a request is answered to the end."""
    body: dict[str, Any] = {"model": server.model, "messages": [{"role": "user", "content": question}]}
    body |= {"max_tokens": MAX_TOKENS, "stream": stream}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read().decode()
    except OSError:
        return False
    if not stream:
        return bool(json.loads(text)["choices"][0]["finish_reason"])
    return text.rstrip().endswith("data: [DONE]") and '"error"' not in text


if __name__ == "__main__":
    run_main(main)
