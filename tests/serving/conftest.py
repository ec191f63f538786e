"""Servers for the tests: the guard in front of a scripted upstream."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn

from fusion.sections.serving import Guarding, Sampling
from serving.guard.asgi import build_app
from serving.guard.settings import GuardSettings
from serving.guard.tracing import Tracing
from serving.serve import listening_socket
from tests.serving.upstream import Upstream

OWN = ("max_model_len", "api_keys", "operator_keys", "recording")  # settings that are not the recipe's


class Guarded:
    """The guard on `url`, the upstream behind it, and the guard's own tasks."""

    def __init__(self, url: str, upstream: Upstream | None = None) -> None:
        self.url = url
        self.loop: asyncio.AbstractEventLoop | None = None
        self._upstream = upstream

    @property
    def upstream(self) -> Upstream:
        """The scripted upstream."""
        assert self._upstream is not None
        return self._upstream

    def tasks(self) -> int:
        """How many tasks the guard's event loop has."""
        assert self.loop is not None
        return len(asyncio.all_tasks(self.loop))


@contextmanager
def running_guard(settings: GuardSettings, tracing: Tracing | None = None) -> Iterator[Guarded]:
    """A guard of these settings, in a thread of its own."""
    app = build_app(settings, tracing)

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        guard.loop = asyncio.get_running_loop()
        await app(scope, receive, send)

    with listening_socket("127.0.0.1", 0) as listener:
        guard = Guarded(f"http://127.0.0.1:{listener.getsockname()[1]}")
        server = uvicorn.Server(uvicorn.Config(watched, lifespan="on", log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            yield guard
        finally:
            server.should_exit = True
            thread.join(10)


def guard_settings(upstream: str, **given: Any) -> GuardSettings:
    """Settings by name, whether the guard's own, the sampling's or one of OWN."""
    sampling = {key: given.pop(key) for key in ("max_tokens", "temperature", "top_p") if key in given}
    own = {key: given.pop(key) for key in OWN if key in given}
    return GuardSettings(upstream, Guarding.model_validate({"log": "none", **given}), Sampling(**sampling), **own)


@pytest.fixture
def guarded() -> Iterator[Callable[..., Guarded]]:
    """Call it with the upstream's script, and settings by name, to get a guard that runs."""
    with ExitStack() as stack:

        def start(*script: Any, tracing: Any = None, **settings: Any) -> Guarded:
            upstream = stack.enter_context(Upstream(*script))
            told = guard_settings(settings.pop("upstream", upstream.url), **settings)
            guard = stack.enter_context(running_guard(told, tracing))
            guard._upstream = upstream
            return guard

        yield start
