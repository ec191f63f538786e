"""The guard as an ASGI app in front of an OpenAI-compatible server.

Passes /v1/* through, answers chat completions that ask for JSON only when the JSON is valid, and asks again otherwise.

    python -m serving.guard.asgi --upstream http://127.0.0.1:8001 --port 8000
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from serving.guard.ladder import MAX_ATTEMPTS, Done, Exhausted, Ladder, Send, ladder_for
from serving.guard.schema import CheckerCache, SchemaError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
SendEvent = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, SendEvent], Awaitable[None]]

CHAT = "/v1/chat/completions"
NUMBERS = ("n", "max_tokens", "max_completion_tokens", "temperature", "seed")
ATTEMPTS_HEADER = "x-qwen-fusion-attempts"
# RFC 9110 7.6.1, and what this side of the proxy sets itself
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)


@dataclass(frozen=True)
class GuardSettings:
    """Where the engine listens and what a request gets that leaves something out.

    `max_tokens`, `temperature` and `top_p` fill chat requests that do not say (None: leave them out);
    `max_model_len` caps the filled max_tokens, the engine clips it to what the prompt leaves.
    """

    upstream: str
    max_attempts: int = MAX_ATTEMPTS
    max_tokens: int | None = 8192
    max_model_len: int | None = None
    temperature: float | None = 0.7
    top_p: float | None = 0.9
    deadline_s: float = 900.0
    max_body_bytes: int = 16 * 1024 * 1024

    @property
    def budget(self) -> int | None:
        """max_tokens of a request that names none."""
        if self.max_tokens is None or self.max_model_len is None:
            return self.max_tokens
        return min(self.max_tokens, self.max_model_len)


class Refusal(Exception):
    """An answer of the guard's own, in OpenAI's error form."""

    def __init__(self, status: int, message: str, kind: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param

    def body(self) -> dict[str, Any]:
        """The JSON object to answer with."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client went away before its answer was complete."""


def build_app(settings: GuardSettings) -> App:
    """The guard as an ASGI app, for uvicorn or any other server. It needs the lifespan protocol."""
    return _Guard(settings)


class _Guard:
    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._upstream = settings.upstream.rstrip("/")
        self._cache = CheckerCache()
        self._client: aiohttp.ClientSession | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: SendEvent) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: SendEvent) -> None:
        await receive()
        self._client = aiohttp.ClientSession(
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._client.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: MutableMapping[str, Any], receive: Receive, send: SendEvent) -> None:
        started = False

        async def tracked(event: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(event)

        try:
            body = await _read_body(receive, self._settings.max_body_bytes)
            await _unless_gone(self._route(scope, body, tracked), receive)
        except ClientGone:
            return
        except Refusal as refusal:
            error = refusal
        except TimeoutError:
            error = Refusal(504, "The deadline passed before an answer was ready.", "timeout_error", "deadline")
        except (aiohttp.ClientError, OSError, ValueError) as failure:
            what = f"The engine did not answer: {type(failure).__name__}."
            error = Refusal(502, what, "upstream_error", "upstream_unavailable")
        else:
            return
        if started:  # an answer cut short must not look complete: leaving without its end closes the connection
            raise ConnectionAbortedError(error.message)
        await _json(send, error.status, error.body())

    async def _route(self, scope: MutableMapping[str, Any], body: bytes, send: SendEvent) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/health":
            await self._health(send)
        elif path == CHAT and method == "POST":
            await self._chat(scope, body, send)
        elif path.startswith("/v1/"):
            await self._pass_through(scope, body, send)
        else:
            raise Refusal(404, f"There is no {path} here.", "invalid_request_error", "not_found")

    async def _health(self, send: SendEvent) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with self._session.get(f"{self._upstream}/health", timeout=timeout) as answer:
                healthy = answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            healthy = False
        await _json(send, 200 if healthy else 503, {"status": "ok" if healthy else "engine unavailable"})

    async def _chat(self, scope: MutableMapping[str, Any], body: bytes, send: SendEvent) -> None:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):  # the engine's own 400 says what is wrong with it
            await self._pass_through(scope, body, send)
            return
        own_budget = "max_tokens" in request or "max_completion_tokens" in request
        filled = self._fill(request)
        limit = None if own_budget else self._settings.max_model_len
        try:
            ladder = ladder_for(filled, self._cache, self._settings.max_attempts, limit)
        except SchemaError as error:
            raise Refusal(400, f"The schema cannot be used: {error}", "invalid_request_error", "invalid_schema",
                          "response_format") from None  # fmt: skip
        if ladder is None:
            await self._pass_through(scope, body if filled == request else json.dumps(filled).encode(), send)
            return
        for key in NUMBERS:  # a repair computes with them
            if isinstance(filled.get(key), bool) or not isinstance(filled.get(key), int | float | None):
                raise Refusal(400, f"'{key}' is not a number.", "invalid_request_error", "invalid_value", key)
        async with asyncio.timeout(self._settings.deadline_s):
            await self._guarded(scope, ladder, request, send)

    def _fill(self, request: dict[str, Any]) -> dict[str, Any]:
        defaults = {"temperature": self._settings.temperature, "top_p": self._settings.top_p}
        if request.get("max_tokens") is None and request.get("max_completion_tokens") is None:
            defaults["max_tokens"] = self._settings.budget
        missing = {key: value for key, value in defaults.items() if value is not None and request.get(key) is None}
        return {**request, **missing}

    async def _guarded(
        self, scope: MutableMapping[str, Any], ladder: Ladder, request: dict[str, Any], send: SendEvent
    ) -> None:
        own = {"accept-encoding": "identity", "content-type": "application/json"}
        headers = [pair for pair in _forwarded(scope["headers"]) if pair[0].lower() not in own] + list(own.items())
        step: Send | Done | Exhausted = ladder.start()
        while isinstance(step, Send):
            async with self._session.post(self._upstream + CHAT, json=step.body, headers=headers) as answer:
                content = await answer.read()
                if answer.status != 200:
                    await _whole(send, answer.status, _returned(answer), content)
                    return
            step = ladder.receive(_object(content))
        attempts = [(ATTEMPTS_HEADER.encode(), str(step.attempts).encode())]
        if isinstance(step, Exhausted):
            await _json(send, 422, step.error, [*attempts, (b"x-should-retry", b"false")])
        elif request.get("stream"):
            options = request.get("stream_options")
            events = _as_events(step.answer, isinstance(options, dict) and bool(options.get("include_usage")))
            await _whole(send, 200, [(b"content-type", b"text/event-stream; charset=utf-8"), *attempts], events)
        else:
            await _json(send, 200, step.answer, attempts)

    async def _pass_through(self, scope: MutableMapping[str, Any], body: bytes, send: SendEvent) -> None:
        path, query = scope.get("raw_path") or scope["path"].encode(), scope.get("query_string")
        target = (path + b"?" + query if query else path).decode("latin-1")
        url = URL(self._upstream + target, encoded=True)  # not normalised: /v1/../x must not become /x
        headers = _forwarded(scope["headers"])
        async with self._session.request(scope["method"], url, data=body or None, headers=headers) as answer:
            await send({"type": "http.response.start", "status": answer.status, "headers": _returned(answer)})
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            raise RuntimeError("the server in front of the guard must run the ASGI lifespan (uvicorn: lifespan on)")
        return self._client


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientGone
        size += len(event.get("body", b""))
        if size > limit:
            raise Refusal(413, f"The body has more than {limit} bytes.", "invalid_request_error", "body_too_large")
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return b"".join(parts)


async def _unless_gone(work: Awaitable[None], receive: Receive) -> None:
    """Runs `work`; cancels it, and the request upstream with it, when the client disconnects first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _forwarded(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    named = {name.strip() for key, value in headers if key == b"connection" for name in value.lower().split(b",")}
    dropped = HOP_BY_HOP | named | {b"host", b"content-length", b"expect"}
    return [(key.decode("latin-1"), value.decode("latin-1")) for key, value in headers if key.lower() not in dropped]


def _returned(answer: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [(key.lower(), value) for key, value in answer.raw_headers if key.lower() not in HOP_BY_HOP]


def _object(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("the engine's answer is not an object")
    return value


async def _json(send: SendEvent, status: int, value: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    await _whole(send, status, [(b"content-type", b"application/json"), *headers], json.dumps(value).encode())


async def _whole(send: SendEvent, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [pair for pair in headers if pair[0] != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _as_events(answer: dict[str, Any], include_usage: bool) -> bytes:
    """A finished chat completion as the server-sent events of a streamed one."""
    head: dict[str, Any] = {"id": "chatcmpl-guard", "created": int(time.time()), "model": ""}
    head.update((key, answer[key]) for key in ("id", "created", "model", "system_fingerprint") if key in answer)
    head["object"] = "chat.completion.chunk"
    chunks: list[dict[str, Any]] = []
    for choice in answer["choices"]:
        index, message = choice["index"], choice.get("message") or {}
        chunks.append(_chunk(head, index, {"role": message.get("role", "assistant"), "content": ""}))
        delta = {key: message[key] for key in ("content", "reasoning_content", "refusal") if message.get(key)}
        if message.get("tool_calls"):
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(message["tool_calls"])]
        chunks.append(_chunk(head, index, delta, logprobs=choice.get("logprobs")))
        chunks.append(_chunk(head, index, {}, choice.get("finish_reason")))
    if include_usage:
        chunks.append({**head, "choices": [], "usage": answer.get("usage")})
    events = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
    return "".join([*events, "data: [DONE]\n\n"]).encode()


def _chunk(
    head: dict[str, Any], index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**head, "choices": [choice]}


def _main() -> None:
    import argparse

    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True, help="address of an OpenAI-compatible server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(build_app(GuardSettings(options.upstream)), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    _main()
