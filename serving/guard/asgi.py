"""The guard as an ASGI app in front of an OpenAI-compatible server.

Answers completions that ask for structure (JSON, a pattern, tool calls) only where they are as asked, and asks again
otherwise. Completions that ask for none and the list of models pass as they are; there is no other route.

    qwen-fusion guard --upstream http://127.0.0.1:8001 --port 8000
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from yarl import URL

from serving.guard.keys import Keys
from serving.guard.ladder import MAX_ATTEMPTS, Done, Exhausted, Ladder, Limits, Send, ladder_for
from serving.guard.metrics import Metrics
from serving.guard.schema import CheckerCache, SchemaError
from serving.guard.stream import as_events, error_events
from serving.guard.wanted import CONSTRAINTS

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
SendEvent = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, SendEvent], Awaitable[None]]

OPEN = ("/health", "/ready")  # without a key, however many requests are under way
CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
COUNTED = (*OPEN, "/metrics", CHAT, COMPLETIONS, MODELS)
NUMBERS = ("n", "max_tokens", "max_completion_tokens", "temperature", "seed")
ATTEMPTS_HEADER = "x-qwen-fusion-attempts"
JSON_TYPE = (b"content-type", b"application/json")
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
# RFC 9110 7.6.1, and what this side of the proxy sets itself
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)


@dataclass(frozen=True)
class GuardSettings:
    """Where the engine listens and what a request gets that leaves something out.

    `max_tokens`, `temperature` and `top_p` fill chat requests that do not say (None: leave them out); `max_model_len`
    caps the filled max_tokens, the engine clips it to what the prompt leaves. `unwrap` takes JSON out of a fence or of
    text around it. With `api_keys` a request needs one of them; beyond `max_in_flight` requests the next gets a 503. A
    stream that waits to be checked gets a comment line every `keepalive_s`.
    """

    upstream: str
    max_attempts: int = MAX_ATTEMPTS
    max_tokens: int | None = 8192
    max_model_len: int | None = None
    temperature: float | None = 0.7
    top_p: float | None = 0.9
    unwrap: bool = False
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_in_flight: int | None = None
    deadline_s: float = 900.0
    keepalive_s: float = 10.0
    max_body_bytes: int = 16 * 1024 * 1024

    @property
    def budget(self) -> int | None:
        """max_tokens of a request that names none."""
        if self.max_tokens is None or self.max_model_len is None:
            return self.max_tokens
        return min(self.max_tokens, self.max_model_len)


class Refusal(Exception):
    """An answer of the guard's own, in OpenAI's error form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        code: str,
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object to answer with."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client went away before its answer was complete."""


FAILURES = (Refusal, TimeoutError, aiohttp.ClientError, OSError, ValueError)


def _refusal(failure: Exception) -> Refusal:
    """What the client is told of a failure on the way."""
    if isinstance(failure, Refusal):
        return failure
    if isinstance(failure, TimeoutError):
        return Refusal(504, "The deadline passed before an answer was ready.", "timeout_error", "deadline")
    what = f"The engine did not answer: {type(failure).__name__}."
    return Refusal(502, what, "upstream_error", "upstream_unavailable")


@dataclass(frozen=True)
class _Answer:
    """What to send: an object of the guard's own making, or the upstream's word as it came."""

    status: int
    content: dict[str, Any] | bytes
    headers: tuple[tuple[bytes, bytes], ...] = (JSON_TYPE,)

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


def build_app(settings: GuardSettings) -> App:
    """The guard as an ASGI app, for uvicorn or any other server. It needs the lifespan protocol."""
    return _Guard(settings)


class _Guard:
    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._upstream = settings.upstream.rstrip("/")
        self._cache = CheckerCache()
        self._keys = Keys(settings.api_keys)
        self._key_header = b"authorization" if self._keys else b""  # no business of the engine's then
        self._metrics = Metrics()
        self._in_flight = 0
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
            if event["type"] == "http.response.start":
                self._count(scope["path"], event["status"])
            await send(event)

        self._in_flight += 1
        try:
            self._admit(scope)
            body = await _read_body(receive, self._settings.max_body_bytes)
            await _unless_gone(self._route(scope, body, tracked), receive)
        except ClientGone:
            self._count(scope["path"], 499)
            return
        except FAILURES as failure:
            error = _refusal(failure)
        else:
            return
        finally:
            self._in_flight -= 1
        if started:  # an answer cut short must not look complete: leaving without its end closes the connection
            raise ConnectionAbortedError(error.message)
        await _json(tracked, error.status, error.body(), error.headers)

    def _admit(self, scope: MutableMapping[str, Any]) -> None:
        """Raises Refusal where the request has no key or there are too many under way."""
        if scope["path"] in OPEN:
            return
        if not self._keys.allow(dict(scope["headers"]).get(b"authorization")):
            headers = ((b"www-authenticate", b"Bearer"),)
            said = "The request has no API key that is known here (Authorization: Bearer ...)."
            raise Refusal(401, said, "invalid_request_error", "invalid_api_key", headers=headers)
        limit = self._settings.max_in_flight
        if limit is not None and self._in_flight > limit:
            said = f"{limit} requests are under way, as many as are taken at a time."
            raise Refusal(503, said, "overloaded_error", "overloaded", headers=((b"retry-after", b"1"),))

    def _count(self, path: str, status: int) -> None:
        self._metrics.answers.labels(path if path in COUNTED else "other", str(status)).inc()

    async def _route(self, scope: MutableMapping[str, Any], body: bytes, send: SendEvent) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/health":
            await _json(send, 200, {"status": "ok"})
        elif path == "/ready":
            await self._ready(send)
        elif path == "/metrics" and method == "GET":
            self._metrics.in_flight.set(self._in_flight - 1)
            await _whole(send, 200, [(b"content-type", b"text/plain; version=0.0.4")], self._metrics.text())
        elif path in (CHAT, COMPLETIONS) and method == "POST":
            await self._completion(scope, body, send)
        elif (path == MODELS or path.startswith(f"{MODELS}/")) and method == "GET":
            await self._pass_through(scope, body, send)
        else:
            raise Refusal(404, f"There is no {path} here.", "invalid_request_error", "not_found")

    async def _ready(self, send: SendEvent) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with self._session.get(f"{self._upstream}/health", timeout=timeout) as answer:
                healthy = answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            healthy = False
        await _json(send, 200 if healthy else 503, {"status": "ok" if healthy else "engine unavailable"})

    async def _completion(self, scope: MutableMapping[str, Any], body: bytes, send: SendEvent) -> None:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):  # the engine's own 400 says what is wrong with it
            await self._pass_through(scope, body, send)
            return
        own_budget = "max_tokens" in request or "max_completion_tokens" in request
        filled = self._fill(request) if scope["path"] == CHAT else request
        window = self._settings.max_model_len
        limits = Limits(self._settings.max_attempts, None if own_budget else window, window, self._settings.unwrap)
        try:
            ladder = ladder_for(filled, self._cache, limits)
        except SchemaError as error:
            what = next((key for key in (*CONSTRAINTS, "tools") if request.get(key)), None)
            said = f"The schema cannot be used: {error}"
            raise Refusal(400, said, "invalid_request_error", "invalid_schema", what) from None
        if ladder is None:
            await self._pass_through(scope, body if filled == request else json.dumps(filled).encode(), send)
            return
        for key in NUMBERS:  # a repair computes with them
            if isinstance(filled.get(key), bool) or not isinstance(filled.get(key), int | float | None):
                raise Refusal(400, f"'{key}' is not a number.", "invalid_request_error", "invalid_value", key)
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
        climb = asyncio.ensure_future(self._climb(scope, ladder))
        begun = False
        try:
            while request.get("stream") and not (await asyncio.wait({climb}, timeout=self._settings.keepalive_s))[0]:
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": [EVENT_STREAM]})
                begun = True
                await send({"type": "http.response.body", "body": b": checking\n\n", "more_body": True})
            try:
                answer = await climb
            except FAILURES as failure:
                if not begun:
                    raise
                error = _refusal(failure)
                answer = _Answer(error.status, error.body())
        finally:
            climb.cancel()
        if request.get("stream") and answer.status == 200 and isinstance(answer.content, dict):
            options = request.get("stream_options")
            usage = isinstance(options, dict) and bool(options.get("include_usage"))
            answer = _Answer(200, as_events(answer.content, usage), (EVENT_STREAM, *answer.headers[1:]))
        elif begun:  # what has gone out is a stream: an error is its last event
            answer = replace(answer, content=error_events(answer.body))
        if begun:
            await send({"type": "http.response.body", "body": answer.body})
        else:
            await _whole(send, answer.status, list(answer.headers), answer.body)

    async def _climb(self, scope: MutableMapping[str, Any], ladder: Ladder) -> "_Answer":
        """The ladder's outcome, or the upstream's own word where that is an error, within the deadline."""
        own = {"accept-encoding": "identity", "content-type": "application/json"}
        given = _forwarded(scope["headers"], self._key_header)
        headers = [pair for pair in given if pair[0].lower() not in own] + list(own.items())
        url = self._upstream + scope["path"]
        began, away = time.perf_counter(), 0.0
        step: Send | Done | Exhausted = ladder.start()
        async with asyncio.timeout(self._settings.deadline_s):
            while isinstance(step, Send):
                sent = time.perf_counter()
                async with self._session.post(url, json=step.body, headers=headers) as answer:
                    content = await answer.read()
                spent = time.perf_counter() - sent
                away += spent
                self._metrics.upstream.observe(spent)
                if answer.status == 200:
                    step = ladder.receive(_object(content))
                    self._judged(ladder.attempts[-1]["errors"])
                    continue
                self._metrics.attempts.labels(f"status {answer.status}").inc()
                bare = ladder.refuse() if answer.status == 400 and step.constrained else None
                if bare is None:
                    return _Answer(answer.status, content, tuple(_returned(answer)))
                step = bare
        self._metrics.added.observe(time.perf_counter() - began - away)
        kept = [JSON_TYPE, (ATTEMPTS_HEADER.encode(), str(step.attempts).encode())]
        if isinstance(step, Exhausted):
            return _Answer(422, step.error, (*kept, (b"x-should-retry", b"false")))
        return _Answer(200, step.answer, tuple(kept))

    def _judged(self, errors: list[dict[str, Any]]) -> None:
        self._metrics.attempts.labels("invalid" if errors else "valid").inc()
        for error in errors:
            self._metrics.violations.labels(error["keyword"]).inc()

    async def _pass_through(self, scope: MutableMapping[str, Any], body: bytes, send: SendEvent) -> None:
        path, query = scope.get("raw_path") or scope["path"].encode(), scope.get("query_string")
        target = (path + b"?" + query if query else path).decode("latin-1")
        url = URL(self._upstream + target, encoded=True)  # not normalised: /v1/../x must not become /x
        headers = _forwarded(scope["headers"], self._key_header)
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


def _forwarded(headers: list[tuple[bytes, bytes]], ours: bytes = b"") -> list[tuple[str, str]]:
    """The client's headers without those of the connection, and without `ours`, which the guard itself has read."""
    named = {name.strip() for key, value in headers if key == b"connection" for name in value.lower().split(b",")}
    dropped = HOP_BY_HOP | named | {b"host", b"content-length", b"expect", ours}
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
