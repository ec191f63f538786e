"""Waiting for what another thread or process does, no longer than it takes."""

import time
from collections.abc import Callable


def wait_for(holds: Callable[[], bool], within_s: float = 15.0) -> bool:
    """True as soon as it holds, False when it still does not after `within_s` seconds."""
    end = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
