"""A real HTTP server that plays an OpenAI-compatible engine and answers from a script, faults included."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def completion(*texts: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    """A chat completion object with one choice per text."""
    choices = [
        {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        for index, text in enumerate(texts)
    ]
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices,
            "usage": dict(USAGE)}  # fmt: skip


class Status:
    """Answer with this status and text."""

    def __init__(self, status: int, text: str = "{}") -> None:
        self.status, self.text = status, text


class Slow:
    """Wait this long, then answer with that."""

    def __init__(self, seconds: float, answer: Any) -> None:
        self.seconds, self.answer = seconds, answer


class Cut:
    """Stream the first `words` of an answer, then end without its end, or (`drop`) without one of the connection.

    Where that is all of them, the connection lingers for so many seconds after [DONE].
    """

    def __init__(self, answer: Any, words: int, drop: bool = False, lingers_s: float = 0.0) -> None:
        self.answer, self.words, self.drop, self.lingers_s = answer, words, drop, lingers_s


DROP = object()  # close the connection without an answer
HANG = object()  # never answer


class Upstream:
    """Runs in a thread. `script` holds the answers of the chat route in order; the last one repeats."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script) or [completion("hello")]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self.healthy = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._call(self._runner.cleanup)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def wait_until_asked(self) -> None:
        """Returns as soon as a request has come."""
        while not self.requests:
            time.sleep(0.01)

    def _call(self, make: Callable[[], Any]) -> None:
        asyncio.run_coroutine_threadsafe(make(), self._loop).result(10)

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name}", self._echo)
        app.router.add_post("/v1/completions", self._chat)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 1234}]}, headers={"x-own": "1"}
        )

    async def _echo(self, request: web.Request) -> web.Response:
        headers = {
            "x-query": request.rel_url.raw_query_string,
            "x-saw": ",".join(sorted(key.lower() for key in request.headers)),
        }
        return web.Response(headers=headers)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.headers.append({key.lower(): value for key, value in request.headers.items()})
        self.requests.append(body)
        item = self.script[min(len(self.requests), len(self.script)) - 1]
        if isinstance(item, Slow):
            await asyncio.sleep(item.seconds)
            item = item.answer
        if item is HANG:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if item is DROP:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if isinstance(item, Status):
            return web.Response(status=item.status, text=item.text, content_type="application/json")
        if body.get("stream"):
            cut = item if isinstance(item, Cut) else Cut(item, len(item["choices"][0]["message"]["content"]))
            return await self._stream(request, cut)
        return web.json_response(item)

    async def _stream(self, request: web.Request, cut: Cut) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        choice = cut.answer["choices"][0]
        words = [word + " " for word in choice["message"]["content"].split(" ")]
        for word in words[: cut.words]:
            await response.write(stream_chunk({"content": word}))
            await asyncio.sleep(0.15)
        if cut.drop:
            assert request.transport is not None
            request.transport.close()
        elif cut.words >= len(words):
            await response.write(stream_chunk({}, choice["finish_reason"]))
            await response.write(b"data: [DONE]\n\n")
            await asyncio.sleep(cut.lingers_s)
        return response


def stream_chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    """One event of a streamed chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n".encode()
