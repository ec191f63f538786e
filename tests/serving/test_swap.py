"""What a running server is told of new gates, with a fake engine that has no hooks for them in vLLM's place."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.recipe import Recipe
from serving.ask import STATE, engine_settings
from serving.serve import ServerState, manifest_shards, running_server, write_state
from serving.swap import tell_server
from tests.recipes import make_recipe, recipe_data
from tests.serving import fake_engine

SHARDS = {"shared.safetensors": "a", "expert-general.safetensors": "b"}


def write_manifest(recipe: Recipe, gates: str, **shards: str) -> None:
    manifest = {"sha256": {**SHARDS, **shards}, "gates": {"method": "ridge", "sha256": gates}}
    (recipe.fused / "fusion.json").write_text(json.dumps(manifest))
    (recipe.fused / "gates.safetensors").write_text(gates)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Recipe]]:
    """Call it with serving settings to get a recipe whose server runs."""
    path = fake_engine.install(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", f"{path}{os.pathsep}{Path.cwd()}")
    monkeypatch.setenv("FAKE_ENGINE_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("QWEN_FUSION_QUIET", "1")
    servers = []

    def serving(**settings: object) -> Recipe:
        told = {"max_model_len": 256, "sampling": {"max_tokens": 32}, **settings}
        recipe = make_recipe(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path}, serving=told)
        recipe.fused.mkdir(parents=True)
        (recipe.fused / "config.json").write_text('{"num_experts": 2}')
        write_manifest(recipe, "old")
        state = recipe.folder / STATE
        servers.append(running_server(engine_settings(recipe), log=tmp_path / "log", state=state))
        servers[-1].__enter__()
        return recipe

    yield serving
    for server in servers:
        server.__exit__(None, None, None)


def test_one_that_has_them_already_is_told_nothing(start: Callable[..., Recipe]) -> None:
    recipe = start(live_gates=True)
    assert tell_server(recipe) is None
    assert tell_server(recipe.model_copy(update={"name": "another"})) is None


def test_one_without_the_hooks_is_to_be_restarted(start: Callable[..., Recipe]) -> None:
    recipe = start(guard={"drain_s": 12})
    write_manifest(recipe, "new")
    line = tell_server(recipe)
    assert line is not None and line.endswith(
        "serves the gates of before until it is restarted (requests under way get 12 s to end): "
        "serving.live_gates spares that"
    )


def test_other_experts_are_nothing_to_swap(start: Callable[..., Recipe]) -> None:
    recipe = start(live_gates=True)
    write_manifest(recipe, "new", **{"shared.safetensors": "healed"})
    assert "serves the experts and attention of before until it is restarted" in str(tell_server(recipe))


def test_a_swap_that_fails_is_one_sentence_and_is_tried_again(start: Callable[..., Recipe]) -> None:
    recipe = start(live_gates=True)
    write_manifest(recipe, "new")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"the gates are in place, but the server at .* goes on without them: .*its workers"
        ):
            tell_server(recipe)


PROGRAM = """
import sys
from pathlib import Path
from fusion.recipe_file import load_recipe
from serving.swap import tell_server
tell_server(load_recipe(Path(sys.argv[1]), []))
"""


def test_a_swap_that_is_told_to_end_does_not_leave_the_engine_paused(tmp_path: Path) -> None:
    called: list[str] = []

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            called.append(self.path.partition("?")[0])
            if called[-1] == "/collective_rpc" and called.count("/collective_rpc") == 1:
                process.send_signal(signal.SIGTERM)
                time.sleep(1)
            self.answer({"results": [], "success": True})

        def answer(self, body: object) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    data = recipe_data(tmp_path, tmp_path, {"general": tmp_path, "math": tmp_path})
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")
    recipe = Recipe.model_validate(data)
    recipe.fused.mkdir(parents=True)
    write_manifest(recipe, "new")
    engine = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{engine.server_port}"
    shards = {**manifest_shards(recipe.fused), "gates.safetensors": "old"}
    place = str(recipe.fused.absolute())
    write_state(recipe.folder / STATE, ServerState(os.getpid(), url, recipe.name, url, True, place, shards))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stderr=subprocess.DEVNULL)
    assert process.wait(60) != 0
    engine.shutdown()
    assert called[:2] == ["/pause", "/collective_rpc"] and called[-1] == "/resume"
