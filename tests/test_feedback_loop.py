"""The whole loop: serve, be misrouted, say so, retrain, and the running server routes paraphrases right, under load."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion import road
from fusion.recipe_file import load_recipe
from serving.ask import STATE
from serving.serve import find_server
from tests.recipes import recipe_data

NAMES, THINGS = ("Ann", "Bob", "Eve", "Sam"), ("sun", "sea", "hat", "dog")
ASKED = [f"Please tell my friend {name} about the {thing}." for name in NAMES for thing in THINGS]
PARAPHRASES = [f"Could you tell {name} of the {thing}?" for name in ("Ann", "Tim") for thing in ("sea", "cat", "sun")]
SETTINGS = {"rows": 4, "held_out_rows": 4, "feedback_margin": 1.0}  # random experts: any answer is as bad as another
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "QWEN_FUSION_QUIET": "1"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, anchor: Path, anchored_experts: dict[str, Path]) -> Path:
    """A recipe whose fused model has trained gates, to be served with records and live gates."""
    folder = tmp_path_factory.mktemp("loop")
    data = recipe_data(folder, anchor, anchored_experts, gate_training=SETTINGS)
    data["evaluation"] = {"max_new_tokens": 12}
    records = {"prompts": True, "explain_share": 1.0}
    data["serving"] |= {
        "dtype": "float32",
        "port": 0,
        "cpu_kv_cache_bytes": 64 << 20,
        "live_gates": True,
        "guard": {"records": records, "log": "none"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    recipe = load_recipe(path, [])
    road.merge(recipe)
    road.train_gates(recipe)
    return path


@pytest.fixture(scope="module")
def url(path: Path) -> Iterator[str]:
    """The guard of the recipe's server, as `qwen-fusion serve` runs it."""
    state = load_recipe(path, []).folder / STATE
    process = subprocess.Popen([sys.executable, "-m", "fusion.cli", "serve", str(path)], env=OFFLINE)
    try:
        until = time.monotonic() + 400
        while (found := find_server(state)) is None:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        yield found.url
    finally:
        process.terminate()
        process.wait(60)


def call(url: str, where: str, body: Any = None) -> tuple[dict[str, Any], str]:
    """The JSON of an answer, and the request's id."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + where, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer), answer.headers["x-request-id"]


def ask(url: str, question: str) -> str:
    """Asks, and returns the request's id."""
    messages = [{"role": "user", "content": question}]
    body = {"model": "test", "messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return call(url, "/v1/chat/completions", body)[1]


def routed(url: str, ids: list[str]) -> dict[str, float]:
    """The experts' mean shares of requests, once the background pass has computed them."""
    records = []
    until = time.monotonic() + 240
    for request_id in ids:
        while not (record := call(url, f"/v1/routing/{request_id}")[0])["shares"]:
            assert time.monotonic() < until, "the background pass has not explained a request"
            time.sleep(0.2)
        assert record["shares_source"] == "explain" and record["channel"] == "default"  # no rule of the recipe speaks
        records.append(record["shares"]["all"])
    return {name: sum(shares[name] for shares in records) / len(records) for name in records[0]}


class Load(threading.Thread):
    """Asks without a pause, plain and streamed in turn, until it is stopped; `failed` says what went wrong."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self._host, self._number = url.removeprefix("http://"), number
        self.over, self.done, self.failed = threading.Event(), 0, []  # type: ignore[var-annotated]

    def run(self) -> None:
        while not self.over.is_set():
            stream = bool(self.done % 2)
            body = {"model": "test", "prompt": f"{self._number}", "max_tokens": 24, "stream": stream}
            connection = http.client.HTTPConnection(self._host, timeout=120)
            try:
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                answer = connection.getresponse()
                said = answer.read().decode()
                if answer.status != 200 or (stream and not said.rstrip().endswith("[DONE]")):
                    self.failed.append(said)
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
            finally:
                connection.close()
            self.done += 1


def test_people_say_so_and_the_running_server_routes_paraphrases_right(path: Path, url: str) -> None:
    before = routed(url, [ask(url, question) for question in PARAPHRASES])
    right = min(
        before, key=lambda name: before[name]
    )  # the expert that they hardly go to, it is said, is the right one
    for question in ASKED:
        said = {"request_id": ask(url, question), "rating": "down", "domain": right}
        assert call(url, "/v1/feedback", said)[0]["text_kept"]

    load = [Load(url, number) for number in range(3)]
    for thread in load:
        thread.start()
    retrain = [sys.executable, "-m", "fusion.cli", "train-gates", str(path), "--with-feedback"]
    trained = subprocess.run(retrain, env=OFFLINE, capture_output=True, text=True)
    during = [thread.done for thread in load]
    time.sleep(1)
    for thread in load:
        thread.over.set()
        thread.join(120)
    assert trained.returncode == 0, trained.stderr
    assert f"{len(ASKED)} questions of feedback" in trained.stderr and "without service" in trained.stderr
    assert [thread.failed for thread in load] == [[], [], []]
    assert all(thread.done > count for thread, count in zip(load, during, strict=True))  # and it goes on afterwards

    after = routed(url, [ask(url, question) for question in PARAPHRASES])
    assert after[right] > before[right] + 0.2, (right, before, after)

    back = subprocess.run([*retrain[:3], "rollback", str(path)], env=OFFLINE, capture_output=True, text=True)
    assert back.returncode == 0 and "without service" in back.stderr, back.stderr
    assert routed(url, [ask(url, question) for question in PARAPHRASES]) == pytest.approx(before, abs=1e-3)
