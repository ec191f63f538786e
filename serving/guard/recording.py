"""What the guard does for the record of a request: keeps what goes out, takes the engine's account of its experts.

async with RequestRecords(recording, metrics.dropped) as records:
    records.begin(exchange)
    answer = records.routed(exchange, answer, usage)      # what the client gets
    records.end(exchange)
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from serving.guard.exchange import ROUTING_HEADER, Exchange
from serving.guard.ladder import token_count
from serving.guard.wanted import FIELD
from serving.records.recorder import Ended, Recorder, engine_shares, labelled
from serving.records.settings import Recording

ROUTES = "routed_experts"  # vLLM's account of the experts of every token and layer, in a choice


class RequestRecords:
    """The records of one guard process; opened and ended in a thread, so that the event loop does not wait."""

    def __init__(self, recording: Recording, dropped: Callable[[int], None]) -> None:
        self.recorder = Recorder(recording, dropped)
        self._recording = recording

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.recorder.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.recorder.__exit__, kind, error, at)

    def begin(self, exchange: Exchange) -> None:
        """From now on what goes out is kept."""
        exchange.kept = bytearray()

    def tell(self, exchange: Exchange, request: Mapping[str, Any], asked: bool) -> None:
        """Lets the answer say how it was routed, where that was `asked` in the request or is in its header."""
        if asked or exchange.headers.get(ROUTING_HEADER) == b"true":
            exchange.routing = labelled(request, self._recording)

    def reads_answers(self, exchange: Exchange) -> bool:
        """Whether the engine's answer has, or the client's is to have, more than the OpenAI object."""
        return self._recording.settings.engine_routes or exchange.routing is not None

    def routed(self, exchange: Exchange, answer: dict[str, Any], usage: Any) -> dict[str, Any]:
        """The answer without the engine's account of its experts, which is kept, and with the routing where wanted.

        `usage` is of the attempt that gave it.
        """
        choices = answer["choices"]
        if choices and (routes := choices[0].get(ROUTES)):
            exchange.routes = (routes, token_count(usage, "prompt_tokens"))
        bare = [{key: value for key, value in choice.items() if key != ROUTES} for choice in choices]
        answer = {**answer, "choices": bare}
        if exchange.routing is None:
            return answer
        shares = engine_shares(exchange.routes, self._recording)
        return {**answer, FIELD: {**answer.get(FIELD, {}), "routing": {**exchange.routing, "shares": shares}}}

    def end(self, exchange: Exchange) -> None:
        """Hands a request over to be written, where the policy had let it in."""
        if exchange.admitted is None:
            return
        self.recorder.put(
            Ended(
                request_id=exchange.id,
                path=exchange.path,
                status=exchange.ended_as,
                ms=1000 * (time.perf_counter() - exchange.began),
                asker=exchange.owner,
                streamed=exchange.streams,
                attempts=exchange.attempts,
                violations=tuple(exchange.violations),
                admitted=exchange.admitted,
                body=bytes(exchange.kept or b""),
                routes=exchange.routes,
            )
        )
