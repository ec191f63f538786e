"""What the guard counts, for Prometheus: GET /metrics. No content of any request is in it.

Each app has a registry of its own. Several worker processes share their counts through files, in the folder that
PROMETHEUS_MULTIPROC_DIR names (`serve` sets it).
"""

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SHARED = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300)


class Metrics:
    """The guard's counters; `text` is their exposition."""

    def __init__(self) -> None:
        kept = self._registry = CollectorRegistry()
        self._answers = Counter("guard_answers", "Answers by route and status", ["route", "status"], registry=kept)
        self._attempts = Counter("guard_attempts", "Attempts of guarded requests", ["outcome"], registry=kept)
        self._violations = Counter("guard_violations", "What was wrong, by keyword", ["keyword"], registry=kept)
        self._dropped = Counter("guard_records_dropped", "Requests that could not be recorded", registry=kept)
        self._in_flight = Gauge("guard_in_flight", "Requests under way", registry=kept, multiprocess_mode="livesum")
        self.upstream = Histogram("guard_upstream_seconds", "An attempt at the engine", buckets=SECONDS, registry=kept)
        self.added = Histogram("guard_added_seconds", "A request less its attempts", buckets=SECONDS, registry=kept)

    def answer(self, route: str, status: int) -> None:
        """Counts an answer."""
        self._answers.labels(route, str(status)).inc()

    def attempt(self, outcome: str) -> None:
        """Counts an attempt: valid, invalid, or the status of an engine that gave none."""
        self._attempts.labels(outcome).inc()

    def violation(self, keyword: str) -> None:
        """Counts something wrong with an attempt."""
        self._violations.labels(keyword).inc()

    def dropped(self, count: int) -> None:
        """Counts requests that could not be recorded."""
        self._dropped.inc(count)

    def in_flight(self, change: int) -> None:
        """Counts a request that begins (1) or ends (-1)."""
        self._in_flight.inc(change)

    def text(self) -> bytes:
        """All counts in Prometheus's text format."""
        if SHARED not in os.environ:
            return generate_latest(self._registry)
        for file in Path(os.environ[SHARED]).glob("gauge_live*_*.db"):  # of processes that are no more
            pid = file.stem.rpartition("_")[2]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                mark_process_dead(int(pid))
        of_all = CollectorRegistry()
        MultiProcessCollector(of_all)
        return generate_latest(of_all)
