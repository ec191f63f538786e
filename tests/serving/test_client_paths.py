"""OpenAI's own Python client on the paths that are easily wrong: errors of every kind, retries, asynchronous calls."""

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ContentDoneEvent

from serving.guard import schema as schemas
from tests.serving.apart import guard_apart
from tests.serving.test_asgi import BAD, FORMAT, GOOD, USER, Reply, Start, ask, metrics_of
from tests.serving.upstream import Slow, Status, Upstream, completion


@contextmanager
def answering(pages: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server of these pages, 404 for others: its address, and the paths that it has been asked for."""
    asked: list[str] = []

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_a_body_that_is_too_large_is_413_and_not_sent_again(guarded: Start) -> None:
    guard = guarded(GOOD, max_body_bytes=2000)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(guard, messages=[{"role": "user", "content": "x" * 4000}])
    assert caught.value.status_code == 413 and caught.value.code == "body_too_large"
    assert guard.upstream.requests == []


def test_an_overloaded_engine_is_asked_again_by_the_client(guarded: Start) -> None:
    guard = guarded(Status(429, '{"error": {"message": "busy", "type": "x", "code": 429}}'), GOOD)
    assert ask(guard, response_format=FORMAT).choices[0].message.content == '{"a": 1}'
    assert len(guard.upstream.requests) == 2


def test_the_responses_route_is_refused(guarded: Start) -> None:
    guard = guarded(GOOD)
    caller = openai.OpenAI(base_url=f"{guard.url}/v1", api_key="none", max_retries=2)
    with pytest.raises(openai.NotFoundError):
        caller.responses.create(model="m", input="hello")
    assert guard.upstream.requests == []


def test_a_late_answer_is_one_error_and_one_generation(guarded: Start) -> None:
    guard = guarded(Slow(5, GOOD), deadline_s=0.3)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(guard, response_format=FORMAT)
    assert caught.value.status_code == 504 and caught.value.code == "deadline"
    assert len(guard.upstream.requests) == 1


def test_a_200_that_is_no_completion_is_not_generated_again(guarded: Start) -> None:
    guard = guarded(Status(200, '{"choices": 7}'))
    with pytest.raises(openai.InternalServerError) as caught:
        ask(guard, response_format=FORMAT)
    assert caught.value.status_code == 502 and len(guard.upstream.requests) == 1


def test_the_asynchronous_client_parses_and_streams(guarded: Start) -> None:
    guard = guarded(BAD, GOOD, GOOD)

    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{guard.url}/v1", api_key="none") as caller:
            fields: dict[str, Any] = {"model": "m", "messages": USER, "response_format": Reply}
            answer = await caller.chat.completions.parse(**fields)
            async with caller.chat.completions.stream(**fields) as events:
                done = [event.parsed async for event in events if isinstance(event, ContentDoneEvent)]
            return [answer.choices[0].message.parsed, *done]

    assert asyncio.run(both()) == [Reply(a=1), Reply(a=1)]


def test_the_last_event_of_a_stream_tells_of_the_attempts(guarded: Start) -> None:
    guard = guarded(BAD, GOOD)
    chunks = list(ask(guard, response_format=FORMAT, stream=True))
    assert [len(made["errors"]) for made in chunks[-1].guard["attempts"]] == [1, 0]


def test_proto_keys_are_keys_like_others(guarded: Start) -> None:
    asked = {"type": "object", "properties": {"__proto__": {"type": "integer"}}, "required": ["__proto__"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": asked}}
    guard = guarded(completion('{"__proto__": "x"}'), completion('{"__proto__": 1}'))
    answer = ask(guard, response_format=wanted)
    assert answer.choices[0].message.content == '{"__proto__": 1}'
    assert guard.upstream.requests[0]["response_format"]["json_schema"]["schema"] == asked
    assert answer.guard["attempts"][0]["errors"][0]["path"] == "/__proto__"


def test_no_reference_is_fetched(guarded: Start, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text("true")
    with answering({"/schema": b"true", "/other": b"true"}) as (root, asked):
        address = f"{root}/schema"
        assert urllib.request.urlopen(address).read() == b"true" and asked.pop() == "/schema"  # it can be had
        guard = guarded(GOOD)
        inner = {"$id": address, "properties": {"a": {"$ref": "other"}}}
        for schema in ({"$ref": address}, {"$ref": file.as_uri()}, inner, {"$schema": address, "type": "object"}):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(guard, response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})
            assert caught.value.code == "invalid_schema"
    assert asked == [] and guard.upstream.requests == []


def test_a_schema_is_compiled_aside(guarded: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guarded(GOOD)
    begun, go_on = threading.Event(), threading.Event()

    class Slowly(schemas.Checker):
        def __init__(self, schema: Any) -> None:
            begun.set()
            assert go_on.wait(10)
            super().__init__(schema)

    monkeypatch.setattr(schemas, "Checker", Slowly)
    properties = {f"p{place}": {"type": "string"} for place in range(400)}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"properties": properties}}}
    asking = threading.Thread(target=ask, args=(guard,), kwargs={"response_format": wanted})
    asking.start()
    assert begun.wait(5)
    with urllib.request.urlopen(f"{guard.url}/health", timeout=5) as answer:  # while it compiles
        assert answer.status == 200 and not go_on.is_set()
    go_on.set()
    asking.join(10)
    assert len(guard.upstream.requests) == 1


def test_another_method_is_told_which_one(guarded: Start) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{guarded(GOOD).url}/v1/chat/completions")
    assert caught.value.code == 405 and caught.value.headers["allow"] == "POST"


HUGE = b'{"temperature": 1' + b"0" * 400 + b"}"


@pytest.mark.parametrize(
    "body", [HUGE, b'{"n": 0}', b'{"n": NaN}', b'{"n": 1.5}', b'{"temperature": Infinity}', b'{"seed": 0.5}']
)
def test_numbers_that_are_none_are_refused(guarded: Start, body: bytes) -> None:
    guard = guarded(GOOD)
    asked = {"model": "m", "messages": USER, "response_format": {"type": "json_object"}}
    whole = json.dumps(asked).encode()[:-1] + b", " + body[1:]
    sent = urllib.request.Request(f"{guard.url}/v1/chat/completions", whole, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(sent)
    assert caught.value.code == 400 and guard.upstream.requests == []


def test_a_large_body_where_none_belongs_is_refused(guarded: Start) -> None:
    guard = guarded(GOOD)
    sent = urllib.request.Request(f"{guard.url}/health", b"x" * 100_000)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(sent)
    assert caught.value.code == 413


def test_live_streams_that_break_off_are_counted_as_what_they_were(guarded: Start) -> None:
    guard = guarded(Status(200, "{}"), BAD)

    def live() -> None:
        for _ in ask(guard, response_format=FORMAT, stream=True, extra_body={"guard": {"live": True}}):
            pass

    for _ in range(2):
        with pytest.raises(openai.APIError):
            live()
    counted = asyncio.run(metrics_of(guard.url))
    assert 'guard_attempts_total{outcome="valid"}' not in counted
    assert 'guard_answers_total{route="/v1/chat/completions",status="422"}' in counted


def test_an_engine_with_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_FUSION_API_KEYS", "of the guard")
    monkeypatch.setenv("QWEN_FUSION_UPSTREAM_KEY", "of the engine")
    with Upstream(GOOD) as upstream:
        process, url = guard_apart(upstream.url)
        try:
            caller = openai.OpenAI(base_url=f"{url}/v1", api_key="of the guard", max_retries=0)
            for fields in ({}, {"response_format": FORMAT}):
                caller.chat.completions.create(model="m", messages=USER, **fields)  # type: ignore[call-overload]
        finally:
            process.terminate()
            assert process.wait(10) == 0
    assert [headers["authorization"] for headers in upstream.headers] == ["Bearer of the engine"] * 2


def test_an_engine_that_knows_no_health_is_ready_when_it_lists_models(guarded: Start) -> None:
    with answering({"/v1/models": b"{}"}) as (address, asked):
        guard = guarded(upstream=address)
        with urllib.request.urlopen(f"{guard.url}/ready") as answer:
            assert answer.status == 200
    assert asked == ["/health", "/v1/models"]
