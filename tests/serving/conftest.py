"""Servers for the tests: the guard in front of a scripted upstream."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from fusion.recipe import Guarding, Sampling
from serving.guard.asgi import build_app
from serving.guard.settings import GuardSettings
from serving.serve import listening_socket
from tests.serving.upstream import Upstream


class Guarded:
    """The guard on `url`, the scripted upstream behind it."""

    def __init__(self, url: str, upstream: Upstream) -> None:
        self.url, self.upstream = url, upstream


def guard_settings(upstream: str, **given: Any) -> GuardSettings:
    """Settings by name, whether the guard's own, the sampling's or max_model_len and api_keys."""
    sampling = {key: given.pop(key) for key in ("max_tokens", "temperature", "top_p") if key in given}
    own = {key: given.pop(key) for key in ("max_model_len", "api_keys") if key in given}
    return GuardSettings(upstream, Guarding.model_validate({"log": "none", **given}), Sampling(**sampling), **own)


@pytest.fixture
def guarded() -> Iterator[Callable[..., Guarded]]:
    """Call it with the upstream's script, and settings by name, to get a guard that runs."""
    with ExitStack() as stack:

        def start(*script: Any, tracing: Any = None, **settings: Any) -> Guarded:
            upstream = stack.enter_context(Upstream(*script))
            listener = stack.enter_context(listening_socket("127.0.0.1", 0))
            app = build_app(guard_settings(settings.pop("upstream", upstream.url), **settings), tracing)
            server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="error"))
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(setattr, server, "should_exit", True)
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            return Guarded(f"http://127.0.0.1:{listener.getsockname()[1]}", upstream)

        yield start
