"""Requests at a fixed rate (open loop) or as fast as they are answered (closed loop), and how long each one took.

    taskset -c 0 python -m serving.bench.load http://127.0.0.1:9000 --connections 32 --seconds 10 --rate 500

One JSON object: requests, errors, requests_per_s, p50_ms, p95_ms, p99_ms. It is a bare protocol on uvloop, as the stub
is, so that it is not what is measured. In an open loop a request that finds no free connection waits, and its wait
counts.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

WARM_UP_SECONDS = 1.0
MESSAGES = [{"role": "user", "content": "What are seventeen and twenty-five?"}]


@dataclass(frozen=True)
class Load:
    """What one load has measured; an answer other than 200 is an error. Times in milliseconds."""

    requests: int
    errors: int
    requests_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


def chat_request(url: str, fields: dict[str, Any]) -> bytes:
    """A whole HTTP request for a chat completion of the server at `url`."""
    body = json.dumps({"model": "m", "messages": MESSAGES, "max_tokens": 512, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\nauthorization: Bearer sk-1\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._answered: asyncio.Future[bool] | None = None
        self._given = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionError("the server closed the connection"))

    def ask(self, request: bytes) -> "asyncio.Future[bool]":
        """Sends a request; the future is whether the answer is a 200, once it is whole."""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._given += data
        head, end, rest = self._given.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if end and len(rest) >= int(length) and self._answered is not None and not self._answered.done():
            self._given = b""
            self._answered.set_result(head.startswith(b"HTTP/1.1 200"))

    def close(self) -> None:
        self._transport.close()


async def measure(
    url: str, fields: dict[str, Any], connections: int, seconds: float, rate: float | None = None, requests: int = 0
) -> Load:
    """Loads the server at `url`: `rate` requests a second, or (None) one after the other on every connection.

    It ends after `seconds`, or after `requests` where that is sooner. What the first second brings does not count.
    """
    request, loop = chat_request(url, fields), asyncio.get_running_loop()
    place = urlsplit(url)
    host, port = place.hostname or "127.0.0.1", place.port or 80
    made = [await loop.create_connection(_Connection, host, port) for _ in range(connections)]
    clients = [protocol for _, protocol in made]
    took: list[float] = []
    errors = 0
    begin = time.perf_counter() + min(WARM_UP_SECONDS, seconds / 4)
    end = begin + seconds

    async def one(client: _Connection, since: float) -> None:
        nonlocal errors
        good = await client.ask(request)
        if since >= begin:
            took.append(time.perf_counter() - since)
            errors += not good

    async def closed(client: _Connection) -> None:
        while (now := time.perf_counter()) < end and not 0 < requests <= len(took):
            await one(client, now)

    try:
        if rate is None:
            await asyncio.gather(*map(closed, clients))
        else:
            await _open(clients, rate, begin, end, one)
    finally:
        for client in clients:
            client.close()
    spent = time.perf_counter() - begin
    times = sorted(took)
    cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [float("nan")] * 99
    p50, p95, p99 = (1000 * cuts[place - 1] for place in (50, 95, 99))
    return Load(len(times), errors, len(times) / spent, p50, p95, p99)


async def _open(clients: list[_Connection], rate: float, begin: float, end: float, one: Any) -> None:
    """Starts a request every 1/rate seconds. A timer that is late is no wait; a connection that is not free is one."""
    free, waiting = deque(clients), deque[float]()
    tasks: set[asyncio.Task[None]] = set()

    async def run(client: _Connection, since: float) -> None:
        await one(client, since)
        while waiting:
            await one(client, waiting.popleft())
        free.append(client)

    due = time.perf_counter()
    while (now := time.perf_counter()) < end:
        while due <= now:
            due += 1 / rate
            if free:
                task = asyncio.ensure_future(run(free.popleft(), time.perf_counter()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                waiting.append(now)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url", help="address of the server, without /v1")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, help="requests a second; without it as fast as they are answered")
    parser.add_argument("--requests", type=int, default=0, help="at most this many; 0: no limit")
    parser.add_argument("--fields", type=json.loads, default={}, help="more fields of the request, as JSON")
    given = parser.parse_args()
    loaded = uvloop.run(measure(given.url, given.fields, given.connections, given.seconds, given.rate, given.requests))
    sys.stdout.write(json.dumps(asdict(loaded)) + "\n")
