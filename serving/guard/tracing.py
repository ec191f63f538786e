"""Spans of requests and of their attempts for OpenTelemetry, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 qwen-fusion serve configs/demo.yaml

A client's traceparent is the parent of its request; an attempt's goes to the engine, whose own spans hang below it.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Tracing:
    """Makes spans; nothing where no collector is named. `provider`: an OpenTelemetry TracerProvider of one's own."""

    def __init__(self, provider: Any = None) -> None:
        if provider is None and os.environ.get(VARIABLE):
            provider = _provider()
        self._tracer = provider.get_tracer("qwen-fusion.guard") if provider is not None else None

    def span(self, name: str, headers: Mapping[bytes, bytes] | None = None) -> AbstractContextManager[Any]:
        """A span for the length of a block, below the traceparent in `headers` where there is one; None where no spans
        are made."""
        if self._tracer is None:
            return nullcontext()
        from opentelemetry.propagate import extract

        carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in (headers or {}).items()}
        context = extract(carrier) if headers is not None else None
        return self._tracer.start_as_current_span(name, context=context)

    def inject(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The headers with the current span as traceparent."""
        if self._tracer is None:
            return headers
        from opentelemetry.propagate import inject

        carrier: dict[str, str] = {}
        inject(carrier)
        return [pair for pair in headers if pair[0].lower() not in carrier] + list(carrier.items())


def _provider() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "qwen-fusion-guard"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
