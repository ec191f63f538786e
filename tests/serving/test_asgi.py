import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import openai
import pytest
from pydantic import BaseModel
from yarl import URL

from fusion.errors import UserError
from serving.client import chat
from tests.serving.conftest import Guarded
from tests.serving.upstream import DROP, HANG, USAGE, Slow, Status, completion

Start = Callable[..., Guarded]
GOOD = completion('{"a": 1}')
BAD = completion('{"a": "x"}')
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "s", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
USER = [{"role": "user", "content": "Give me a"}]


class Reply(BaseModel):
    a: int


def client(guard: Guarded) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guard.url}/v1", api_key="none", max_retries=2)


def ask(guard: Guarded, **fields: Any) -> Any:
    return client(guard).chat.completions.create(**{"model": "m", "messages": USER, **fields})


def test_requests_without_json_pass_and_get_the_defaults(guarded: Start) -> None:
    guard = guarded(completion("hello"), max_tokens=8192, max_model_len=1000)
    assert ask(guard).choices[0].message.content == "hello"
    assert guard.upstream.requests[0] == {
        "model": "m", "messages": USER, "temperature": 0.7, "top_p": 0.9, "max_tokens": 1000
    }  # fmt: skip
    ask(guard, temperature=0.0, top_p=1.0, max_completion_tokens=7)
    assert guard.upstream.requests[1] == {
        "model": "m", "messages": USER, "temperature": 0.0, "top_p": 1.0, "max_completion_tokens": 7
    }  # fmt: skip


def test_an_invalid_answer_is_asked_for_again(guarded: Start) -> None:
    guard = guarded(BAD, GOOD)
    answer = client(guard).chat.completions.with_raw_response.create(model="m", messages=USER, response_format=FORMAT)
    assert answer.headers["x-qwen-fusion-attempts"] == "2"
    assert answer.headers["x-qwen-fusion-attempt-breakdown"] == (
        "1;errors=1;prompt_tokens=10;completion_tokens=5, 2;errors=0;prompt_tokens=10;completion_tokens=5"
    )
    parsed = answer.parse()
    assert parsed.choices[0].message.content == '{"a": 1}'
    assert parsed.usage.total_tokens == 2 * USAGE["total_tokens"]


def test_the_clients_parse_helper_gets_an_object(guarded: Start) -> None:
    answer = client(guarded(BAD, GOOD)).chat.completions.parse(model="m", messages=USER, response_format=Reply)
    assert answer.choices[0].message.parsed == Reply(a=1)


def test_exhausted_is_422_and_never_nine_generations(guarded: Start) -> None:
    guard = guarded(BAD)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(guard, response_format=FORMAT)
    assert len(guard.upstream.requests) == 3
    assert caught.value.code == "json_guard_exhausted"
    assert caught.value.type == "invalid_structured_output"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(caught.value.response.json()["error"]["attempts"]) == 3
    with pytest.raises(openai.UnprocessableEntityError):
        ask(guard, response_format=FORMAT, stream=True)


def test_a_bad_schema_is_400_before_any_generation(guarded: Start) -> None:
    guard = guarded(GOOD)
    for schema in ({"type": "dict"}, {"$ref": "http://127.0.0.1:9/x"}):
        wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as caught:
            ask(guard, response_format=wanted)
        assert caught.value.code == "invalid_schema"
    assert guard.upstream.requests == []


@pytest.mark.parametrize("field", [{"n": "2"}, {"temperature": "0.5"}, {"seed": True}])
def test_a_number_that_is_none_is_400_before_any_generation(guarded: Start, field: dict[str, Any]) -> None:
    guard = guarded(BAD, GOOD)
    with pytest.raises(openai.BadRequestError, match=r"is not a (whole )?number"):
        ask(guard, response_format=FORMAT, **field)
    assert guard.upstream.requests == []


def test_a_guarded_stream_is_validated_and_then_streamed(guarded: Start) -> None:
    guard = guarded(BAD, GOOD)
    stream = ask(guard, response_format=FORMAT, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == '{"a": 1}'
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == 2 * USAGE["total_tokens"]
    assert all(sent["stream"] is False for sent in guard.upstream.requests)
    assert {headers["accept-encoding"] for headers in guard.upstream.headers} == {"identity"}
    with client(guard).chat.completions.stream(model="m", messages=USER, response_format=Reply) as events:
        assert events.get_final_completion().choices[0].message.parsed == Reply(a=1)


def test_an_unguarded_stream_arrives_as_it_is_made(guarded: Start) -> None:
    arrivals: list[float] = []
    text = ""
    for chunk in ask(guarded(completion("one two three four")), stream=True):
        arrivals.append(time.monotonic())
        text += chunk.choices[0].delta.content or ""
    assert text.split() == ["one", "two", "three", "four"]
    assert arrivals[-1] - arrivals[0] > 0.2


@pytest.mark.parametrize(("fault", "status"), [(DROP, 502), (Status(500, '{"error": {"message": "boom"}}'), 500),
                                               (Status(200, "no json"), 502), (Status(200, "[]"), 502),
                                               (Status(400, '{"error": {"message": "no"}}'), 400)])  # fmt: skip
@pytest.mark.parametrize("wanted", [FORMAT, {"type": "json_object"}])
def test_upstream_faults_become_clean_errors(guarded: Start, fault: Any, status: int, wanted: Any) -> None:
    guard = guarded(fault)
    with pytest.raises(UserError, match=f"answered {status}"):
        chat(guard.url, "m", USER, response_format=wanted)
    assert len(guard.upstream.requests) <= 3


def test_a_grammar_that_the_engine_refuses_is_left_out(guarded: Start) -> None:
    refused = Status(400, '{"error": {"message": "The provided JSON schema contains features not supported"}}')
    for script, formats in (([GOOD], ["json_object"]), ([refused, GOOD], ["json_object", None])):
        guard = guarded(refused, *script)
        answer = ask(guard, response_format=FORMAT)
        assert answer.choices[0].message.content == '{"a": 1}' and answer.model_extra["guard"]["grammar"] == "refused"
        sent = [body.get("response_format", {}).get("type") for body in guard.upstream.requests]
        assert sent == ["json_schema", *formats] and len(answer.model_extra["guard"]["attempts"]) == 1
    again = guarded(Status(400, '{"error": {"message": "no such model"}}'))
    with pytest.raises(openai.BadRequestError, match="no such model"):
        ask(again, response_format=FORMAT)
    assert len(again.upstream.requests) == 3


def test_completions_are_guarded_as_chats_are(guarded: Start) -> None:
    def text(value: str) -> dict[str, Any]:
        choice = {"index": 0, "text": value, "finish_reason": "stop", "logprobs": None}
        return {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}

    wanted = {"structured_outputs": {"choice": ["yes", "no"]}}
    guard = guarded(text("maybe"), text("yes"))
    answer = client(guard).completions.create(model="m", prompt="?", extra_body=wanted)
    assert answer.choices[0].text == "yes" and len(guard.upstream.requests) == 2
    assert "max_tokens" not in guard.upstream.requests[0]
    streamed = client(guard).completions.create(model="m", prompt="?", extra_body=wanted, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "yes"


def test_arguments_of_tools_are_guarded(guarded: Start) -> None:
    def called(arguments: str) -> dict[str, Any]:
        answer = completion(None, finish_reason="tool_calls")
        function = {"name": "f", "arguments": arguments}
        answer["choices"][0]["message"]["tool_calls"] = [{"id": "1", "type": "function", "function": function}]
        return answer

    parameters = FORMAT["json_schema"]["schema"]  # type: ignore[index]
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    guard = guarded(called('{"a": "x"}'), called('{"a": 1}'))
    answer = ask(guard, tools=tools)
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"a": 1}'
    assert "/tool_calls/0/function/arguments/a" in guard.upstream.requests[1]["messages"][-1]["content"]
    with client(guard).chat.completions.stream(model="m", messages=USER, tools=tools) as events:  # type: ignore[arg-type]
        final = events.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"a": 1}'  # type: ignore[index]


def test_a_stream_that_waits_is_kept_alive_and_ends_in_an_event(guarded: Start) -> None:
    for script, settings, said in (
        ([Slow(0.5, GOOD)], {}, '{\\"a\\": 1}'),
        ([Slow(0.5, BAD)], {"attempts": 1}, "json_guard_exhausted"),
        ([HANG], {"deadline_s": 0.5}, "deadline"),
        ([Slow(0.5, Status(503, "<html>"))], {}, "upstream_error"),
    ):
        guard = guarded(*script, keepalive_s=0.1, **settings)
        body = {"model": "m", "messages": USER, "response_format": FORMAT, "stream": True}
        text = asyncio.run(_text(guard, body))
        assert text.startswith(": checking\n\n: checking\n\n") and text.endswith("data: [DONE]\n\n")
        assert said in text
    guard = guarded(Slow(0.5, BAD), keepalive_s=0.1, attempts=1)
    with pytest.raises(openai.APIError, match="No valid structured output"):
        list(ask(guard, response_format=FORMAT, stream=True))


async def _text(guard: Guarded, body: dict[str, Any]) -> str:
    async with aiohttp.ClientSession(guard.url) as session, session.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        return await answer.text()


def nobody_listens() -> socket.socket:
    """A bound socket: its port is taken, and a connection to it refused."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    return taken


def test_an_engine_that_is_down_is_502_and_unhealthy(guarded: Start) -> None:
    with nobody_listens() as nobody:
        guard = guarded(upstream=f"http://127.0.0.1:{nobody.getsockname()[1]}")
        for fields in ({}, {"response_format": FORMAT}):
            with pytest.raises(UserError, match="answered 502"):
                chat(guard.url, "m", USER, **fields)
        with pytest.raises(openai.InternalServerError):
            client(guard).with_options(max_retries=0).models.list()


def test_a_body_that_does_not_come_is_a_408(guarded: Start) -> None:
    guard = guarded(GOOD, deadline_s=0.3)
    connection = http.client.HTTPConnection(guard.url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-length", "100")
    connection.endheaders(b'{"model": ')
    answer = connection.getresponse()
    assert answer.status == 408 and json.loads(answer.read())["error"]["code"] == "request_timeout"
    assert guard.upstream.requests == []


def test_the_deadline_is_504_and_cancels_upstream(guarded: Start) -> None:
    guard = guarded(HANG, deadline_s=0.3)
    with pytest.raises(UserError, match="answered 504"):
        chat(guard.url, "m", USER, response_format=FORMAT)
    assert guard.upstream.cancelled.wait(5)


@pytest.mark.parametrize("fields", [{}, {"response_format": FORMAT}])
def test_a_client_that_goes_away_cancels_the_engines_work(guarded: Start, fields: dict[str, Any]) -> None:
    guard = guarded(HANG)
    with pytest.raises(openai.APITimeoutError):
        client(guard).with_options(timeout=0.4, max_retries=0).chat.completions.create(
            model="m", messages=USER, **fields
        )  # type: ignore[call-overload]
    assert guard.upstream.cancelled.wait(5)


def test_routes_headers_and_limits(guarded: Start) -> None:
    asyncio.run(_walk_routes(guarded(GOOD, max_body_bytes=1000)))


async def _walk_routes(guard: Guarded) -> None:
    async with aiohttp.ClientSession(guard.url) as session:
        async with session.get("/v1/models") as answer:
            assert answer.headers["x-own"] == "1"
            assert (await answer.json())["data"][0]["id"] == "m"
        headers = {"connection": "x-private", "x-private": "1", "x-public": "1"}
        async with session.get("/v1/models/m?a=1&b=%20", headers=headers) as answer:
            assert answer.headers["x-query"] == "a=1&b=%20"
            assert "x-public" in answer.headers["x-saw"]
            assert "x-private" not in answer.headers["x-saw"]
        async with session.get("/v1/models/m", skip_auto_headers=("Accept-Encoding", "User-Agent")) as answer:
            assert not {"accept-encoding", "user-agent"} & set(answer.headers["x-saw"].split(","))
        async with session.post("/v1/chat/completions", data=b"x" * 2000) as answer:
            assert answer.status == 413
        async with session.post("/v1/chat/completions", data=b"{not json") as answer:
            assert answer.status == 400 and (await answer.json())["error"]["code"] == "invalid_json"
        for method, path in (("GET", "/pause"), ("POST", "/v1/responses"), ("POST", "/v1/x")):
            async with session.request(method, path) as answer:
                assert answer.status == 404
                assert (await answer.json())["error"]["code"] == "not_found"
        for path in ("/v1/../health", "/v1/%2e%2e/health"):
            async with session.get(URL(f"{guard.url}{path}", encoded=True)) as answer:
                assert answer.status == 404
        async with session.get("/ready") as answer:
            assert answer.status == 200
        guard.upstream.healthy = False
        async with session.get("/ready") as answer:
            assert answer.status == 503
            assert json.loads(await answer.text())["status"] == "engine unavailable"
        async with session.get("/health") as answer:  # the guard's own
            assert answer.status == 200


def test_without_a_known_key_nothing_is_answered(guarded: Start) -> None:
    guard = guarded(GOOD, api_keys=("first", "second"))
    for key in ("first", "second"):
        answer = openai.OpenAI(base_url=f"{guard.url}/v1", api_key=key).chat.completions.create(
            model="m",
            messages=USER,
            response_format=FORMAT,  # type: ignore[call-overload]
        )
        assert answer.choices[0].message.content == '{"a": 1}'
    assert all("authorization" not in headers for headers in guard.upstream.headers)
    for call in (lambda: ask(guard), lambda: client(guard).models.list()):
        with pytest.raises(openai.AuthenticationError) as caught:
            call()
        assert caught.value.code == "invalid_api_key"
    with pytest.raises(UserError, match="answered 401"):
        chat(guard.url, "m", USER)
    assert chat(guard.url, "m", USER, api_key="second").text == '{"a": 1}'
    assert asyncio.run(_status(guard, "/metrics")) == 401
    assert asyncio.run(_status(guard, "/health")) == asyncio.run(_status(guard, "/ready")) == 200


async def _status(guard: Guarded, path: str, **headers: str) -> int:
    async with aiohttp.ClientSession(guard.url) as session, session.get(path, headers=headers) as answer:
        return answer.status


@contextmanager
def one_under_way(guard: Guarded) -> Iterator[None]:
    """Inside, a request waits for the engine's answer."""
    waiting = threading.Thread(target=ask, args=(guard,))
    waiting.start()
    guard.upstream.wait_until_asked()
    yield
    waiting.join()


def test_too_many_at_a_time_are_told_to_come_back(guarded: Start) -> None:
    guard = guarded(Slow(1.0, GOOD), GOOD, max_in_flight=1)
    with one_under_way(guard):
        with pytest.raises(openai.InternalServerError) as caught:
            client(guard).with_options(max_retries=0).chat.completions.create(model="m", messages=USER)  # type: ignore[call-overload]
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
        assert asyncio.run(_status(guard, "/health")) == 200
    assert ask(guard).choices[0].message.content == '{"a": 1}'


def test_what_happens_is_counted_and_nothing_said_is_in_it(guarded: Start) -> None:
    guard = guarded(completion('{"a": "secret"}'), GOOD)
    ask(guard, response_format=FORMAT)
    asyncio.run(_status(guard, "/v1/nowhere"))
    counted = asyncio.run(metrics_of(guard.url))
    assert 'guard_attempts_total{outcome="invalid"} 1.0' in counted
    assert 'guard_attempts_total{outcome="valid"} 1.0' in counted
    assert 'guard_violations_total{keyword="type"} 1.0' in counted
    assert 'guard_answers_total{route="/v1/chat/completions",status="200"} 1.0' in counted
    assert 'guard_answers_total{route="other",status="404"} 1.0' in counted
    assert "guard_added_seconds_count 1.0" in counted and "guard_upstream_seconds_count 2.0" in counted
    assert "guard_in_flight 1.0" in counted  # the one that asks
    assert "secret" not in counted and "Give me" not in counted


async def metrics_of(url: str) -> str:
    async with aiohttp.ClientSession(url) as session, session.get("/metrics") as answer:
        return await answer.text()


def test_the_client_says_what_went_wrong(guarded: Start) -> None:
    answer = chat(guarded(BAD, GOOD).url, "m", USER, response_format=FORMAT)
    assert (answer.text, answer.finish_reason, answer.attempts) == ('{"a": 1}', "stop", 2)
    assert answer.usage["total_tokens"] == 2 * USAGE["total_tokens"]
    with nobody_listens() as nobody, pytest.raises(UserError, match="qwen-fusion serve"):
        chat(f"http://127.0.0.1:{nobody.getsockname()[1]}", "m", USER)
