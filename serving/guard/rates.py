"""How many requests one asker may make in a minute.

python -c "from serving.guard.rates import Rates; r = Rates(1); print(r.wait_s('a'), r.wait_s('a'))"
"""

import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter


class Rates:
    """Counts requests by who asks, in this process alone."""

    def __init__(self, per_minute: int) -> None:
        self._item = RateLimitItemPerMinute(per_minute)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def wait_s(self, who: str) -> int:
        """Counts a request: 0 where it may pass, otherwise the seconds to wait before the next."""
        if self._limiter.hit(self._item, who):
            return 0
        return max(1, math.ceil(self._limiter.get_window_stats(self._item, who).reset_time - time.time()))
