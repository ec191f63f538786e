"""The engine behind the guard: asked for a completion, for a stream, or passed a request as it is.

async with Upstream("http://127.0.0.1:8001") as engine:
    reply = await engine.ask("/v1/chat/completions", {"model": "m", "messages": []}, [])
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from serving.guard.bodies import encoded
from serving.guard.exchange import FAILURES, Exchange, Header, refusal_of
from serving.guard.stream import DONE, error_events

# RFC 9110 7.6.1, and what this side of the proxy sets itself
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
# streams are looked at, so they come as they are
OURS = frozenset((b"host", b"content-length", b"expect", b"accept-encoding", b"x-request-id"))
OF_BODY = frozenset((b"content-type",))
BODY_HEADERS = [("accept-encoding", "identity"), ("content-type", "application/json")]
CONNECT_S, HEALTH_S = 10, 5
IDLE_S = 2  # vLLM closes connections that were idle for 5 s, perhaps while a request is sent on one
TAIL_BYTES = 32  # of a stream, in which its end has to be
SHORT_BYTES = 64 * 1024  # an answer that is passed on in one piece
MAX_ANSWER_BYTES = 64 * 2**20  # of one that is judged; no budget of tokens comes near


@dataclass(frozen=True)
class Reply:
    """The engine's whole answer."""

    status: int
    content: bytes
    headers: list[Header]


class Upstream:
    """A client of one engine; `async with` opens and closes its connections."""

    def __init__(self, address: str, key: str | None = None) -> None:
        self._address = address.rstrip("/")
        self._key = key
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            headers={"authorization": f"Bearer {self._key}"} if self._key else None,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open connections. Raises RuntimeError before they are."""
        if self._session is None:
            raise RuntimeError("the server in front of the guard must run the ASGI lifespan (uvicorn: lifespan on)")
        return self._session

    async def healthy(self) -> bool:
        """Whether the engine says so; one that has no /health, where it lists its models."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_S)
        try:
            for path in ("/health", "/v1/models"):
                async with self.session.get(f"{self._address}{path}", timeout=timeout) as answer:
                    if answer.status != 404:
                        return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass
        return False

    async def ask(self, path: str, body: dict[str, Any], headers: list[tuple[str, str]]) -> Reply:
        """The whole answer to a request with a JSON body. Raises aiohttp.ClientError, OSError, and ValueError where it
        has more than MAX_ANSWER_BYTES."""
        async with self.stream(path, body, headers) as answer:
            return Reply(answer.status, await _read(answer), returned(answer))

    def stream(
        self, path: str, body: dict[str, Any], headers: list[tuple[str, str]]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The answer to a request with a JSON body, to be read as it comes."""
        return self.session.post(
            URL(self._address + path, encoded=True), data=encoded(body), headers=headers, allow_redirects=False
        )

    async def relay(self, exchange: Exchange, body: bytes, headers: list[tuple[str, str]]) -> None:
        """Passes a request on as it is, and the answer back, until the exchange's deadline.

        A stream that breaks off, or ends without its [DONE], ends with an error event.
        """
        try:
            async with asyncio.timeout_at(exchange.deadline):
                await self._relay(exchange, body, headers)
        except FAILURES as failure:
            if not exchange.streams or exchange.finished:
                raise
            await exchange.send(b"\n\n" + error_events(encoded(refusal_of(failure).body())))

    async def _relay(self, exchange: Exchange, body: bytes, headers: list[tuple[str, str]]) -> None:
        scope = exchange.scope
        path, query = scope.get("raw_path") or scope["path"].encode(), scope.get("query_string")
        target = (path + b"?" + query if query else path).decode("latin-1")
        url = URL(self._address + target, encoded=True)  # not normalised: /v1/../x must not become /x
        sent = self.session.request(scope["method"], url, data=body or None, headers=headers, allow_redirects=False)
        async with sent as answer:
            streams = answer.content_type == "text/event-stream" and answer.status == 200
            if not streams and answer.content_length is not None and answer.content_length <= SHORT_BYTES:
                await exchange.whole(answer.status, returned(answer), await answer.read())
                return
            kept = returned(answer)
            if streams:  # an error at its end would make it longer than was said
                kept = [pair for pair in kept if pair[0] != b"content-length"]
            await exchange.start(answer.status, kept)
            tail = b""
            async for chunk in answer.content.iter_any():
                tail = (tail + chunk)[-TAIL_BYTES:] if streams else b""
                await exchange.send(chunk, more=True)
            if streams and not tail.strip().endswith(DONE.strip()):
                raise ValueError("the stream ended early")
            await exchange.send(b"")


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    if answer.content_length is not None and answer.content_length <= MAX_ANSWER_BYTES:
        return await answer.read()
    parts, size = [], 0
    async for chunk in answer.content.iter_any():
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise ValueError("the engine's answer has no end in sight")
    return b"".join(parts)


def forwarded(headers: list[Header], dropped: frozenset[bytes] = frozenset()) -> list[tuple[str, str]]:
    """The client's headers without those of its connection, and without `dropped`."""
    named = {name.strip() for key, value in headers if key == b"connection" for name in value.lower().split(b",")}
    out = HOP_BY_HOP | OURS | dropped | named
    return [(key.decode("latin-1"), value.decode("latin-1")) for key, value in headers if key.lower() not in out]


def returned(answer: aiohttp.ClientResponse) -> list[Header]:
    """The engine's headers without those of its connection."""
    return [(key.lower(), value) for key, value in answer.raw_headers if key.lower() not in HOP_BY_HOP]
