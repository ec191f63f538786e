"""Whatever the engine does, a client gets exactly one well-formed answer in time, and nothing is left behind."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.conftest import Guarded, guard_settings, running_guard
from tests.serving.faulty import Fault, FaultyUpstream
from tests.serving.test_asgi import FORMAT, USER
from tests.serving.upstream import completion, stream_chunk

DEADLINE_S = 0.6
TEXTS = [  # of every kind that has a name
    '{"a": 1}', '{"a": "x"}', "", "null", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}',
    '{"a": 1} x',
    f'{{"a": {"1" * 5000}}}',
    "\ufeff{}", "[" * 300, '{"a": 1', "```json\n{}\n```", '{"a": "' + "é" * 300_000 + '"}',
]  # fmt: skip
BODIES = [
    *(json.dumps(completion(text)).encode() for text in TEXTS),
    *(b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"choices": 5}', b'{"choices": [{}]}', b'{"choices": [null]}'),
    b'{"choices": [{"message": {"content": "{}", "tool_calls": 5}}]}',
    b'{"choices": [{"message": {"content": "{}", "tool_calls": [7]}}], "usage": "x"}',
    b"<html>Bad gateway</html>",
]
STREAMS = [
    b"".join(map(lambda piece: stream_chunk({"content": piece}), text))
    + stream_chunk({}, "stop") + b"data: [DONE]\n\n"
    for text in ('{"a": 1}', '{"a": "é张"}', '{"a": 1, "a": 2}', "no json")
]  # fmt: skip
FRAMINGS = st.sampled_from(["length", "length", "short", "long", "chunked", "open"])
CUTS, DROPS = st.sampled_from([0, 0, 1, 7, 1000]), st.one_of(st.just(-1), st.just(-1), st.integers(0, 400))
WAITS = st.sampled_from([0.0] * 8 + [0.05, 2 * DEADLINE_S])


def faults(bodies: list[bytes], kind: str) -> st.SearchStrategy[Fault]:
    def planned(body: bytes, status: int, framing: Any, cut: int, drop: int, wait: float) -> Fault:
        return Fault(body, status, kind, framing, cut if len(body) < 10_000 else 1000 * cut, drop, wait)

    statuses = st.sampled_from([200] * 6 + [400, 404, 429, 500, 503])
    return st.builds(planned, st.sampled_from(bodies), statuses, FRAMINGS, CUTS, DROPS, WAITS)


@pytest.fixture(scope="module")
def rig() -> Iterator[tuple[Guarded, FaultyUpstream]]:
    with FaultyUpstream() as upstream:
        told = guard_settings(upstream.url, deadline_s=DEADLINE_S, keepalive_s=0.3)
        with running_guard(told) as guard:
            yield guard, upstream


async def asked(url: str, fields: dict[str, Any]) -> tuple[int, str, bytes]:
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S + 5)
    body = {"model": "m", "messages": USER, **fields}
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(f"{url}/v1/chat/completions", json=body) as answer,
    ):
        return answer.status, answer.content_type, await answer.read()


def events(content: bytes) -> list[Any]:
    """The JSON of a stream's events; it has to end with [DONE]."""
    parts = [part for part in content.decode().split("\n\n") if part.strip() and not part.startswith(":")]
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def check(answer: tuple[int, str, bytes], stream: bool) -> None:
    status, kind, content = answer
    assert status in (200, 400, 404, 422, 429, 500, 502, 503, 504)
    if status != 200:
        assert kind in ("application/json", "text/event-stream")  # the engine's own word passes as it is
        if status in (422, 502, 504):
            assert json.loads(content)["error"]["message"]
    elif stream:
        found = events(content)
        if not any("error" in event for event in found):
            text = "".join(event["choices"][0]["delta"].get("content") or "" for event in found if event["choices"])
            assert isinstance(json.loads(text).get("a", 0), int)
    else:
        assert isinstance(json.loads(json.loads(content)["choices"][0]["message"]["content"]).get("a", 0), int)


def settled(guard: Guarded) -> int:
    """How many tasks the guard has once the connections of the last request have gone."""
    end = time.monotonic() + 5
    while guard.tasks() > 3 and time.monotonic() < end:
        time.sleep(0.01)
    return guard.tasks()


COMMON = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@COMMON
@given(plan=st.lists(faults(BODIES, "application/json"), min_size=1, max_size=3), stream=st.booleans())
def test_a_checked_request_ends_in_one_answer(
    rig: tuple[Guarded, FaultyUpstream], plan: list[Fault], stream: bool
) -> None:
    guard, upstream = rig
    upstream.planned(*plan)
    began = time.monotonic()
    check(asyncio.run(asked(guard.url, {"response_format": FORMAT, "stream": stream})), stream)
    assert time.monotonic() - began < DEADLINE_S + 1
    assert upstream.asked <= 5  # three attempts, and two 400s that were taken for the grammar's
    assert settled(guard) <= 3


@COMMON
@given(fault=faults([*STREAMS, *BODIES], "text/event-stream"))
def test_a_live_stream_ends_in_one_answer(rig: tuple[Guarded, FaultyUpstream], fault: Fault) -> None:
    guard, upstream = rig
    upstream.planned(fault)
    began = time.monotonic()
    fields = {"response_format": FORMAT, "stream": True, "guard": {"live": True}}
    check(asyncio.run(asked(guard.url, fields)), True)
    assert time.monotonic() - began < DEADLINE_S + 1 and upstream.asked <= 3  # a 400 may be of the grammar
    assert settled(guard) <= 3


@COMMON
@given(fault=faults(STREAMS, "text/event-stream"))
def test_an_unchecked_stream_ends_with_done(rig: tuple[Guarded, FaultyUpstream], fault: Fault) -> None:
    guard, upstream = rig
    upstream.planned(fault)
    began = time.monotonic()
    try:
        status, _, content = asyncio.run(asked(guard.url, {"stream": True}))
    except aiohttp.ClientError:  # an error of the engine's own that breaks off is cut off, and so does not look whole
        assert fault.status != 200
    else:
        assert status != 200 or content.endswith(b"data: [DONE]\n\n")
    assert time.monotonic() - began < DEADLINE_S + 1
    assert settled(guard) <= 3


def test_a_burst_of_errors_is_told_and_over_when_it_is_over(rig: tuple[Guarded, FaultyUpstream]) -> None:
    guard, upstream = rig
    bad = Fault(b'{"error": {"message": "boom"}}', 503)
    upstream.planned(bad, bad, bad, Fault(json.dumps(completion('{"a": 1}')).encode()))
    statuses = [asyncio.run(asked(guard.url, {"response_format": FORMAT}))[0] for _ in range(4)]
    assert statuses == [503, 503, 503, 200]
