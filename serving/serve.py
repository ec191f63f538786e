"""The engine and the guard together: in the foreground until Ctrl-C, or inside a `with` block.

with running_server(EngineSettings("runs/demo/fused", "demo")) as server:
    print(chat(server.url, server.model, [{"role": "user", "content": "17+25="}]).text)
"""

import gc
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn
from uvicorn.supervisors import Multiprocess

from fusion.architecture import GATES_FILE, MANIFEST
from fusion.errors import UserError
from fusion.progress import console
from serving.client import served_models
from serving.engine import Engine, EngineSettings, is_healthy
from serving.guard.asgi import App, build_app
from serving.guard.metrics import SHARED
from serving.guard.settings import GuardSettings

CHECK_EVERY_S = 0.5
KEEP_ALIVE_S = 75  # longer than clients keep an idle connection: one closed meanwhile fails the request sent on it


@dataclass(frozen=True)
class ServerState:
    """A running server, as its state file names it: addresses of guard and engine, and the checkpoint as loaded.

    `shards` are those that its manifest names, {file: SHA-256}.
    """

    pid: int
    url: str
    model: str
    engine: str
    live_gates: bool
    checkpoint: str
    shards: dict[str, str]


@dataclass(frozen=True)
class RunningServer:
    """Guard and engine that run: the guard's address, the served model's name, the engine (None: started elsewhere)."""

    url: str
    model: str
    engine: Engine | None = None


def serve(
    engine_settings: EngineSettings,
    guard_settings: GuardSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    log: Path | None = None,
    state: Path | None = None,
) -> None:
    """Serves until Ctrl-C or SIGTERM, then lets requests under way end (`drain_s`), and ends guard and engine.

    `guard_settings.upstream` is replaced by the engine's address. `state` names the file that tells `find_server` about
    this server. Raises UserError when the port is taken or vLLM dies.
    """
    shards = manifest_shards(Path(engine_settings.model))
    with (
        listening_socket(host, port) as listener,
        terminate_like_interrupt(),
        suppress(KeyboardInterrupt),
        Engine(engine_settings, log) as engine,
    ):
        url = _address(host, listener)
        with _state_file(state, _state(url, engine, shards)):
            page = f", its traffic on {url}/ui" if guard_settings and guard_settings.guard.ui else ""
            ready = f"serving {engine_settings.served_name} on {url}/v1{page}"
            console.print(f"{ready} (started in {engine.start_seconds:.0f} s, Ctrl-C ends it)", highlight=False)
            _run_guard(_of_engine(engine, guard_settings), listener, engine.alive)
        engine.check()


def guard(settings: GuardSettings, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Guards a server that runs already, at `settings.upstream`, until Ctrl-C or SIGTERM.

    Where the settings do not say how long its context is, it is asked. Raises UserError when the port is taken.
    """
    if settings.max_model_len is None:
        settings = replace(settings, max_model_len=_window(settings.upstream, settings.upstream_key))
    with listening_socket(host, port) as listener, terminate_like_interrupt(), suppress(KeyboardInterrupt):
        window = f", {settings.max_model_len:,} tokens" if settings.max_model_len else ""
        console.print(
            f"guarding {settings.upstream}{window} on {_address(host, listener)}/v1 (Ctrl-C ends it)", highlight=False
        )
        _run_guard(settings, listener)


def _window(upstream: str, key: str | None) -> int | None:
    """How many tokens the context of the upstream's model has, as vLLM lists it; None where another server does not."""
    try:
        models = served_models(upstream, key, timeout_s=5)
    except UserError:
        return None
    found = models[0].get("max_model_len") if models else None
    return found if isinstance(found, int) else None


@contextmanager
def running_server(
    engine_settings: EngineSettings,
    guard_settings: GuardSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    log: Path | None = None,
    state: Path | None = None,
) -> Iterator[RunningServer]:
    """A server for the length of a `with` block; port 0 takes a free one. Raises UserError as `serve` does."""
    shards = manifest_shards(Path(engine_settings.model))
    with listening_socket(host, port) as listener, Engine(engine_settings, log) as engine:
        url = _address(host, listener)
        settings = _of_engine(engine, guard_settings)
        quiet = settings.guard.model_copy(update={"log": "none"})  # the console is the caller's
        guard = uvicorn.Server(_config(build_app, replace(settings, guard=quiet)))
        thread = threading.Thread(target=guard.run, args=([listener],), name="guard", daemon=True)
        thread.start()
        try:
            while not guard.started and thread.is_alive():
                time.sleep(0.01)
            if not guard.started:
                raise UserError(f"the guard did not start on {url}: its own message is above")
            with _state_file(state, _state(url, engine, shards)):
                yield RunningServer(url, engine_settings.served_name, engine)
        finally:
            guard.should_exit = True
            thread.join(10)


def find_server(state: Path, model: str | None = None) -> RunningServer | None:
    """The server which a state file names, None unless it is alive, healthy and serves `model`."""
    found = find_state(state, model)
    return RunningServer(found.url, found.model) if found else None


def find_state(state: Path, model: str | None = None) -> ServerState | None:
    """What a state file says of its server, None unless that is alive, healthy and serves `model`."""
    try:
        found = ServerState(**json.loads(state.read_text()))
        os.kill(found.pid, 0)
    except (OSError, ValueError, TypeError):
        return None
    if (model is not None and found.model != model) or not is_healthy(found.url, path="/ready"):
        return None
    return found


def write_state(path: Path, state: ServerState) -> None:
    """Writes a state file aside and renames."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(asdict(state)))
    aside.replace(path)


def manifest_shards(folder: Path) -> dict[str, str]:
    """The hashes of a checkpoint's shards and gates by its manifest, {file: SHA-256}; empty where it has none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {**manifest["sha256"], GATES_FILE: manifest["gates"]["sha256"]}
    except (OSError, ValueError, KeyError):
        return {}


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket listening on the address, so that nobody else takes it while the engine starts.

    Raises UserError when it is taken or not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"cannot listen on {host}: {error.strerror or error}, choose another host") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()  # a bound socket alone lets another one bind
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"port {port} on {host} cannot be used ({reason}): end what uses it, or choose another port or host"
        ) from None
    return listener


def _address(host: str, listener: socket.socket) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listener.getsockname()[1]}"


def _of_engine(engine: Engine, settings: GuardSettings | None) -> GuardSettings:
    length = engine.settings.max_model_len
    return replace(settings or GuardSettings(upstream="", max_model_len=length), upstream=engine.url)


def _app(settings: GuardSettings) -> App:
    """The guard's app in a process of its own: what is imported by then is no garbage, and is not looked at again."""
    app = build_app(settings)
    gc.collect()
    gc.freeze()
    return app


def _config(app: Callable[[GuardSettings], App], settings: GuardSettings) -> uvicorn.Config:
    return uvicorn.Config(
        partial(app, settings),  # a worker process makes its own
        factory=True,
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        workers=settings.guard.workers,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.guard.drain_s)),
    )


def _run_guard(settings: GuardSettings, listener: socket.socket, alive: Callable[[], bool] | None = None) -> None:
    """Runs the guard's processes until a signal, or until what they guard is not `alive` any more (None: it may be)."""
    if settings.recording:
        from serving.records.store import opened

        with opened(settings.recording.url):  # its tables are made once, and a database that fails is told of now
            pass
    config = _config(_app, settings)
    if config.workers == 1:
        server = uvicorn.Server(config)
        with _watched(alive, lambda: setattr(server, "should_exit", True)):
            server.run([listener])
        return
    with tempfile.TemporaryDirectory(prefix="qwen-fusion-metrics-") as folder, _signals_kept():
        os.environ[SHARED] = folder
        supervisor = Multiprocess(config, sockets=[listener])
        with _watched(alive, supervisor.should_exit.set):
            supervisor.run()


@contextmanager
def _watched(alive: Callable[[], bool] | None, end: Callable[[], None]) -> Iterator[None]:
    """Inside, `end` is called as soon as something is not `alive` any more; without `alive` nothing is watched."""
    if alive is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(CHECK_EVERY_S):
            if not alive():
                end()
                return

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Puts back the signal handlers that uvicorn's supervisor of processes takes for itself."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals() if signal.getsignal(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _state(url: str, engine: Engine, shards: dict[str, str]) -> ServerState:
    settings = engine.settings
    checkpoint = str(Path(settings.model).absolute())
    return ServerState(os.getpid(), url, settings.served_name, engine.url, settings.live_gates, checkpoint, shards)


@contextmanager
def _state_file(path: Path | None, state: ServerState) -> Iterator[None]:
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, state)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """Inside, SIGTERM ends this process the way Ctrl-C does, cleaning up on its way."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
