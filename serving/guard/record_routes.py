"""The guard's routes about records: why a request was routed as it was, and feedback on it.

    POST /v1/feedback   {"request_id": "...", "rating": "down", "domain": "math", "comment": "..."}
    GET  /v1/routing/REQUEST_ID
    GET  /ui, /ui/overview?minutes=60, /ui/explain/REQUEST_ID       where serving.guard.ui is on

A request's record is for whoever made it, and for operators (serving.guard.operator_keys_file). The page itself holds
no data and needs no key; what it shows is for operators.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from sqlalchemy.exc import SQLAlchemyError

from serving.guard.bodies import object_of
from serving.guard.exchange import REQUEST_IDS, Exchange, Refusal
from serving.guard.keys import Keys
from serving.guard.paths import EXPLAIN, OVERVIEW, ROUTING, UI
from serving.records.record import Feedback, RoutingRecord, routed, storable, suspicions
from serving.records.recorder import Recorder
from serving.ui.overview import COUNTED, overview

MINUTES, MOST_MINUTES = 60, 24 * 60  # that the overview goes back
NOTHING_ELSE = (  # data: is the empty icon, without which browsers ask for /favicon.ico
    b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
PAGE_HEADERS = (
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", NOTHING_ELSE + b"; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
RATINGS = ("up", "down")
MAX_COMMENT = 2000  # characters
THREADS = 4
LOST_FOR_S = 0.5  # that a record may take to be written


class RecordRoutes:
    """Answers what is asked about records; `operators` may see all of them, and everyone where there are no keys."""

    def __init__(self, recorder: Recorder, operators: Keys, keyed: bool) -> None:
        self._recorder, self._operators, self._keyed = recorder, operators, keyed
        self._threads = ThreadPoolExecutor(THREADS, "records")  # a database that hangs holds up nothing else

    async def feedback(self, exchange: Exchange, body: bytes) -> None:
        """Keeps what a client says of a request. Raises Refusal where that says nothing, or of no known request."""
        if exchange.headers.get(b"content-type", b"").partition(b";")[0].strip() != b"application/json":
            form = "Feedback is JSON (content-type: application/json)."  # which another site's page cannot send
            raise Refusal(415, form, "invalid_request_error", "unsupported_media_type")
        given = _object(body)
        rating, domain, comment = given.get("rating"), given.get("domain"), given.get("comment", "")
        if given.keys() - {"request_id", "rating", "domain", "comment"}:
            raise _invalid("feedback has no keys but request_id, rating, domain and comment", None)
        if rating is not None and rating not in RATINGS:
            raise _invalid("rating is up or down", "rating")
        domains = list(self._recorder.recording.domains)
        if domain is not None and domain not in domains:
            raise _invalid(
                f"domain is one of {', '.join(domains)}" if domains else "no domains are known here", "domain"
            )
        if not isinstance(comment, str) or len(comment) > MAX_COMMENT:
            raise _invalid(f"comment is a text of at most {MAX_COMMENT} characters", "comment")
        if rating is None and domain is None and not comment.strip():
            raise _invalid("say something: a rating, the right domain, or a comment", None)
        record = await self._mine(exchange, given.get("request_id"))
        said = feedback_on(record, rating, domain, comment, exchange.owner or None)
        await self._stored(self._recorder.store.add_feedback, [said])
        await exchange.json(201, {"request_id": said.request_id, "kept": True, "text_kept": said.messages is not None})

    async def routing(self, exchange: Exchange) -> None:
        """The record of a request, and why it looks misrouted."""
        record = await self._mine(exchange, exchange.path.removeprefix(ROUTING))
        doubts = suspicions(record, self._recorder.recording.expert_of)
        await exchange.json(200, {**asdict(record), "suspicions": doubts})

    async def ui(self, exchange: Exchange) -> None:
        """The page, and what it asks for. Raises Refusal where the asker is no operator, or nothing is there."""
        path = exchange.path
        if path == UI:
            await exchange.whole(200, PAGE_HEADERS, files("serving.ui").joinpath("page.html").read_bytes())
            return
        if not self.operator(exchange):
            said = "The page's data are for operators: give one of their keys (Authorization: Bearer ...)."
            raise Refusal(403, said, "invalid_request_error", "not_an_operator")
        if path == OVERVIEW:
            minutes = _minutes(exchange.scope.get("query_string", b""))
            await exchange.json(200, await self._stored(self._overview, minutes))
            return
        request_id = _checked_id(path.removeprefix(EXPLAIN))
        page = await self._stored(self._recorder.store.page, request_id)
        if page is not None:
            await exchange.whole(200, PAGE_HEADERS, page.encode())
        elif self._recorder.recording.experts and await self._stored(self._recorder.store.want_page, request_id):
            await exchange.json(202, {"request_id": request_id, "page": "wanted"})
        else:
            said = "No answered request of that id has its text here (serving.guard.records.prompts keeps it)."
            raise Refusal(404, said, "invalid_request_error", "not_found")

    def _overview(self, minutes: int) -> dict[str, Any]:
        store, since = self._recorder.store, time.time() - 60 * minutes
        return overview(store.recent(COUNTED, since), store.feedback(COUNTED, since), self._recorder.recording, minutes)

    async def _mine(self, exchange: Exchange, given: Any) -> RoutingRecord:
        """The record that the asker may see; one that is being written is waited for. Raises Refusal."""
        request_id = _checked_id(given)
        owner = None if self.operator(exchange) else exchange.owner
        for _ in range(int(LOST_FOR_S / 0.1)):
            record: RoutingRecord | None = await self._stored(self._recorder.store.find, request_id, owner)
            if record is not None:
                return record
            await asyncio.sleep(0.1)
        said = f"There is no record of a request {request_id} of yours."
        raise Refusal(404, said, "invalid_request_error", "not_found", "request_id")

    async def _stored(self, action: Any, *given: Any) -> Any:
        """What the store says, asked in a thread of its own. Raises Refusal where its database does not work."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, action, *given)
        except SQLAlchemyError:
            said = "The records cannot be reached."
            headers = ((b"retry-after", b"5"),)
            raise Refusal(503, said, "server_error", "records_unavailable", headers=headers) from None

    def operator(self, exchange: Exchange) -> bool:
        """Whether the asker may see everything."""
        return not self._keyed or self._operators.number(exchange.headers.get(b"authorization")) is not None


def feedback_on(
    record: RoutingRecord, rating: Any, domain: str | None, comment: str, asker: str | None = None
) -> Feedback:
    """Feedback with what it is about: the text where that was kept, and how the request had been routed."""
    about = {"messages": record.asked, "answer": record.answered, "routed": routed(record)}
    return Feedback(record.request_id, rating, domain, storable(comment.strip()), asker=asker, **about)


def _checked_id(given: Any) -> str:
    if not isinstance(given, str) or not REQUEST_IDS.fullmatch(given.encode(errors="replace")):
        raise Refusal(404, "There is no record of such a request.", "invalid_request_error", "not_found", "request_id")
    return given


def _minutes(query: bytes) -> int:
    given = parse_qs(query.decode("latin-1")).get("minutes", [str(MINUTES)])[-1]
    if not given.isascii() or not given.isdecimal() or not 1 <= int(given) <= MOST_MINUTES:
        raise _invalid(f"minutes is a number from 1 to {MOST_MINUTES}", "minutes")
    return int(given)


def _object(body: bytes) -> dict[str, Any]:
    given = object_of(body)
    if given is None:
        raise _invalid('the body is a JSON object, such as {"request_id": "...", "rating": "down"}', None)
    return given


def _invalid(said: str, param: str | None) -> Refusal:
    return Refusal(400, f"{said[0].upper()}{said[1:]}.", "invalid_request_error", "invalid_value", param)
