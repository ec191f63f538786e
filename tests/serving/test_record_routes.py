"""Routing in the guard: told where asked for, the OpenAI object whole, feedback taken, records of one's own alone."""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from fusion.sections.data import Rule
from serving.records.store import opened
from tests.serving.conftest import Guarded
from tests.serving.test_records import recording
from tests.serving.upstream import Cut, Status, completion
from tests.serving.waiting import wait_for

Start = Callable[..., Guarded]
FORMAT = {"type": "json_object"}
MATH = [{"role": "user", "content": "What is 1+1?"}]


def call(guard: Guarded, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(guard.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(guard: Guarded, key: str = "none", **fields: Any) -> Any:
    client = openai.OpenAI(base_url=f"{guard.url}/v1", api_key=key, max_retries=0)
    return client.chat.completions.with_raw_response.create(**{"model": "m", "messages": MATH, **fields})


def with_routes(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer as an engine gives it that tells its experts: layer 1 to the second, layer 3 half and half."""
    routes = np.zeros((4, 4, 1), dtype=np.uint8)
    routes[:, 1], routes[:2, 3] = 1, 1
    buffer = io.BytesIO()
    np.save(buffer, routes)
    told = base64.b64encode(buffer.getvalue()).decode()
    return {**answer, "choices": [{**choice, "routed_experts": told} for choice in answer["choices"]]}


def test_answers_are_as_without_records(guarded: Start, tmp_path: Path) -> None:
    plain, recorded = guarded(completion("{}")), guarded(completion("{}"), recording=recording(tmp_path))
    for fields in ({}, {"response_format": FORMAT}, {"stream": True}):
        said = [ask(guard, **fields).http_response.read() for guard in (plain, recorded)]
        assert said[0] == said[1]


@pytest.mark.parametrize("fields", [{}, {"response_format": FORMAT}])
def test_the_routing_is_told_where_it_is_asked_for(guarded: Start, tmp_path: Path, fields: dict[str, Any]) -> None:
    guard = guarded(with_routes(completion("{}")), recording=recording(tmp_path, engine_routes=True))
    silent = ask(guard, **fields)
    assert "x-qwen-fusion-routing" not in silent.headers
    assert "routed_experts" not in silent.text and "routing" not in silent.text
    for asked in ({"extra_body": {"guard": {"routing": True}}}, {"extra_headers": {"x-qwen-fusion-routing": "true"}}):
        answer = ask(guard, **fields, **asked)
        told = answer.http_response.json()["guard"]["routing"]
        assert (told["domain"], told["channel"], told["evidence"]) == ("math", "rules", "pattern")
        assert told["shares"]["all"] == {"g": 0.25, "m": 0.75}
        assert json.loads(answer.headers["x-qwen-fusion-routing"])["domain"] == "math"
        assert answer.parse().choices[0].message.content == "{}" and "routed_experts" not in answer.text
    sent = guard.upstream.requests[-1]
    assert "guard" not in sent and sent["messages"] == MATH
    status, record = call(guard, "GET", f"/v1/routing/{silent.headers['x-request-id']}")
    assert status == 200 and record["shares"]["all"] == {"g": 0.25, "m": 0.75} and record["shares_source"] == "engine"
    assert record["prompt_tokens"] == 10 and record["asked"] is None and record["suspicions"] == []


def test_a_stream_tells_the_routing_in_its_head(guarded: Start, tmp_path: Path) -> None:
    guard = guarded(completion("one two"), recording=recording(tmp_path, prompts=True))
    answer = ask(guard, stream=True, extra_body={"guard": {"routing": True}})
    assert json.loads(answer.headers["x-qwen-fusion-routing"])["domain"] == "math"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer.parse() if chunk.choices) == "one two "
    _, record = call(guard, "GET", f"/v1/routing/{answer.headers['x-request-id']}")
    assert record["answered"] == "one two " and record["streamed"] and record["asked"] == MATH


def test_a_stream_whose_client_leaves_at_its_last_event_was_answered(guarded: Start, tmp_path: Path) -> None:
    """As OpenAI's client does: it closes the connection at [DONE], be the server done with it or not."""
    guard = guarded(Cut(completion("one two"), 9, lingers_s=1.0), recording=recording(tmp_path, prompts=True))
    answer = ask(guard, stream=True)
    with answer.parse() as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "one two "
    path = f"/v1/routing/{answer.headers['x-request-id']}"
    assert wait_for(lambda: call(guard, "GET", path)[0] == 200)
    record = call(guard, "GET", path)[1]
    assert record["status"] == 200 and record["answered"] == "one two "


def test_feedback_is_kept_with_what_it_is_about(guarded: Start, tmp_path: Path) -> None:
    told = recording(tmp_path, prompts=True)
    guard = guarded(completion("2"), recording=told)
    request_id = ask(guard).headers["x-request-id"]
    status, kept = call(
        guard, "POST", "/v1/feedback", {"request_id": request_id, "domain": "general", "comment": " x "}
    )
    assert (status, kept) == (201, {"request_id": request_id, "kept": True, "text_kept": True})
    assert call(guard, "POST", "/v1/feedback", {"request_id": request_id, "rating": "down"})[0] == 201
    with opened(told.url) as store:
        thumb, said = store.feedback()
    assert thumb.rating == "down" and thumb.domain is None
    assert (said.domain, said.comment, said.messages, said.answer) == ("general", "x", MATH, "2")
    assert said.routed == {"domain": "math", "channel": "rules", "expert": None}


@pytest.mark.parametrize(
    "said",
    [
        {"request_id": "ID"},
        {"request_id": "ID", "comment": " "},
        {"request_id": "ID", "rating": "maybe"},
        {"request_id": "ID", "domain": "finance"},
        {"request_id": "ID", "rating": "up", "comment": "x" * 2001},
        {"request_id": "ID", "rating": "up", "stars": 5},
        [1],
        None,
    ],
)
def test_feedback_that_says_nothing_usable_is_refused(guarded: Start, tmp_path: Path, said: Any) -> None:
    told = recording(tmp_path)
    guard = guarded(recording=told)
    request_id = ask(guard).headers["x-request-id"]
    if isinstance(said, dict) and said.get("request_id") == "ID":
        said = {**said, "request_id": request_id}
    status, error = call(guard, "POST", "/v1/feedback", said)
    assert status == 400 and error["error"]["type"] == "invalid_request_error"
    with opened(told.url) as store:
        assert store.feedback() == []


def test_records_are_for_those_who_asked_and_for_operators(guarded: Start, tmp_path: Path) -> None:
    guard = guarded(recording=recording(tmp_path, prompts=True), api_keys=("one", "two"), operator_keys=("op",))
    request_id = ask(guard, key="one").headers["x-request-id"]
    said = {"request_id": request_id, "rating": "up"}
    for key, seen, kept in (("one", 200, 201), ("op", 200, 201), ("two", 404, 404), ("three", 401, 401)):
        assert call(guard, "GET", f"/v1/routing/{request_id}", key=key)[0] == seen
        assert call(guard, "POST", "/v1/feedback", said, key)[0] == kept
    for unknown in ("none", "%00", "a%00b", "x" * 200):
        assert call(guard, "GET", f"/v1/routing/{unknown}", key="op")[0] == 404
    for unknown in ("none", "a\0", "\ud800", 7, None):
        assert call(guard, "POST", "/v1/feedback", {**said, "request_id": unknown}, "op")[0] == 404


def test_a_clients_own_id_hides_nobody_elses_record(guarded: Start, tmp_path: Path) -> None:
    guard = guarded(recording=recording(tmp_path, prompts=True), api_keys=("one", "two"))
    for key in ("one", "two"):
        ask(guard, key=key, messages=[{"role": "user", "content": key}], extra_headers={"x-request-id": "same"})
    for key in ("one", "two"):
        status, record = call(guard, "GET", "/v1/routing/same", key=key)
        assert status == 200 and record["asked"][0]["content"] == key


def test_operators_alone_close_the_page_where_nobody_else_needs_a_key(guarded: Start, tmp_path: Path) -> None:
    guard = guarded(recording=recording(tmp_path), records={}, ui=True, operator_keys=("op",))
    request_id = ask(guard).headers["x-request-id"]
    assert call(guard, "GET", f"/v1/routing/{request_id}")[0] == 200
    assert call(guard, "GET", "/ui/overview")[0] == 403
    assert call(guard, "GET", "/ui/overview", key="op")[0] == 200


def test_a_question_made_to_be_slow_does_not_hold_up_others(guarded: Start, tmp_path: Path) -> None:
    told = recording(tmp_path)
    slow = {"math": told.domains["math"].model_copy(update={"rules": (Rule(pattern=r"\d+ *[-+*] *\d+"),)})}
    guard = guarded(recording=replace(told, domains={**slow, "general": told.domains["general"]}))
    ask(guard, messages=[{"role": "user", "content": "1" * 40_000}], extra_body={"guard": {"routing": True}})
    began = time.perf_counter()
    assert call(guard, "GET", "/health")[0] == 200
    assert time.perf_counter() - began < 5


def test_without_records_there_are_no_such_routes(guarded: Start) -> None:
    guard = guarded()
    assert call(guard, "POST", "/v1/feedback", {"request_id": "a", "rating": "up"})[0] == 404
    assert call(guard, "GET", "/v1/routing/a")[0] == 404


def test_what_the_policy_redacts_is_never_kept(guarded: Start, tmp_path: Path) -> None:
    policy = {"rules": [{"words": ["acme"]}, {"words": ["forbidden"], "side": "input", "action": "refuse"}]}
    told = recording(tmp_path, prompts=True)
    guard = guarded(completion("acme says 2"), policy=policy, recording=told)
    ask(guard, messages=[{"role": "user", "content": "acme: 1+1?"}])
    with pytest.raises(openai.BadRequestError):
        ask(guard, messages=[{"role": "user", "content": "forbidden"}])
    with opened(told.url) as store:
        until = time.monotonic() + 10
        while not store.count() and time.monotonic() < until:
            time.sleep(0.02)
        [record] = store.recent(5)
    assert record.asked == [{"role": "user", "content": "[redacted: a blocked word]: 1+1?"}]
    assert record.answered == "[redacted: a blocked word] says 2"


def test_errors_of_the_engine_are_recorded_and_passed(guarded: Start, tmp_path: Path) -> None:
    guard = guarded(Status(400, '{"error": {"message": "no"}}'), recording=recording(tmp_path, engine_routes=True))
    with pytest.raises(openai.BadRequestError) as caught:
        ask(guard)
    status, record = call(guard, "GET", f"/v1/routing/{caught.value.response.headers['x-request-id']}")
    assert status == 200 and record["status"] == 400 and record["shares"] == {}
