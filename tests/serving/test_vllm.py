"""One real vLLM on the CPU with a tiny random model, the guard in front, started as the command line starts it."""

import http.client
import json
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.plan.budget import kv_bytes_per_token
from fusion.plan.capacity import BLOCK_CPU, kv_blocks, logged_tokens
from serving.client import chat, served_models
from serving.engine import EngineSettings
from tests.families import write_model
from tests.serving.apart import guard_apart, serve_apart
from tests.serving.processes import all_gone, descendants

USER = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "ok": {"type": "boolean"},
        "kind": {"enum": ["small", "large"]},
        "unit": {"enum": ["kg", None]},
    },
    "required": ["name", "ok", "kind", "unit"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model that is served lies, and vLLM's log."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The serving process and its address."""
    model = write_model(folder / "model", seed=3)
    settings = EngineSettings(
        str(model),
        "tiny",
        dtype="float32",
        max_model_len=1024,
        yarn_factor=2.0,
        cpu_kv_cache_bytes=64 << 20,
        compact_json=True,
    )
    process, url = serve_apart(settings, folder, within_s=400)
    yield process, url
    process.terminate()
    process.communicate(timeout=40)


@pytest.fixture(scope="module")
def url(server: tuple[subprocess.Popen[str], str]) -> str:
    return server[1]


def test_chat_passes_through(url: str) -> None:
    answer = chat(url, "tiny", USER, max_tokens=8)
    assert answer.attempts == 1
    assert answer.usage["completion_tokens"] <= 8
    again = chat(url, "tiny", USER, max_tokens=8, temperature=0)
    assert again.text == chat(url, "tiny", USER, max_tokens=8, temperature=0).text


def test_the_kv_cache_is_as_large_as_planned(url: str, folder: Path) -> None:
    config = read_json(folder / "model" / "config.json")
    planned = kv_blocks(64 << 20, kv_bytes_per_token(config, 1, "float32"), BLOCK_CPU)
    logged = re.search(r"CPU KV cache size: ([\d,]+) tokens", (folder / "vllm.log").read_text())
    assert logged
    assert int(logged[1].replace(",", "")) == logged_tokens(planned, BLOCK_CPU, 1024)


def test_a_request_without_max_tokens_fits_the_window(url: str) -> None:
    answer = chat(url, "tiny", USER, stop=["e"])
    assert answer.finish_reason in ("stop", "length")


def test_streams_pass_through(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chunks = list(client.chat.completions.create(model="tiny", messages=USER, stream=True, max_tokens=8))  # type: ignore[call-overload]
    assert len(chunks) > 2
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize("stream", [False, True])
def test_json_follows_the_schema(url: str, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    fields = {"model": "tiny", "messages": USER, "response_format": FORMAT, "max_tokens": 300}
    if stream:
        chunks = client.chat.completions.create(**fields, stream=True)  # type: ignore[call-overload]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**fields, n=2).choices[1].message.content  # type: ignore[call-overload]
    value = json.loads(text)
    assert set(value) == set(SCHEMA["properties"])
    assert isinstance(value["ok"], bool)


def test_tool_calls_are_switched_on(url: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert chat(url, "tiny", USER, max_tokens=4, tools=[tool], tool_choice="auto").finish_reason


@pytest.mark.parametrize("path", ["/pause", "/load", "/v1/../metrics"])
def test_control_routes_are_not_reachable(url: str, path: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", path)
    assert connection.getresponse().status == 404


def test_no_route_of_the_engine_is_reachable_but_those_that_are_guarded_and_those_with_a_key(
    server: tuple[subprocess.Popen[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0") for pid in descendants(server[0].pid)]
    (port,) = {part.removeprefix("--port=") for command in commands for part in command if part.startswith("--port=")}
    engine = f"http://127.0.0.1:{port}"
    with urllib.request.urlopen(f"{engine}/openapi.json") as answer:
        routes = json.load(answer)["paths"]
    assert {"/v1/chat/completions", "/v1/responses", "/invocations", "/tokenize"} <= set(routes)
    open_ = {
        ("/health", "get"): 200,
        ("/metrics", "get"): 200,  # the guard's own
        ("/v1/models", "get"): 200,
        ("/v1/chat/completions", "post"): 400,  # the body is {}
        ("/v1/completions", "post"): 400,
    }
    monkeypatch.setenv("QWEN_FUSION_API_KEYS", "a key")
    process, url = guard_apart(engine)

    def status(method: str, path: str, **headers: str) -> int:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.request(method.upper(), path, b"{}", {"content-type": "application/json", **headers})
        return connection.getresponse().status

    try:
        for path, methods in routes.items():
            for method in methods:
                assert status(method, path) == (200 if path == "/health" else 401), (method, path)
                given = status(method, path, authorization="Bearer a key")
                assert given == open_.get((path, method), 404), (method, path)
        assert chat(url, "tiny", USER, max_tokens=2, api_key="a key").attempts == 1
        checked = chat(url, "tiny", USER, max_tokens=300, api_key="a key", response_format=FORMAT)
        assert set(json.loads(checked.text)) == set(SCHEMA["properties"])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_schema_that_the_engine_refuses_is_kept_all_the_same(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    schema = {"type": "integer", "multipleOf": 3}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    with pytest.raises(openai.UnprocessableEntityError) as caught:  # a random model writes no number by itself
        client.chat.completions.create(model="tiny", messages=USER, response_format=wanted, max_tokens=8)  # type: ignore[call-overload]
    error = caught.value.response.json()["error"]
    assert error["grammar"] == "refused" and len(error["attempts"]) == 3
    assert error["unenforced"][0]["keyword"] == "multipleOf"


def test_a_tool_whose_parameters_the_grammar_cannot_express_is_left_to_the_model_in_the_end(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 3}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(openai.UnprocessableEntityError) as caught:  # a random model calls no tool by itself
        client.chat.completions.create(
            model="tiny",
            messages=USER,  # type: ignore[arg-type]
            tools=tools,  # type: ignore[arg-type]
            tool_choice="required",
            max_tokens=8,
        )
    error = caught.value.response.json()["error"]
    assert [attempt["constrained"] for attempt in error["attempts"]] == [True, True, False]
    assert error["attempts"][-1]["errors"][0]["keyword"] in ("no_tool_call", "output_truncated")
    assert (error["unenforced"][0]["path"], error["unenforced"][0]["keyword"]) == (
        "/tools/f/properties/a",
        "multipleOf",
    )


def test_vllms_load_generator_measures_what_was_asked(url: str, folder: Path, tmp_path: Path) -> None:
    from serving.bench.traffic.load import KEPT, Load, drive
    from serving.bench.traffic.trace import write

    rows = [{"prompt": question, "output_tokens": 8} for question in ("one?", "two?", "three?")]
    path = write(tmp_path / "rows.jsonl", rows)
    busy, paced = drive(url, "tiny", folder / "model", [Load(path, at_once=2), Load(path, rate=20)], tmp_path)
    for figures in (busy, paced):
        assert set(figures) == set(KEPT) and figures["completed"] == 3
        assert figures["output_throughput"] * figures["duration"] == pytest.approx(3 * 8)
    with pytest.raises(UserError, match="3 of 3 requests"):
        drive(url, "nobody", folder / "model", [Load(path, at_once=2)], tmp_path)


def test_the_harness_asks_through_the_guard(url: str, folder: Path, tmp_path: Path) -> None:
    """Answers through the chat route and likelihoods through the completions route, each against a plain request."""
    from fusion.data import chat as row
    from fusion.evaluation.harness import CONFIGS, TaskFile, load_tasks, rows_of, run_tasks
    from fusion.evaluation.harness_metrics import row_of
    from fusion.evaluation.harness_models import Served

    assert [model["id"] for model in served_models(url)] == ["tiny"]
    questions = ["one?", "two?", "three?"]
    answers = [
        chat(url, "tiny", [{"role": "user", "content": q}], temperature=0, max_tokens=256).text for q in questions
    ]
    rows = [row(q, a, "general") for q, a in zip(questions[:2], answers, strict=False)]
    rows.append(row(questions[2], "nobody says this", "general"))
    (tmp_path / "own_general.jsonl").write_text("\n".join(json.dumps(row_of(r)) for r in rows))
    text = (CONFIGS / "domains.yaml").read_text().replace("${each}", "general").replace("${data}", str(tmp_path))
    kept = [line for line in text.split("\n") if not line.startswith(("each:", "rows:"))]
    (tmp_path / "own_general.yaml").write_text("\n".join(kept))
    pairs = [
        {"start": "The sun", "a": " sets", "b": " rises", "label": 0},
        {"start": "1+1=", "a": "2", "b": "7", "label": 1},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "pairs.yaml").write_text(PAIRS.replace("DATA", str(tmp_path / "pairs.jsonl")))
    tasks = [TaskFile(name, name, "general", file=tmp_path / f"{name}.yaml") for name in ("own_general", "pairs")]
    loaded = load_tasks(tasks)
    model = Served(lambda: url, "tiny", folder / "model", 1024, 2)
    found = run_tasks(model, loaded, rows_of(loaded, {}, None), tmp_path / "cache")
    assert found["own_general"].scores == (1.0, 1.0, 0.0)

    def likelihood(start: str, end: str) -> float:
        body = {"model": "tiny", "prompt": start + end, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            told = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
        return float(sum(told[len(start) : len(start) + len(end)]))  # one token a byte

    picked = [int(likelihood(p["start"], p["b"]) > likelihood(p["start"], p["a"])) for p in pairs]
    assert found["pairs"].scores == tuple(float(p["label"] == n) for p, n in zip(pairs, picked, strict=True))


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_prompt_over_the_window_has_no_answer_and_fails_nothing(
    url: str, folder: Path, tmp_path: Path, at_once: int
) -> None:
    from lm_eval.models.api_models import JsonChatStr

    from fusion.evaluation.harness_models import Served

    asked = [SimpleNamespace(args=(JsonChatStr(json.dumps([{"role": "user", "content": text}])), {})) for text in TEXTS]
    answers = Served(lambda: url, "tiny", folder / "model", 1024, at_once).generations().generate_until(asked)
    plain = [
        chat(url, "tiny", [{"role": "user", "content": text}], temperature=0, max_tokens=512).text for text in TEXTS[1:]
    ]
    assert answers == ["", *plain]


TEXTS = ["a" * 2000, "one?", "two?"]
PAIRS = """
task: pairs
dataset_path: json
dataset_kwargs: {data_files: {test: "DATA"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_target: label
doc_to_choice: "{{[a, b]}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def test_ctrl_c_leaves_nothing_behind(server: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = server
    family = descendants(process.pid)
    assert len(family) >= 4  # supervisor, API server, engine core, worker
    commands = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in family}
    assert any(command.startswith("VLLM::") for command in commands)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert all_gone(family)
