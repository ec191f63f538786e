"""The guard's routes about records: why a request was routed as it was, and feedback on it.

    POST /v1/feedback   {"request_id": "...", "rating": "down", "domain": "math", "comment": "..."}
    GET  /v1/routing/REQUEST_ID

A request's record is for whoever made it, and for operators (serving.guard.operator_keys_file).
"""

import asyncio
from dataclasses import asdict
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from serving.guard.bodies import decoded
from serving.guard.exchange import Exchange, Refusal
from serving.guard.keys import Keys
from serving.records.record import Feedback, RoutingRecord, suspicions, top_expert
from serving.records.recorder import Recorder

FEEDBACK, ROUTING = "/v1/feedback", "/v1/routing/"
RATINGS = ("up", "down")
MAX_COMMENT = 2000  # characters
LOST_FOR_S = 2.0  # that a record may take to be written


class RecordRoutes:
    """Answers what is asked about records; `operators` may see all of them, and everyone where there are no keys."""

    def __init__(self, recorder: Recorder, operators: Keys, keyed: bool) -> None:
        self._recorder, self._operators, self._keyed = recorder, operators, keyed

    async def feedback(self, exchange: Exchange, body: bytes) -> None:
        """Keeps what a client says of a request. Raises Refusal where that says nothing, or of no known request."""
        given = _object(body)
        rating, domain, comment = given.get("rating"), given.get("domain"), given.get("comment", "")
        if given.keys() - {"request_id", "rating", "domain", "comment"}:
            raise _invalid("feedback has no keys but request_id, rating, domain and comment", None)
        if rating is not None and rating not in RATINGS:
            raise _invalid("rating is up or down", "rating")
        domains = list(self._recorder.recording.domains)
        if domain is not None and domain not in domains:
            raise _invalid(f"domain is one of {', '.join(domains)}", "domain")
        if not isinstance(comment, str) or len(comment) > MAX_COMMENT:
            raise _invalid(f"comment is a text of at most {MAX_COMMENT} characters", "comment")
        if rating is None and domain is None and not comment.strip():
            raise _invalid("say something: a rating, the right domain, or a comment", None)
        record = await self._mine(exchange, str(given.get("request_id")))
        said = feedback_on(record, rating, domain, comment, exchange.asker if self._keyed else None)
        await _stored(self._recorder.store.add_feedback, [said])
        await exchange.json(201, {"request_id": said.request_id, "kept": True, "text_kept": said.messages is not None})

    async def routing(self, exchange: Exchange) -> None:
        """The record of a request, and why it looks misrouted."""
        record = await self._mine(exchange, exchange.path.removeprefix(ROUTING))
        doubts = suspicions(record, self._recorder.recording.expert_of)
        await exchange.json(200, {**asdict(record), "suspicions": doubts})

    async def _mine(self, exchange: Exchange, request_id: str) -> RoutingRecord:
        """The record that the asker may see; one that is being written is waited for. Raises Refusal."""
        record = None
        for _ in range(int(LOST_FOR_S / 0.1)):
            record = await _stored(self._recorder.store.find, request_id)
            if record is not None:
                break
            await asyncio.sleep(0.1)
        if record is None or not (record.asker == exchange.asker or self.operator(exchange)):
            said = f"There is no record of a request {request_id[:128]!r} of yours."
            raise Refusal(404, said, "invalid_request_error", "not_found", "request_id")
        return record

    def operator(self, exchange: Exchange) -> bool:
        """Whether the asker may see everything."""
        return not self._keyed or self._operators.number(exchange.headers.get(b"authorization")) is not None


def feedback_on(
    record: RoutingRecord, rating: Any, domain: str | None, comment: str, asker: str | None = None
) -> Feedback:
    """Feedback with what it is about: the text where that was kept, and how the request had been routed."""
    routed = {"domain": record.domain, "channel": record.channel, "expert": top_expert(record.shares)}
    about = {"messages": record.asked, "answer": record.answered, "routed": routed}
    return Feedback(record.request_id, rating, domain, comment.strip(), asker=asker, **about)


async def _stored(action: Any, *given: Any) -> Any:
    """What the store says, asked aside. Raises Refusal where its database does not work."""
    try:
        return await asyncio.to_thread(action, *given)
    except SQLAlchemyError:
        said = "The records cannot be reached."
        headers = ((b"retry-after", b"5"),)
        raise Refusal(503, said, "server_error", "records_unavailable", headers=headers) from None


def _object(body: bytes) -> dict[str, Any]:
    try:
        given = decoded(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise _invalid('the body is a JSON object, such as {"request_id": "...", "rating": "down"}', None)
    return given


def _invalid(said: str, param: str | None) -> Refusal:
    return Refusal(400, f"{said[0].upper()}{said[1:]}.", "invalid_request_error", "invalid_value", param)
