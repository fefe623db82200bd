"""Ended operations as OpenTelemetry spans: one for the operation, one for each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
)

_provider: TracerProvider | None = None


def configure(endpoint: str = "", exporter: SpanExporter | None = None) -> None:
    """Send spans to an OTLP endpoint ("host:4317") or to the exporter given, or to nobody."""
    global _provider
    if endpoint:
        # Here, since it is a tenth of a start, and most have no endpoint.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True)
    if exporter is None:
        _provider = None
        return
    _provider = TracerProvider(resource=Resource.create({"service.name": "mcloud"}))
    _provider.add_span_processor(BatchSpanProcessor(exporter))


def is_configured() -> bool:
    """Tell whether spans go anywhere."""
    return _provider is not None


def flush() -> None:
    """Send what waits."""
    if _provider is not None:
        _provider.force_flush(timeout_millis=2000)


def export(operation: Any, steps: Sequence[Any]) -> None:
    """Send the spans of an operation's rows, under the trace id that it was given."""
    if _provider is None:
        return
    tracer = _provider.get_tracer("mcloud")
    # The caller's span is remote; where there was none its id is made up from the trace's.
    parent = SpanContext(
        int(operation.trace_id, 16), int(operation.trace_id[:16], 16) or 1, True, TraceFlags(1)
    )
    context = trace.set_span_in_context(NonRecordingSpan(parent))
    root = tracer.start_span(
        operation.method,
        context=context,
        start_time=operation.create_time * 1000,
        attributes={"mcloud.operation": operation.id, "mcloud.resource": operation.resource_id},
    )
    inside = trace.set_span_in_context(root)
    for step in sorted(steps, key=lambda row: (row.number, row.attempt)):
        span = tracer.start_span(
            f"{step.number}. {step.name}",
            context=inside,
            start_time=step.start_time * 1000,
            attributes={
                "mcloud.step": step.number,
                "mcloud.service": step.service,
                "mcloud.host": step.host,
                "mcloud.state": step.state,
            },
        )
        if step.state == "FAILED":
            span.set_status(Status(StatusCode.ERROR, step.detail))
        span.end(end_time=(step.end_time or step.start_time) * 1000)
    root.end(end_time=(operation.end_time or operation.create_time) * 1000)
