"""What the guard counts, for Prometheus: GET /metrics. No content of any request is in it.

Each app has a registry of its own; of several worker processes each tells its own counts.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300)


class Metrics:
    """The guard's counters; `text` is their exposition."""

    def __init__(self) -> None:
        kept = self._registry = CollectorRegistry()
        self.answers = Counter("guard_answers", "Answers by route and status", ["route", "status"], registry=kept)
        self.attempts = Counter("guard_attempts", "Attempts of guarded requests by outcome", ["outcome"], registry=kept)
        self.violations = Counter("guard_violations", "What was wrong, by keyword", ["keyword"], registry=kept)
        self.in_flight = Gauge("guard_in_flight", "Requests under way", registry=kept)
        self.upstream = Histogram("guard_upstream_seconds", "An attempt at the engine", buckets=SECONDS, registry=kept)
        self.added = Histogram("guard_added_seconds", "A request less its attempts", buckets=SECONDS, registry=kept)

    def text(self) -> bytes:
        """All counts in Prometheus's text format."""
        return generate_latest(self._registry)
