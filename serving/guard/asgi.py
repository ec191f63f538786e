"""The guard as an ASGI app in front of an OpenAI-compatible server.

Answers completions that ask for structure (JSON, a pattern, tool calls, YAML, XML) only where they are as asked, and
asks again otherwise. Completions that ask for none and the list of models pass as they are; there is no other route.

    qwen-fusion guard --upstream http://127.0.0.1:8001 --port 8000
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp

from serving.guard.bodies import decoded, encoded, object_of
from serving.guard.exchange import (
    EVENT_STREAM,
    FAILURES,
    JSON_TYPE,
    NO_RETRY,
    ClientGone,
    Exchange,
    Header,
    Receive,
    Refusal,
    SendEvent,
    read_body,
    refusal_of,
    unless_gone,
)
from serving.guard.keys import Keys, owner_of
from serving.guard.ladder import Done, Exhausted, Ladder, Limits, Send, ladder_for, token_count
from serving.guard.live import LiveCheck
from serving.guard.metrics import Metrics
from serving.guard.openapi import DESCRIPTION
from serving.guard.paths import CHAT, COMPLETIONS, COUNTED, FEEDBACK, MODELS, OPEN, POSTED, ROUTING, UI, is_ui
from serving.guard.policy_step import PolicyStep
from serving.guard.rates import Rates
from serving.guard.requests_log import RequestsLog
from serving.guard.schema import CheckerCache, NotCompiled, SchemaError
from serving.guard.settings import GuardSettings
from serving.guard.stream import as_events, error_events
from serving.guard.tracing import Tracing
from serving.guard.upstream import BODY_HEADERS, OF_BODY, Upstream, forwarded, returned
from serving.guard.wanted import CONSTRAINTS, FIELD, Extension, extension_of, is_completion

if TYPE_CHECKING:
    from serving.guard.record_routes import RecordRoutes
    from serving.guard.recording import RequestRecords

LOGGER = logging.getLogger(__name__)
App = Callable[[MutableMapping[str, Any], Receive, SendEvent], Awaitable[None]]

NUMBERS = ("n", "max_tokens", "max_completion_tokens", "temperature", "seed")
RETRY_SOON = (b"retry-after", b"1")
ATTEMPTS_HEADER, BREAKDOWN_HEADER = b"x-qwen-fusion-attempts", b"x-qwen-fusion-attempt-breakdown"
LARGE_ANSWER_BYTES = 256 * 1024  # one that is judged aside, so that others do not wait for it
UPLOAD_S = 60  # for a request's body: one that trickles in takes a place among those under way
OTHER_BODY_BYTES = 64 * 1024  # of requests that have no use for a body
SLOW_FORM_BYTES = 4 * 1024  # the same of YAML


@dataclass(frozen=True)
class _Answer:
    """What to send: an object of the guard's own making, or the upstream's word as it came."""

    status: int
    content: dict[str, Any] | bytes
    headers: tuple[Header, ...] = (JSON_TYPE,)

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else encoded(self.content)


def build_app(settings: GuardSettings, tracing: Tracing | None = None) -> App:
    """The guard as an ASGI app, for uvicorn or any other server. It needs the lifespan protocol."""
    return _Guard(settings, tracing or Tracing())


class _Guard:
    def __init__(self, settings: GuardSettings, tracing: Tracing) -> None:
        self._settings, self._tracing = settings, tracing
        guard = settings.guard
        self._upstream = Upstream(settings.upstream, settings.upstream_key)
        self._cache = CheckerCache()
        self._keys = Keys((*settings.api_keys, *settings.operator_keys) if settings.api_keys else ())
        self._rates = Rates(guard.requests_per_minute) if guard.requests_per_minute else None
        replaced = self._keys or settings.upstream_key  # the client's key is no business of the engine's then
        own = frozenset((b"authorization",)) if replaced else frozenset()
        self._dropped, self._dropped_of_body = own, own | OF_BODY
        self._metrics, self._log = Metrics(), RequestsLog(guard.log)
        self._policy = PolicyStep(guard.policy)
        self._records, self._record_routes = _recording(settings, self._metrics)
        self._in_flight = 0  # completions alone

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: SendEvent) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(Exchange(scope, send), receive)

    async def _lifespan(self, receive: Receive, send: SendEvent) -> None:
        await receive()
        async with self._upstream, self._records or nullcontext():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, exchange: Exchange, receive: Receive) -> None:
        error = None
        completes = exchange.path in (CHAT, COMPLETIONS)
        self._in_flight += completes
        self._metrics.in_flight(1)
        if completes and self._records:
            self._records.begin(exchange)
        exchange.deadline = asyncio.get_running_loop().time() + self._settings.guard.deadline_s
        try:
            self._admit(exchange)
            guard = self._settings.guard
            most = guard.max_body_bytes if completes else min(OTHER_BODY_BYTES, guard.max_body_bytes)
            body = await read_body(receive, most, min(UPLOAD_S, guard.deadline_s))
            exchange.read_at = time.perf_counter()
            with self._tracing.span(f"guard {exchange.path}", exchange.headers) as span:
                try:
                    await unless_gone(self._route(exchange, body), receive, exchange)
                except FAILURES as failure:
                    exchange.trace(span, refusal_of(failure).status)
                    raise
                exchange.trace(span, exchange.status)
        except ClientGone:
            exchange.status = 499
        except FAILURES as failure:
            error = refusal_of(failure)
        except asyncio.CancelledError:  # the server ends, and has waited for `drain_s`
            error = Refusal(503, "The guard is being stopped.", "overloaded_error", "stopping", headers=(RETRY_SOON,))
        except Exception:
            LOGGER.exception("request %s", exchange.id)
            said = "The guard has a fault; its log has more."
            error = Refusal(500, said, "server_error", "internal_error", headers=(NO_RETRY,))
        finally:
            self._in_flight -= completes
            self._metrics.in_flight(-1)
        if error is not None and not exchange.started:
            await exchange.json(error.status, error.body(), error.headers)
        elif error is not None and error.code == "stopping" and exchange.streams and not exchange.finished:
            exchange.broke_off = error.status
            await exchange.send(b"\n\n" + error_events(encoded(error.body())))
        path = exchange.path if exchange.path in COUNTED else "other"
        self._metrics.answer(path, exchange.ended_as)
        self._log.write(exchange)
        if completes and self._records:
            self._records.end(exchange)
        if error is not None and not exchange.finished:  # leaving without an end closes the connection
            raise ConnectionAbortedError(error.message)  # so that an answer cut short does not look complete

    def _admit(self, exchange: Exchange) -> None:
        """Raises Refusal where the request has no key, its asker has made too many, or too many are under way."""
        if exchange.path in OPEN or (exchange.path == UI and self._settings.guard.ui):
            return
        client = exchange.scope.get("client")
        exchange.asker = client[0] if client else ""
        if self._keys:
            number = self._keys.number(exchange.headers.get(b"authorization"))
            if number is None:
                headers = ((b"www-authenticate", b"Bearer"),)
                said = "The request has no API key that is known here (Authorization: Bearer ...)."
                raise Refusal(401, said, "invalid_request_error", "invalid_api_key", headers=headers)
            exchange.asker = f"key {number}"
            exchange.owner = owner_of(exchange.headers.get(b"authorization"))
        if exchange.path not in POSTED:
            return
        limit = self._settings.guard.max_in_flight
        if limit is not None and self._in_flight > limit:
            said = f"{limit} requests are under way, as many as are taken at a time."
            raise Refusal(503, said, "overloaded_error", "overloaded", headers=(RETRY_SOON,))
        if self._rates is not None and (wait := self._rates.wait_s(exchange.asker)):
            said = f"More than {self._settings.guard.requests_per_minute} requests within a minute."
            headers = ((b"retry-after", str(wait).encode()),)
            raise Refusal(429, said, "rate_limit_error", "rate_limit_exceeded", headers=headers)

    async def _route(self, exchange: Exchange, body: bytes) -> None:
        path, method = exchange.path, exchange.scope["method"]
        if path == "/health":
            await exchange.json(200, {"status": "ok"})
        elif path == "/ready":
            ready = await self._upstream.healthy()
            await exchange.json(200 if ready else 503, {"status": "ok" if ready else "engine unavailable"})
        elif path == "/metrics" and method == "GET":
            await exchange.whole(200, [(b"content-type", b"text/plain; version=0.0.4")], self._metrics.text())
        elif path == "/openapi.json" and method == "GET":
            await exchange.json(200, DESCRIPTION)
        elif path in (CHAT, COMPLETIONS) and method == "POST":
            await self._completion(exchange, body)
        elif self._record_routes and path == FEEDBACK and method == "POST":
            await self._record_routes.feedback(exchange, body)
        elif self._record_routes and path.startswith(ROUTING) and method == "GET":
            await self._record_routes.routing(exchange)
        elif self._record_routes and self._settings.guard.ui and is_ui(path) and method == "GET":
            await self._record_routes.ui(exchange)
        elif (path == MODELS or path.startswith(f"{MODELS}/")) and method == "GET" and ".." not in path:
            await self._relay(exchange, body)
        elif path in COUNTED and (self._records or path != FEEDBACK):
            allowed = "POST" if path in POSTED else "GET"
            said = f"{path} is asked with {allowed}."
            headers = ((b"allow", allowed.encode()),)
            raise Refusal(405, said, "invalid_request_error", "method_not_allowed", headers=headers)
        else:
            raise Refusal(404, f"There is no {path} here.", "invalid_request_error", "not_found")

    async def _relay(self, exchange: Exchange, body: bytes) -> None:
        headers = [*forwarded(exchange.scope["headers"], self._dropped), ("x-request-id", exchange.id)]
        await self._upstream.relay(exchange, body, self._tracing.inject(headers))

    async def _completion(self, exchange: Exchange, body: bytes) -> None:
        request = object_of(body)
        if request is None:
            raise Refusal(
                400, "The body is no JSON object, or one nested too deeply.", "invalid_request_error", "invalid_json"
            )
        exchange.asked = request
        redacted: dict[str, int] = {}
        async with asyncio.timeout_at(exchange.deadline):
            filled = await self._policy.admit(self._upstream.session, self._fill(request, exchange.path), redacted)
            exchange.admitted = filled
            own_budget = any(request.get(key) is not None for key in ("max_tokens", "max_completion_tokens"))
            ladder, extension = await self._ladder(filled, own_budget)
        if self._records:
            self._records.tell(exchange, filled, extension.routing)
        if ladder is None:
            bare = {key: value for key, value in filled.items() if key != FIELD}
            if self._records and self._records.reads_answers(exchange) and not request.get("stream"):
                await self._whole(exchange, bare, self._records)
            else:
                await self._relay(exchange, body if bare == request else encoded(bare))
            return
        for key in NUMBERS:  # a repair computes with them
            if not _is_number(filled.get(key), key):
                said = f"'{key}' is not {'a number' if key == 'temperature' else 'a whole number'} that can be used."
                raise Refusal(400, said, "invalid_request_error", "invalid_value", key)
        if extension.live and request.get("stream") and not self._policy.reads_output:
            if filled.get("n") not in (None, 1):
                said = "A live stream has one choice: leave n out."
                raise Refusal(400, said, "invalid_request_error", "invalid_value", "n")
            await self._live(exchange, ladder, filled)
        else:
            await self._guarded(exchange, ladder, request, redacted)

    def _fill(self, request: dict[str, Any], path: str) -> dict[str, Any]:
        sampling = self._settings.sampling
        if sampling is None or path != CHAT:  # a completion's defaults are the engine's
            return request
        defaults: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if request.get("max_tokens") is None and request.get("max_completion_tokens") is None:
            defaults["max_tokens"] = self._settings.budget
        missing = {key: value for key, value in defaults.items() if value is not None and request.get(key) is None}
        return {**request, **missing}

    async def _whole(self, exchange: Exchange, request: dict[str, Any], records: "RequestRecords") -> None:
        """Asks for an answer that nothing is asked of, less the engine's account of its experts, with the routing."""
        async with asyncio.timeout_at(exchange.deadline):
            headers = self._tracing.inject(self._body_headers(exchange))
            reply = await self._upstream.ask(exchange.path, request, headers)
        if reply.status != 200:
            await exchange.whole(reply.status, reply.headers, reply.content)
            return
        answer = decoded(reply.content)
        if not is_completion(answer):
            raise ValueError("the engine's answer is no completion")
        await exchange.json(200, records.routed(exchange, answer, answer.get("usage")))

    async def _ladder(self, request: dict[str, Any], own_budget: bool) -> tuple[Ladder | None, Extension]:
        """The ladder of a request, and what it says in the guard's own field. Raises Refusal on a bad schema."""
        guard, window = self._settings.guard, self._settings.max_model_len
        limits = Limits(guard.attempts, None if own_budget else window, window, guard.unwrap)
        try:
            extension = extension_of(request)
            try:
                return ladder_for(request, self._cache.at_once, limits, self._policy.reads_output), extension
            except NotCompiled:
                return await asyncio.to_thread(
                    ladder_for, request, self._cache.get, limits, self._policy.reads_output
                ), extension
        except SchemaError as error:
            what = next((key for key in (FIELD, *CONSTRAINTS, "tools") if request.get(key)), None)
            said = f"The schema cannot be used: {error}"
            raise Refusal(400, said, "invalid_request_error", error.code, what) from None

    async def _guarded(
        self, exchange: Exchange, ladder: Ladder, request: dict[str, Any], redacted: dict[str, int]
    ) -> None:
        if not request.get("stream"):
            answer = await self._climb(exchange, ladder, redacted)
            await exchange.whole(answer.status, answer.headers, answer.body)
            return
        climb = asyncio.ensure_future(self._climb(exchange, ladder, redacted))
        try:
            while not (await asyncio.wait({climb}, timeout=self._settings.guard.keepalive_s))[0]:
                if not exchange.started:
                    await exchange.start(200, [EVENT_STREAM])
                await exchange.send(b": checking\n\n", more=True)
            try:
                answer = await climb
            except FAILURES as failure:
                if not exchange.started:
                    raise
                error = refusal_of(failure)
                answer = _Answer(error.status, error.body())
        finally:
            climb.cancel()
        if answer.status == 200 and isinstance(answer.content, dict):
            options = request.get("stream_options")
            usage = isinstance(options, dict) and bool(options.get("include_usage"))
            answer = _Answer(200, as_events(answer.content, usage), (EVENT_STREAM, *answer.headers[1:]))
        elif exchange.started:  # what has gone out is a stream: an error is its last event
            exchange.broke_off = answer.status
            answer = replace(answer, content=error_events(answer.body))
        if exchange.started:
            await exchange.send(answer.body)
        else:
            await exchange.whole(answer.status, answer.headers, answer.body)

    async def _climb(self, exchange: Exchange, ladder: Ladder, redacted: dict[str, int]) -> _Answer:
        """As `_steps`; a failure once attempts have been made tells of them, and is not to be tried again."""
        try:
            return await self._steps(exchange, ladder, redacted)
        except FAILURES as failure:
            error = refusal_of(failure)
            if not ladder.attempts:
                raise error from None
            kept = (pair for pair in error.headers if pair[0] != NO_RETRY[0])
            error.headers = (*kept, NO_RETRY, *_attempt_headers(ladder.attempts))
            error.more = self._policy.report({"attempts": ladder.attempts, "usage": ladder.usage})
            raise error from None
        finally:
            self._metrics.added.observe(time.perf_counter() - exchange.read_at - exchange.away_s)

    async def _steps(self, exchange: Exchange, ladder: Ladder, redacted: dict[str, int]) -> _Answer:
        """The ladder's outcome, or the upstream's own word where that is an error, within the deadline."""
        headers = self._body_headers(exchange)
        slow = ladder.wanted.form == "yaml"
        step: Send | Done | Exhausted = ladder.start()
        async with asyncio.timeout_at(exchange.deadline):
            while isinstance(step, Send):
                sent = time.perf_counter()
                with self._tracing.span(f"attempt {len(ladder.attempts) + 1}"):
                    try:
                        reply = await self._upstream.ask(exchange.path, step.body, self._tracing.inject(headers))
                    finally:
                        spent = time.perf_counter() - sent
                        exchange.away_s += spent
                        self._metrics.upstream.observe(spent)
                if reply.status == 200:
                    large = len(reply.content) > (SLOW_FORM_BYTES if slow else LARGE_ANSWER_BYTES)
                    judged = partial(_judged, ladder, reply.content)
                    step = await asyncio.to_thread(judged) if large else judged()
                    self._note(exchange, ladder.attempts[-1]["errors"])
                    continue
                self._metrics.attempt(f"status {reply.status}")
                bare = ladder.refuse() if reply.status == 400 and not ladder.attempts else None
                if bare is not None:
                    step = bare
                elif not ladder.attempts:
                    return _Answer(reply.status, reply.content, tuple(reply.headers))
                elif reply.status == 400:  # it was none for the first attempt: what has been added to it does not fit
                    step = ladder.give_up()
                else:
                    made = (NO_RETRY, *_attempt_headers(ladder.attempts))  # and not to be made again
                    return _Answer(reply.status, reply.content, (*reply.headers, *made))
            if isinstance(step, Done) and self._policy.reads_output:
                released = await self._policy.release(self._upstream.session, step.answer, ladder.wanted, redacted)
                step = Done(released, step.attempts)
        kept = (JSON_TYPE, *_attempt_headers(ladder.attempts))
        if isinstance(step, Exhausted):
            error = {"error": self._policy.report(step.error["error"])}
            return _Answer(422, error, (*kept, NO_RETRY))
        answer = step.answer
        if self._records:
            answer = self._records.routed(exchange, answer, ladder.attempts[-1]["usage"])
        exchange.answered = answer["choices"]
        return _Answer(200, answer, kept)

    async def _live(self, exchange: Exchange, ladder: Ladder, request: dict[str, Any]) -> None:
        """Passes a stream on as it comes; what is wrong ends it with an error event."""
        headers = self._tracing.inject(self._body_headers(exchange))
        check = LiveCheck(ladder.wanted)
        step: Send | None = ladder.start()
        try:
            async with asyncio.timeout_at(exchange.deadline):
                while step is not None and not exchange.started:
                    body = {**step.body, "stream": True}
                    if "stream_options" in request:
                        body["stream_options"] = request["stream_options"]
                    async with self._upstream.stream(exchange.path, body, headers) as answer:
                        step = ladder.refuse() if answer.status == 400 else None
                        if answer.status == 200:
                            await self._pass_live(exchange, check, answer.content)
                        elif step is None:
                            await exchange.whole(answer.status, returned(answer), await answer.read())
                            return
            last = check.end()
        except FAILURES as failure:
            if not exchange.started:
                raise
            error = refusal_of(failure)
            exchange.broke_off = error.status
            last = error_events(encoded(error.body()))
        if exchange.broke_off or check.failed:
            exchange.broke_off = exchange.broke_off or 502
            self._count_attempt(exchange, f"status {exchange.broke_off}")
        else:
            exchange.broke_off = 422 if check.violations else 0
            self._note(exchange, [violation.told(0) for violation in check.violations])
        await exchange.send(last)

    async def _pass_live(self, exchange: Exchange, check: LiveCheck, stream: aiohttp.StreamReader) -> None:
        await exchange.start(200, [EVENT_STREAM])
        async for chunk in stream.iter_any():
            if passed := check.feed(chunk):
                await exchange.send(passed, more=True)
            if check.over:
                break

    def _body_headers(self, exchange: Exchange) -> list[tuple[str, str]]:
        given = forwarded(exchange.scope["headers"], self._dropped_of_body)
        return [*given, *BODY_HEADERS, ("x-request-id", exchange.id)]

    def _note(self, exchange: Exchange, errors: list[dict[str, Any]]) -> None:
        self._count_attempt(exchange, "invalid" if errors else "valid")
        for error in errors:
            self._metrics.violation(error["keyword"])
            exchange.violations.append(error["keyword"])

    def _count_attempt(self, exchange: Exchange, outcome: str) -> None:
        exchange.attempts += 1
        self._metrics.attempt(outcome)


def _attempt_headers(attempts: list[dict[str, Any]]) -> tuple[Header, Header]:
    """How many attempts there were, and of each its errors and tokens: a list with parameters (RFC 9651)."""
    told = []
    for made in attempts:
        part = f"{made['attempt']};errors={len(made['errors'])}"
        for key in ("prompt_tokens", "completion_tokens"):
            if count := token_count(made["usage"], key):
                part += f";{key}={count}"
        told.append(part)
    return (ATTEMPTS_HEADER, str(len(attempts)).encode()), (BREAKDOWN_HEADER, ", ".join(told).encode())


def _recording(settings: GuardSettings, metrics: Metrics) -> tuple["RequestRecords | None", "RecordRoutes | None"]:
    """What records need, imported only where there are some: the database's library takes as long as all else here."""
    if settings.recording is None:
        return None, None
    from serving.guard.record_routes import RecordRoutes
    from serving.guard.recording import RequestRecords

    records, keyed = RequestRecords(settings.recording, metrics.dropped), settings.api_keys or settings.operator_keys
    return records, RecordRoutes(records.recorder, Keys(settings.operator_keys), bool(keyed))


def _is_number(value: Any, key: str) -> bool:
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, float):
        return key == "temperature" and math.isfinite(value)
    return (key != "n" or value > 0) and abs(value) < 2**63


def _judged(ladder: Ladder, content: bytes) -> Send | Done | Exhausted:
    answer = object_of(content)
    if answer is None or not is_completion(answer):  # it has been generated, and would be again
        said = "The engine's answer is no completion."
        raise Refusal(502, said, "upstream_error", "upstream_unavailable", headers=(NO_RETRY,))
    return ladder.receive(answer)
