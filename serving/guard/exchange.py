"""One request and what is answered to it, over ASGI.

The guard's own refusals have OpenAI's error form; every answer has the request's id (`x-request-id`).
"""

import asyncio
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from serving.guard.bodies import encoded

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
SendEvent = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON_TYPE = (b"content-type", b"application/json")
EVENT_STREAM_TYPE = b"text/event-stream"
EVENT_STREAM = (b"content-type", EVENT_STREAM_TYPE + b"; charset=utf-8")
REQUEST_ID = b"x-request-id"
NO_RETRY = (b"x-should-retry", b"false")  # the OpenAI client asks again after every 5xx otherwise
ROUTING_HEADER = b"x-qwen-fusion-routing"  # of a request: it wants to be told; of an answer: a JSON object
LAST_EVENT = b"data: [DONE]"
TAIL_BYTES = 32  # of an answer: more than its last event and line ends
KEPT_BYTES = 256 * 2**10  # of an answer, for its record
REQUEST_IDS = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Refusal(Exception):
    """An answer of the guard's own, in OpenAI's error form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        code: str,
        param: str | None = None,
        headers: tuple[Header, ...] = (),
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.more = more or {}  # fields of the error beside OpenAI's own
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object to answer with."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**error, **self.more}}


class ClientGone(Exception):
    """The client went away before its answer was complete."""


FAILURES = (Refusal, TimeoutError, aiohttp.ClientError, OSError, ValueError, RecursionError)


def refusal_of(failure: Exception) -> Refusal:
    """What the client is told of a failure on the way."""
    if isinstance(failure, Refusal):
        return failure
    if isinstance(failure, TimeoutError):
        said = "The deadline passed before an answer was ready."
        return Refusal(504, said, "timeout_error", "deadline", headers=(NO_RETRY,))
    what = f"The engine did not answer: {type(failure).__name__}."
    return Refusal(502, what, "upstream_error", "upstream_unavailable")


@dataclass
class Exchange:
    """A request under way: its scope, how far its answer is, and what is to be logged of it."""

    scope: MutableMapping[str, Any]
    raw_send: SendEvent
    began: float = field(default_factory=time.perf_counter)
    read_at: float = 0.0  # when its body was there
    away_s: float = 0.0  # of it, for the engine
    status: int = 0
    broke_off: int = 0  # what a stream that had begun as a 200 ended with where that was an error
    finished: bool = False
    streams: bool = False  # whether what has begun is a stream of events
    deadline: float = 0.0  # of all that is done for it, on the event loop's clock
    asker: str = ""
    owner: str = ""  # of its record: what stands for the asker's key, where there are keys
    attempts: int = 0
    violations: list[str] = field(default_factory=list)
    asked: Any = None
    answered: Any = None
    admitted: Any = None  # what was asked, as the policy let it in
    routes: tuple[str, int] | None = None  # the engine's own account of the experts, and the prompt's tokens in it
    routing: dict[str, Any] | None = None  # how it was routed, where the client wants to be told
    kept: bytearray | None = None  # what has gone out, where it is recorded
    tail: bytes = b""  # the last that has gone out

    def __post_init__(self) -> None:
        self.path: str = self.scope["path"]
        self.headers: dict[bytes, bytes] = dict(self.scope["headers"])
        given = self.headers.get(REQUEST_ID, b"")
        self.id = given.decode() if REQUEST_IDS.fullmatch(given) else os.urandom(16).hex()

    @property
    def ended_as(self) -> int:
        """The status that tells how it ended."""
        return self.broke_off or self.status

    @property
    def started(self) -> bool:
        """Whether the head of the answer has gone out."""
        return self.status != 0

    @property
    def told_all(self) -> bool:
        """Whether the client has the whole answer: of a stream, once [DONE] has gone out."""
        return self.finished or (self.streams and self.tail.rstrip().endswith(LAST_EVENT))

    def trace(self, span: Any, status: int) -> None:
        """Notes on the span of this request, where there is one, how it ended."""
        if span is not None:
            span.set_attributes({"http.response.status_code": self.status or status, "attempts": self.attempts})

    async def start(self, status: int, headers: Iterable[Header]) -> None:
        """Sends the head of the answer."""
        self.status = status
        kept = [*(pair for pair in headers if pair[0] != REQUEST_ID), (REQUEST_ID, self.id.encode())]
        if self.routing is not None:
            kept.append((ROUTING_HEADER, json.dumps(self.routing).encode()))
        self.streams = status == 200 and any(value.startswith(EVENT_STREAM_TYPE) for _, value in kept)
        await self.raw_send({"type": "http.response.start", "status": status, "headers": kept})

    async def send(self, body: bytes, more: bool = False) -> None:
        """Sends a piece of the answer, the last one unless there is `more`."""
        self.finished = not more
        self.tail = (self.tail + body[-TAIL_BYTES:])[-TAIL_BYTES:]
        if self.kept is not None and len(self.kept) < KEPT_BYTES:
            self.kept += body
        await self.raw_send({"type": "http.response.body", "body": body, "more_body": more})

    async def whole(self, status: int, headers: Iterable[Header], body: bytes) -> None:
        """Sends all of an answer."""
        kept = [pair for pair in headers if pair[0] != b"content-length"]
        await self.start(status, [*kept, (b"content-length", str(len(body)).encode())])
        await self.send(body)

    async def json(self, status: int, value: Any, headers: Iterable[Header] = ()) -> None:
        """Sends a JSON value as the answer."""
        await self.whole(status, [JSON_TYPE, *headers], encoded(value))


async def read_body(receive: Receive, limit: int, within_s: float) -> bytes:
    """The request's body. Raises Refusal where it has more than `limit` bytes or is not there in time, ClientGone where
    it does not end."""
    try:
        async with asyncio.timeout(within_s):
            return await _read_body(receive, limit)
    except TimeoutError:
        said = f"The body was not complete within {within_s:g} s."
        raise Refusal(
            408, said, "invalid_request_error", "request_timeout", headers=((b"connection", b"close"),)
        ) from None


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


async def unless_gone(work: Awaitable[None], receive: Receive, exchange: Exchange) -> None:
    """Does `work`; cancels it, and the request upstream with it, when the client disconnects first (ClientGone)."""
    mine, gone = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        if not exchange.told_all and mine is not None:  # some clients leave at [DONE], before the connection's end
            gone = True
            mine.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        await work
    except asyncio.CancelledError:
        if gone and mine is not None:
            mine.uncancel()
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()
