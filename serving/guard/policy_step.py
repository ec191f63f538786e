"""The policy at work on a request before it goes to the engine, and on an answer before it goes to the client.

Refusals are answers of the guard's own: 400 for a request, 422 for an answer, 503 where a moderation model that has to
be asked does not answer.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

import aiohttp

from fusion.sections.serving import Policy
from serving.guard.bodies import decoded, encoded
from serving.guard.exchange import NO_RETRY, Refusal
from serving.guard.moderation import Unmoderated, moderate
from serving.guard.policy import (
    INPUT,
    OUTPUT,
    Censor,
    Forbidden,
    answer_texts,
    redacted_answer,
    redacted_request,
    refused_anywhere,
    request_texts,
)
from serving.guard.wanted import FIELD, Wanted


class PolicyStep:
    """A recipe's policy; `reads_output` is whether answers have to be looked at as a whole."""

    def __init__(self, policy: Policy) -> None:
        self._input, self._output = Censor(policy, INPUT), Censor(policy, OUTPUT)
        self._moderation = policy.moderation
        moderated = policy.moderation is not None and policy.moderation.side != INPUT
        self.reads_output = bool(self._output) or moderated

    async def admit(
        self, session: aiohttp.ClientSession, request: dict[str, Any], redacted: dict[str, int]
    ) -> dict[str, Any]:
        """The request as it may go in; what was redacted is counted in `redacted`. Raises Refusal."""
        if not self._input and self._moderation is None:
            return request
        try:
            if self._input:
                request = await asyncio.to_thread(redacted_request, request, self._input, redacted)
                await asyncio.to_thread(refused_anywhere, request, self._input)
            if self._moderation is not None and self._moderation.side != OUTPUT:
                await _told(moderate(session, self._moderation, request_texts(request), INPUT))
        except Forbidden as error:
            raise Refusal(400, str(error), "invalid_request_error", "content_policy", headers=(NO_RETRY,)) from None
        except ValueError as error:
            said = f"The policy cannot be applied: {error}."
            raise Refusal(400, said, "invalid_request_error", "content_policy", "prompt") from None
        return request

    async def release(
        self, session: aiohttp.ClientSession, answer: dict[str, Any], wanted: Wanted, redacted: dict[str, int]
    ) -> dict[str, Any]:
        """The answer as it may go out. Raises Refusal where it may not, or would not be as asked any more."""
        before = sum(redacted.values())
        try:
            if self._output:
                is_json = wanted.schema is not None and wanted.form == "json"
                answer = await asyncio.to_thread(redacted_answer, answer, self._output, is_json, redacted)
            if self._moderation is not None and self._moderation.side != INPUT:
                await _told(moderate(session, self._moderation, answer_texts(answer), OUTPUT))
        except Forbidden as error:
            raise _withheld(str(error)) from None
        if sum(redacted.values()) > before and any(wanted.violations(choice) for choice in answer["choices"]):
            raise _withheld("The answer holds what may not pass here, and without it is not as asked.")
        report = {**answer[FIELD], **({"redacted": redacted} if redacted else {})}
        return {**answer, FIELD: self.report(report)}

    def report(self, report: dict[str, Any]) -> dict[str, Any]:
        """What is said of an answer, without what may not go out: paths hold keys of it."""
        if not self._output:
            return report
        try:
            cleared: dict[str, Any] = decoded(self._output.document(encoded(report).decode(), {}).encode())
        except Forbidden:
            return {key: value for key, value in report.items() if key not in ("attempts", "message")}
        return cleared


async def _told(word: Awaitable[None]) -> None:
    try:
        await word
    except Unmoderated:
        said = "The moderation model does not answer, and nothing passes without it."
        headers = ((b"retry-after", b"10"),)
        raise Refusal(503, said, "upstream_error", "moderation_unavailable", headers=headers) from None


def _withheld(said: str) -> Refusal:
    return Refusal(422, said, "invalid_structured_output", "content_policy", headers=(NO_RETRY,))
