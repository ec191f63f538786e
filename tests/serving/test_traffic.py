"""Mixed traffic: requests in their orders, each at its expert, adapters that are the experts, ratios of figures."""

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusion.checkpoint import read_json
from fusion.data import load_examples
from fusion.encoding import load_tokenizer
from fusion.errors import UserError
from fusion.merge import merge
from fusion.plan.budget import kv_bytes_per_token, planned_dtype
from fusion.recipe import Recipe
from fusion.recipe_file import as_file, load_recipe
from fusion.sources import anchor_source
from serving.bench.traffic import __main__ as traffic
from serving.bench.traffic import sides
from serving.bench.traffic.__main__ import LEAST_KV, Round, _check_room, _kv_bytes, _picked, _rates, _ratios, _with_top
from serving.bench.traffic.load import KEPT
from serving.bench.traffic.router import expert_of, question_of
from serving.bench.traffic.sides import (
    PLACEMENTS,
    Side,
    _placed,
    fused,
    lora,
    router,
    separate,
    served,
    total_memory,
    weight_bytes,
)
from serving.bench.traffic.trace import BURST, LEAST, MOST, lengths, trace, write
from serving.engine import EngineSettings, Hardware, detect_hardware, engine_arguments
from tests.recipes import make_recipe, recipe_data
from tests.serving.processes import all_gone, descendants

RULES = {"math": [{"pattern": r"\d"}], "coding": [{"words": ["def", "class", "import", "for"]}]}


@pytest.fixture
def recipe(tmp_path: Path, anchor: Path) -> Recipe:
    data = recipe_data(tmp_path, anchor, {"math": anchor, "coding": anchor, "general": anchor})
    for name, rules in RULES.items():
        data["domains"][name]["rules"] = rules
    return Recipe.model_validate(data)


@pytest.mark.parametrize("order", ["evenly", "bursts"])
def test_every_domain_has_its_share_of_the_requests(recipe: Recipe, anchor: Path, order: Any) -> None:
    rows = trace(recipe, load_tokenizer(anchor), 48, order)
    domains = [row["domain"] for row in rows]
    assert len(rows) == 48 and {domains.count(name) for name in recipe.domains} == {16}
    assert all(LEAST <= row["output_tokens"] <= MOST for row in rows)
    runs = [len({*domains[i : i + BURST]}) for i in range(0, 48, BURST)]
    assert set(runs) == ({3} if order == "evenly" else {1})
    assert rows == trace(recipe, load_tokenizer(anchor), 48, order)
    fewer = [row["domain"] for row in trace(recipe, load_tokenizer(anchor), 10, order)]
    assert sorted(fewer.count(name) for name in recipe.domains) == [3, 3, 4]


def test_a_requests_tokens_are_those_of_its_row(recipe: Recipe, anchor: Path) -> None:
    tokenizer = load_tokenizer(anchor)
    rows = trace(recipe, tokenizer, 6, "evenly")
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert row["prompt_tokens"] == len(asked)
    told = [{"prompt_tokens": 3, "output_tokens": 8}, {"prompt_tokens": 8, "output_tokens": 9}]
    assert lengths(told) == {
        "prompt_tokens": {"least": 3, "mean": 5.5, "most": 8},
        "output_tokens": {"least": 8, "mean": 8.5, "most": 9},
    }


def test_requests_are_written_as_vllms_generator_reads_them(tmp_path: Path, recipe: Recipe, anchor: Path) -> None:
    path = write(tmp_path / "deep" / "evenly.jsonl", trace(recipe, load_tokenizer(anchor), 3, "evenly"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3 and all({"prompt", "prompt_tokens", "output_tokens"} <= row.keys() for row in rows)


def test_a_question_is_the_last_of_the_user() -> None:
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    assert question_of({"messages": messages}) == "3"
    assert question_of({"prompt": "4"}) == "4"
    parts = [{"type": "text", "text": "5"}, {"type": "text", "text": "6"}]
    assert question_of({"messages": [{"role": "user", "content": parts}]}) == "5\n6"


def test_what_was_picked_counts_and_the_rules_say_the_rest(recipe: Recipe) -> None:
    asked = {"1+2=": "math", "import os": "coding", "Who lives here?": "general"}
    assert {question: expert_of(recipe, question, {}) for question in asked} == asked
    assert expert_of(recipe, "Who lives here?", {"Who lives here?": "coding"}) == "coding"


def test_questions_without_a_rule_are_picked_by_the_classifier(tmp_path: Path, recipe: Recipe) -> None:
    [trained] = [row.question for row in load_examples(recipe.domains["general"].train, "general", 1, 0)]
    path = write(tmp_path / "rows.jsonl", [{"prompt": question} for question in ("1+2=", trained, "1+2=")])
    assert json.loads(_picked(recipe, {"evenly": path}, tmp_path / "p.json").read_text()) == {
        "1+2=": "math",
        trained: "general",
    }


class _Echo(BaseHTTPRequestHandler):
    """Streams the model that it was asked for, piece by piece."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for piece in (self.server.server_address[1], body["model"], self.path):
            self.wfile.write(f"data: {piece}\n\n".encode())
            self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def echo() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_router_asks_the_expert_of_the_question(tmp_path: Path, recipe: Recipe) -> None:
    with echo() as first, echo() as second:
        targets = {name: (f"http://127.0.0.1:{first}", name) for name in ("math", "general")}
        targets["coding"] = (f"http://127.0.0.1:{second}", "adapter")
        with router(recipe, targets) as url:
            for question, port, model in (("1+2=", first, "math"), ("import os", second, "adapter")):
                connection = http.client.HTTPConnection(url.removeprefix("http://"))
                body = {"model": "any", "messages": [{"role": "user", "content": question}]}
                connection.request(
                    "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
                )
                answer = connection.getresponse()
                assert answer.headers["content-type"].startswith("text/event-stream")
                said = answer.read().decode().split("\n\n")
                assert said[:3] == [f"data: {port}", f"data: {model}", "data: /v1/chat/completions"]


PROGRAM = """
import sys, time
from pathlib import Path
from fusion.recipe_file import load_recipe
from serving.bench.traffic.sides import router

with router(load_recipe(Path(sys.argv[1])), {}) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def test_the_router_ends_with_a_parent_that_is_killed(recipe: Recipe) -> None:
    with as_file(recipe) as path:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline().startswith("http")
        running = descendants(process.pid)
        process.kill()
        process.communicate()
        assert len(running) >= 2 and all_gone(running)


def test_every_side_has_the_same_memory(
    tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and KV cache of the engines that each side starts; of adapters what vLLM keeps for them."""
    recipe = make_recipe(tmp_path, anchor, anchored_experts)
    merge(recipe)
    count = len(recipe.experts)
    stored = sum(path.stat().st_size for path in anchor.glob("*.safetensors"))  # in float32
    assert weight_bytes(recipe, anchor) == stored // (2 if detect_hardware().bfloat16 else 1)
    memory = total_memory(recipe, 10**6)
    assert memory == count * (weight_bytes(recipe, anchor) + 10**6)
    started: list[EngineSettings] = []

    @contextmanager
    def engine(settings: EngineSettings, log: Path, hardware: Hardware | None = None) -> Iterator[Any]:
        started.append(settings)
        log.write_text("GPU KV cache size: 1,234 tokens")
        yield SimpleNamespace(url="http://127.0.0.1:1", log=log)

    monkeypatch.setattr(sides, "Engine", engine)
    monkeypatch.setattr(sides, "extracted", lambda recipe, folder: {"math": tmp_path / "adapter"})
    ways = (
        (fused(recipe, memory, tmp_path), 1),
        (lora(recipe, memory, tmp_path), 1),
        (separate(recipe, 10**6, tmp_path, PLACEMENTS[0]), count),
    )
    for way, engines in ways:
        started.clear()
        with way as side:
            assert side.kv_tokens == 1234 * engines == 1234 * len(started)
            assert side.weights + sum(settings.kv_cache_bytes or 0 for settings in started) == memory


def test_a_benchmark_that_was_stopped_measures_what_is_left(
    tmp_path: Path,
    anchor: Path,
    anchored_experts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Side by side, round by round; the ratios are of all rounds, and of another machine nothing is taken over."""
    data = recipe_data(tmp_path, anchor, anchored_experts)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    merge(load_recipe(path))
    started: list[str] = []
    left = [4]  # sides until it is killed

    def way(name: str) -> Any:
        @contextmanager
        def begin(*given: Any) -> Iterator[Side]:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            started.append(name)
            said = f"separate, {given[3]}" if name == "separate" else {"lora": "anchor with LoRA adapters"}.get(name)
            yield Side(said or name, "http://127.0.0.1:1", name, 10, 100)

        return begin

    for name in ("fused", "lora", "separate", "alone"):
        monkeypatch.setattr(traffic, name, way(name))
    monkeypatch.setattr(traffic, "drive", lambda *given: [dict.fromkeys(KEPT, 2.0) for _ in given[3]])
    command = (str(path), "--requests", "6", "--rounds", "2", "--rates", "1,2", "--placements", "1")
    with pytest.raises(KeyboardInterrupt):
        traffic.main(*command)
    assert started == ["fused", "lora", "separate", "alone"]
    left[0] = 100
    traffic.main(*command)
    assert started[4:] == ["alone", "alone", "separate", "lora", "fused", *["alone"] * 3]  # the second round backwards
    ratios = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert ratios.keys() == RATIOS and set(ratios.values()) == {1.0}
    traffic.main(*command)
    assert len(started) == 12  # all is there
    with pytest.raises(UserError, match="--kv-mb are greater than 0"):
        traffic.main(*command, "--kv-mb", "0")
    monkeypatch.setattr(traffic, "made", lambda: {"processor": "another"})
    traffic.main(*command)
    assert len(started) == 24


@pytest.mark.parametrize("rates", ["", "0", "1,-2", "fast", "inf"])
def test_rates_are_numbers_of_arrivals(rates: str) -> None:
    with pytest.raises(UserError, match="--rates"):
        _rates(rates)


def test_sides_that_the_machine_cannot_hold_are_refused(recipe: Recipe) -> None:
    _check_room(recipe, 10**6)
    with pytest.raises(UserError, match="--kv-mb"):
        _check_room(recipe, 10**15)


def test_the_kv_cache_is_two_sequences_or_what_there_is_room_for(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _kv_bytes(recipe) == LEAST_KV
    monkeypatch.setattr(traffic, "LEAST_KV", 1)
    told = read_json(anchor_source(recipe).folder / "config.json")
    wanted = _kv_bytes(recipe)
    assert wanted == 2 * recipe.serving.max_model_len * kv_bytes_per_token(told, 1, served(recipe, planned_dtype(told)))
    monkeypatch.setattr(traffic, "_room", lambda recipe: total_memory(recipe, wanted // 3))
    assert _kv_bytes(recipe) == wanted // 3


@pytest.mark.parametrize("cores", [(0,), (0, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_engines_are_placed_on_cores_that_are_there(placement: str, cores: tuple[int, ...]) -> None:
    placed = [_placed(Hardware(0, cores), placement, number).cores for number in range(5)]
    assert all(placed) and all(set(mine) <= set(cores) for mine in placed)
    if placement == PLACEMENTS[0]:
        assert set(placed) == {cores}
    elif len(cores) > 1:
        assert {len(mine) for mine in placed} == {1} and {core for mine in placed for core in mine} == set(cores)
    assert _placed(Hardware(4, cores), placement, 3) == Hardware(4, cores)


def test_another_number_of_experts_a_token_is_another_config(tmp_path: Path, anchor: Path) -> None:
    recipe = make_recipe(tmp_path, anchor, {"general": anchor, "math": anchor})
    merge(recipe)
    with _with_top(recipe.fused, "top-2") as place:
        assert json.loads((place / "config.json").read_text())["num_experts_per_tok"] == 2
        assert weight_bytes(recipe, place) == weight_bytes(recipe, recipe.fused)
    with _with_top(recipe.fused, "top-1") as place:
        assert place == recipe.fused
    with _with_top(anchor, "dense") as place:
        assert place == anchor


def test_adapters_are_named_to_vllm(tmp_path: Path, anchor: Path) -> None:
    settings = EngineSettings(str(anchor), "anchor", lora_modules=(("math", "/a"), ("coding", "/b")), max_lora_rank=32)
    arguments = engine_arguments(settings, Hardware(0, (0, 1)), 8000)
    assert {"--enable-lora", "--max-loras=2", "--max-lora-rank=32", "math=/a", "coding=/b"} <= set(arguments)
    assert "--enable-lora" not in engine_arguments(EngineSettings(str(anchor), "x"), Hardware(0, (0, 1)), 8000)


def test_ratios_are_of_the_measured_figures() -> None:
    """Each load counts alike, and against the placement that is best by the figure."""

    def side(weights: int, latency: float, throughput: float, tail: float = 2.0) -> dict[str, Any]:
        row = {"mean_e2el_ms": latency, "p95_e2el_ms": tail * latency, "output_throughput": throughput}
        busy = {"mean_e2el_ms": 100 * latency, "p95_e2el_ms": 100 * tail * latency, "output_throughput": 1.0}
        loads = {"evenly, 1 a second": row, "evenly, 4 a second": busy, "evenly, all at once": row | NOT_COUNTED}
        return {"weights": weights, "loads": loads}

    table = {
        "fused": side(3, 62, 30),
        "separate, a": side(5, 100, 20),
        "separate, b": side(5, 200, 25, tail=0.8),
        "anchor with LoRA adapters": side(2, 50, 40),
    }
    decode = {name: {"1": {"median_tpot_ms": ms}} for name, ms in (("dense", 9.0), ("top-1", 10.0), ("top-2", 12.0))}
    assert _ratios(Round(table, decode)) == pytest.approx(
        {
            "mean_latency_vs_separate": 0.62,
            "p95_latency_vs_separate": 124 / 160,
            "throughput_vs_separate": 30 / 25,
            "memory_vs_separate": 0.6,
            "mean_latency_vs_lora": 1.24,
            "decode_top1_vs_dense": 0.9,
            "decode_top2_vs_dense": 0.75,
        }
    )


NOT_COUNTED = {"mean_e2el_ms": 1e9, "p95_e2el_ms": 1e9}
RATIOS = {
    "mean_latency_vs_separate",
    "p95_latency_vs_separate",
    "throughput_vs_separate",
    "memory_vs_separate",
    "mean_latency_vs_lora",
    "decode_top1_vs_dense",
    "decode_top2_vs_dense",
}
