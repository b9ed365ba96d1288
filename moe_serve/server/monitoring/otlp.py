"""OtlpTracing: requests as spans, sent in the background to an OpenTelemetry collector.

The one module that imports OpenTelemetry (extra `otel`). The SDK's own environment variables hold: OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from moe_serve import __version__
from moe_serve.server.monitoring.request_spans import Attributes

SPAN_NAME = "llm_request"
"""As vLLM calls it."""


class OtlpTracing:
    """A Tracing whose spans go through an SpanProcessor."""

    def __init__(self, processor: SpanProcessor) -> None:
        ours = Resource({SERVICE_NAME: "moe-serve", SERVICE_VERSION: __version__})
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("moe_serve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> OtlpTracing:
        """Send to this URL in batches, on a thread of the SDK's. A collector that is down costs spans, nothing else."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint)))

    def add(self, headers: Mapping[str, str], start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """As Tracing.add. `traceparent` among the headers makes it a child of the caller's span."""
        span = self._tracer.start_span(
            SPAN_NAME, self._propagator.extract(headers), SpanKind.SERVER, attributes=attributes, start_time=start_ns
        )
        if "error.type" in attributes:
            span.set_status(StatusCode.ERROR)
        span.end(end_ns)

    def close(self) -> None:
        self._provider.shutdown()
