"""Gates change in a real vLLM that answers: at one and at two ways, float32, against transformers token by token."""

import http.client
import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion import road
from fusion.architecture import GATES_FILE, gate_tensor
from fusion.checkpoint import Checkpoint, link_file
from fusion.errors import UserError
from fusion.layers import Gates, checkpoint_gates
from fusion.merge import merge, record_gates, write_gates
from fusion.recipe import Recipe
from gate_training.trainer import install_gates
from serving.ask import STATE, engine_settings
from serving.serve import ServerState, find_state
from serving.swap import swap_gates
from tests.recipes import make_recipe
from tests.serving.apart import serve_apart

PROMPTS = (list(range(5, 25)), list(range(60, 70)), [200, 7, 7, 91, 13])
LENGTH = 12
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
LOADS = (
    {},
    {"stream": True},
    {"seed": 7, "temperature": 1.0},
    {"response_format": FORMAT},
    {"response_format": FORMAT, "stream": True},
)


@dataclass(frozen=True)
class Served:
    """A recipe's running server, and its gates and others, each with the greedy tokens that they give."""

    recipe: Recipe
    state: ServerState
    files: tuple[Path, Path]
    tokens: tuple[list[list[int]], list[list[int]]]


def by_transformers(folder: Path) -> list[list[int]]:
    """The greedy continuation of every prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False)
        found.append(output[0, len(prompt) :].tolist())
    return found


def by_vllm(engine: str) -> list[list[int]]:
    """What the server at `engine` continues every prompt with."""
    found = []
    for prompt in PROMPTS:
        body = {"model": "test", "prompt": prompt, "max_tokens": LENGTH, "min_tokens": LENGTH, "temperature": 0}
        request = urllib.request.Request(
            f"{engine}/v1/completions",
            json.dumps({**body, "return_token_ids": True}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            found.append(json.load(response)["choices"][0]["token_ids"])
    return found


def random_gates(folder: Path, seed: int) -> Gates:
    torch.manual_seed(seed)
    return {layer: torch.randn_like(gate) for layer, gate in checkpoint_gates(Checkpoint(folder)).items()}


def write_shard(folder: Path, gates: Gates) -> Path:
    folder.mkdir(exist_ok=True)
    write_gates(folder, {gate_tensor(layer): gate for layer, gate in gates.items()}, torch.float32)
    return folder / GATES_FILE


@pytest.fixture(scope="module", params=[1, 2])
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    anchor: Path,
    anchored_experts: dict[str, Path],
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("live")
    serving = {"live_gates": True, "tensor_parallel_size": request.param, "dtype": "float32", "max_model_len": 256}
    serving |= {"sampling": {"max_tokens": 64}, "cpu_kv_cache_bytes": 64 << 20}
    gates = {"rows": 4, "held_out_rows": 4, "method": "ridge"}
    recipe = make_recipe(
        folder, anchor, anchored_experts, routing={"moe_layers": [0, 2]}, serving=serving, gate_training=gates
    )
    fused = merge(recipe)
    tokens, files = [], []
    for seed in (1, 0):  # the last ones stay, and are served
        install_gates(fused, random_gates(fused, seed))
        tokens.append(by_transformers(fused))
        files.append(folder / f"{seed}.safetensors")
        link_file(fused / GATES_FILE, files[-1])
    record_gates(fused, "drawn", "none", 0, None)
    settings = replace(engine_settings(recipe), compact_json=True)
    process, _ = serve_apart(settings, folder, within_s=400)
    link_file(folder / "state.json", recipe.folder / STATE)
    state = find_state(recipe.folder / STATE, "test")
    assert state is not None
    yield Served(recipe, state, (files[1], files[0]), (tokens[1], tokens[0]))
    process.terminate()
    process.communicate(timeout=40)


def interrupted(engine: str) -> float:
    """How many requests have been made to wait and to be computed again."""
    with urllib.request.urlopen(f"{engine}/metrics", timeout=10) as answer:
        lines = answer.read().decode().split("\n")
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_preemptions_total{"))


def paused(engine: str) -> bool:
    with urllib.request.urlopen(f"{engine}/is_paused", timeout=10) as answer:
        return bool(json.load(answer)["is_paused"])


def test_other_gates_give_their_own_tokens_and_the_first_ones_the_first_again(served: Served) -> None:
    first, other = served.tokens
    assert first != other
    assert by_vllm(served.state.engine) == first
    for file, tokens in zip(served.files[::-1], served.tokens[::-1], strict=True):
        assert 0 < swap_gates(served.state.engine, file).still_s < 10
        assert by_vllm(served.state.engine) == tokens
        assert not paused(served.state.engine)


def test_no_request_fails_meanwhile_and_none_is_answered_by_both(served: Served) -> None:
    """The prompts that are compared are cached with the gates of before, and others are being answered."""
    client = openai.OpenAI(base_url=f"{served.state.url}/v1", api_key="none", max_retries=0, timeout=120)
    over, ended, failed = threading.Event(), [0] * len(LOADS), list[str]()

    def ask(number: int) -> None:
        fields = {"model": "test", "messages": [{"role": "user", "content": f"hello {number}"}], "max_tokens": 60}
        while not over.is_set():
            try:
                answer = client.chat.completions.create(**{**fields, **LOADS[number]})  # type: ignore[call-overload]
                choices = [answer] if not LOADS[number].get("stream") else list(answer)
                assert any(part.choices and part.choices[0].finish_reason for part in choices)
                ended[number] += 1
            except Exception as error:
                failed.append(f"{LOADS[number]}: {error!r}")
                return

    before = interrupted(served.state.engine)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(LOADS))]
    for thread in threads:
        thread.start()
    try:
        for twice in range(30):  # until a request of each kind has ended and one was under way
            for file, tokens in zip(served.files[::-1], served.tokens[::-1], strict=True):
                swap_gates(served.state.engine, file)
                assert by_vllm(served.state.engine) == tokens
                assert not failed
            if twice and all(ended) and interrupted(served.state.engine) > before:
                break
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert not failed and not any(thread.is_alive() for thread in threads)
    assert all(ended) and interrupted(served.state.engine) > before


def wrong_shape(gates: Gates) -> Gates:
    return {layer: rows[:-1] if layer == 2 else rows for layer, rows in gates.items()}


def one_layer_less(gates: Gates) -> Gates:
    return {0: gates[0]}


def one_layer_more(gates: Gates) -> Gates:
    return {**gates, 1: gates[0]}


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (wrong_shape, r"model.layers.2.mlp.gate is \(2, 64\) in .*, \(3, 64\) in the model"),
        (one_layer_less, "lacks model.layers.2.mlp.gate, which the model has"),
        (one_layer_more, r"holds model.layers.1.mlp.\w+, which the model lacks"),
    ],
)
def test_gates_of_another_model_are_refused_and_the_answers_stay(
    served: Served, tmp_path: Path, spoilt: object, words: str
) -> None:
    file = write_shard(tmp_path / "spoilt", spoilt(random_gates(served.recipe.fused, 5)))  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        swap_gates(served.state.engine, file)
    assert not paused(served.state.engine)
    assert by_vllm(served.state.engine) == served.tokens[0]


def test_workers_put_back_what_they_had(served: Served) -> None:
    def call(method: str, *args: str) -> None:
        body = json.dumps({"method": method, "args": args}).encode()
        headers = {"content-type": "application/json"}
        urllib.request.urlopen(
            urllib.request.Request(f"{served.state.engine}/collective_rpc", body, headers), timeout=60
        )
        urllib.request.urlopen(urllib.request.Request(f"{served.state.engine}/reset_prefix_cache", b""), timeout=60)

    call("load_gates", str(served.files[1]))
    assert by_vllm(served.state.engine) == served.tokens[1]
    call("put_back_gates")
    assert by_vllm(served.state.engine) == served.tokens[0]


@pytest.mark.parametrize("path", ["/pause", "/resume", "/collective_rpc", "/reset_prefix_cache"])
def test_the_guard_refuses_what_the_engine_offers(served: Served, path: str) -> None:
    with urllib.request.urlopen(f"{served.state.engine}/openapi.json", timeout=10) as answer:
        assert "post" in json.load(answer)["paths"][path]
    connection = http.client.HTTPConnection(served.state.url.removeprefix("http://"), timeout=10)
    connection.request("POST", path, b'{"method": "put_back_gates"}', {"content-type": "application/json"})
    assert connection.getresponse().status == 404
    assert not paused(served.state.engine)


def test_train_gates_and_rollback_tell_the_server(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Last of all, as the checkpoint changes."""
    recipe, place = served.recipe, served.recipe.folder / STATE
    road.train_gates(recipe, force=True)
    assert "s without service" in capsys.readouterr().err
    trained = by_vllm(served.state.engine)
    assert trained == by_transformers(recipe.fused) != served.tokens[0]
    road.rollback(recipe)
    assert "s without service" in capsys.readouterr().err
    assert by_vllm(served.state.engine) == served.tokens[0] == by_transformers(recipe.fused)
    state = find_state(place)
    assert state is not None
    place.write_text(json.dumps({**json.loads(place.read_text()), "live_gates": False}))
    road.rollback(recipe)
    assert "serves the gates of before until it is restarted" in capsys.readouterr().err
    assert by_vllm(served.state.engine) == served.tokens[0]
