"""A JSON line on standard error for every request: its id, route, status, time, attempts, what was wrong.

    serving.guard.log: none | requests | content

Never a word of what was asked or answered unless `content` is switched on, and no key: only which of them it was.
"""

import sys
import time
from datetime import UTC, datetime
from typing import Literal

from serving.guard.bodies import encoded
from serving.guard.exchange import Exchange

Kind = Literal["none", "requests", "content"]


class RequestsLog:
    """Writes what the recipe asks for."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def write(self, exchange: Exchange) -> None:
        """One line about a request that has ended."""
        if self._kind == "none":
            return
        said = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.id,
            "method": exchange.scope["method"],
            "path": exchange.path,
            "status": exchange.ended_as,
            "ms": round(1000 * (time.perf_counter() - exchange.began), 2),
            "asker": exchange.asker,
            "attempts": exchange.attempts,
            "violations": exchange.violations,
        }
        if self._kind == "content":
            said |= {"asked": exchange.asked, "answered": exchange.answered}
        sys.stderr.buffer.write(encoded(said) + b"\n")
        sys.stderr.buffer.flush()
