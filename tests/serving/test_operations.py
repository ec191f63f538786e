"""Limits, identities, logs, spans, processes, and an end that lets requests end."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serving.client import chat
from serving.guard.tracing import Tracing
from tests.serving.apart import guard_apart
from tests.serving.conftest import Guarded
from tests.serving.processes import descendants
from tests.serving.test_asgi import BAD, FORMAT, GOOD, USER, Start, ask, client, metrics_of, one_under_way
from tests.serving.upstream import Slow, Upstream, completion
from tests.serving.waiting import wait_for


def test_one_asker_has_so_many_requests_a_minute(guarded: Start) -> None:
    guard = guarded(GOOD, requests_per_minute=2, api_keys=("first", "second"))

    def asked(key: str) -> Any:
        caller = openai.OpenAI(base_url=f"{guard.url}/v1", api_key=key, max_retries=0)
        return caller.chat.completions.create(model="m", messages=USER)  # type: ignore[call-overload]

    asked("first"), asked("first"), asked("second")
    with pytest.raises(openai.RateLimitError) as caught:
        asked("first")
    assert caught.value.code == "rate_limit_exceeded" and 1 <= int(caught.value.response.headers["retry-after"]) <= 61
    asked("second")
    assert len(guard.upstream.requests) == 4


def test_every_answer_has_the_requests_id(guarded: Start) -> None:
    async def ids(guard: Guarded) -> list[str]:
        given = []
        async with aiohttp.ClientSession(guard.url) as session:
            for path, headers in (
                ("/health", {}),
                ("/v1/x", {"x-request-id": "mine-1"}),
                ("/v1/models", {"x-request-id": "a b"}),
            ):
                async with session.get(path, headers=headers) as answer:
                    given.append(answer.headers["x-request-id"])
        return given

    guard = guarded(GOOD)
    first, second, third = asyncio.run(ids(guard))
    assert re.fullmatch("[0-9a-f]{32}", first) and second == "mine-1" and re.fullmatch("[0-9a-f]{32}", third)
    ask(guard, response_format=FORMAT, extra_headers={"x-request-id": "mine-2"})
    assert guard.upstream.headers[-1]["x-request-id"] == "mine-2"


@pytest.mark.parametrize("kind", ["none", "requests", "content"])
def test_a_line_of_json_for_every_request_and_content_only_where_asked_for(
    guarded: Start, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    guard = guarded(completion('{"a": "secret"}'), GOOD, log=kind, api_keys=("the-key",))
    caller = openai.OpenAI(base_url=f"{guard.url}/v1", api_key="the-key")
    caller.chat.completions.create(model="m", messages=USER, response_format=FORMAT)  # type: ignore[call-overload]
    with pytest.raises(openai.AuthenticationError):
        ask(guard)
    lines: list[dict[str, Any]] = []

    def told(count: int) -> bool:
        lines.extend(json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{"))
        return len(lines) >= count

    if kind == "none":
        assert not wait_for(lambda: told(1), within_s=0.5)
        return
    assert wait_for(lambda: told(2))
    first, second = lines
    assert (first["status"], first["attempts"], first["violations"]) == (200, 2, ["type"])
    assert (first["asker"], first["path"], second["status"]) == ("key 1", "/v1/chat/completions", 401)
    assert first["ms"] > 0 and re.fullmatch("[0-9a-f]{32}", first["request_id"])
    said = json.dumps(lines)
    assert "the-key" not in said
    assert ("Give me a" in said) == (kind == "content")
    if kind == "content":
        assert first["answered"][0]["message"]["content"] == '{"a": 1}'


def test_a_span_for_the_request_and_one_for_every_attempt(guarded: Start) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    guard = guarded(BAD, GOOD, tracing=Tracing(provider))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ask(guard, response_format=FORMAT, extra_headers={"traceparent": parent})
    assert wait_for(lambda: len(exporter.get_finished_spans()) == 3)
    first, second, whole = exporter.get_finished_spans()
    assert [span.name for span in (first, second, whole)] == ["attempt 1", "attempt 2", "guard /v1/chat/completions"]
    assert format(whole.context.trace_id, "032x") == parent[3:35]
    assert whole.attributes is not None and dict(whole.attributes) == {"http.response.status_code": 200, "attempts": 2}
    sent = [headers["traceparent"] for headers in guard.upstream.headers]
    assert sent == [f"{parent[:36]}{format(span.context.span_id, '016x')}-01" for span in (first, second)]
    with pytest.raises(openai.BadRequestError):
        ask(guard, response_format={"type": "json_schema"})
    assert wait_for(lambda: len(exporter.get_finished_spans()) == 4)
    refused = exporter.get_finished_spans()[-1]
    assert refused.attributes is not None and refused.attributes["http.response.status_code"] == 400


def test_a_connection_that_was_idle_for_a_while_is_still_good() -> None:
    with Upstream(GOOD) as upstream:
        process, url = guard_apart(upstream.url)
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        try:
            for idle_s in (6, 0):  # uvicorn's own limit is 5 s, as long as httpx keeps one
                connection.request("GET", "/health")
                answer = connection.getresponse()
                assert answer.status == 200 and answer.read()
                time.sleep(idle_s)
        finally:
            connection.close()
            process.terminate()
            assert process.wait(10) == 0


def test_requests_under_way_end_before_the_guard_does() -> None:
    with Upstream(Slow(1.5, GOOD)) as upstream:
        process, url = guard_apart(upstream.url)
        answers: list[str] = []
        waiting = threading.Thread(
            target=lambda: answers.append(chat(url, "m", USER, response_format=FORMAT).text), daemon=True
        )
        waiting.start()
        upstream.wait_until_asked()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(OSError):  # nothing new is taken
            os.close(_connected(url))
        waiting.join(10)
        assert answers == ['{"a": 1}'] and process.wait(10) == 0


def test_what_does_not_end_in_time_is_cut_off() -> None:
    with Upstream(Slow(30, GOOD)) as upstream:
        process, url = guard_apart(upstream.url, "drain_s=1", "keepalive_s=0.2")
        asked = {"model": "m", "messages": USER, "response_format": FORMAT}
        whole, stream = (http.client.HTTPConnection(url.removeprefix("http://"), timeout=20) for _ in range(2))
        for connection, more in ((whole, {}), (stream, {"stream": True})):
            connection.request("POST", "/v1/chat/completions", json.dumps({**asked, **more}))
        upstream.wait_until_asked()
        head = stream.getresponse()
        assert head.status == 200 and head.readline().startswith(b": ")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        answer = whole.getresponse()
        assert answer.status == 503 and json.loads(answer.read())["error"]["code"] == "stopping"
        assert b'"stopping"' in (rest := head.read()) and rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(10) == 0 and time.monotonic() - began < 5


def _connected(url: str) -> int:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=2).detach()


def _quietly(url: str) -> None:
    try:
        chat(url, "m", USER, response_format=FORMAT)
    except Exception:
        return


def test_several_processes_share_the_port_and_their_counts() -> None:
    with Upstream(BAD, GOOD) as upstream:
        process, url = guard_apart(upstream.url, "workers=2")
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                try:
                    chat(url, "m", USER, response_format=FORMAT)
                    break
                except Exception:
                    time.sleep(0.2)
            for _ in range(7):
                assert chat(url, "m", USER, response_format=FORMAT).text == '{"a": 1}'
            workers = [pid for pid in descendants(process.pid) if b"spawn_main" in _cmdline(pid)]
            assert len(workers) == 2
            for _ in range(4):  # whichever is asked, it knows of all
                assert 'guard_attempts_total{outcome="valid"} 8.0' in asyncio.run(metrics_of(url))
            os.kill(workers[0], signal.SIGKILL)  # one that dies is replaced, and the other answers meanwhile
            end = time.monotonic() + 30
            while time.monotonic() < end and workers[0] in descendants(process.pid):
                time.sleep(0.2)
            assert chat(url, "m", USER, response_format=FORMAT).text == '{"a": 1}'
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_clients_retries_wait_as_they_are_told(guarded: Start) -> None:
    guard = guarded(Slow(0.6, GOOD), GOOD, max_in_flight=1)
    with one_under_way(guard):
        began = time.monotonic()
        assert client(guard).chat.completions.create(model="m", messages=USER).choices  # type: ignore[call-overload]
        assert time.monotonic() - began >= 0.9
