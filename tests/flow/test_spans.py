"""An operation's steps are exported as OpenTelemetry spans, under the names of its trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    flavor_pb2,
    flavor_service_pb2,
    flavor_service_pb2_grpc,
    instance_pb2,
    instance_service_pb2,
    instance_service_pb2_grpc,
    operation_service_pb2_grpc,
)
from mcloud_base import ids
from mcloud_controlplane.core import tracing


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    spans = InMemorySpanExporter()
    tracing.configure(exporter=spans)
    yield spans
    tracing.flush()
    tracing.configure()


async def test_spans_are_the_trace(cloud: Any, exporter: InMemorySpanExporter) -> None:
    flavor = await cloud.call(
        flavor_service_pb2_grpc.FlavorServiceStub(cloud.channel).CreateFlavor,
        flavor_service_pb2.CreateFlavorRequest(
            request_id=ids.request_id(),
            name="m1.small",
            spec=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=128, disk_gib=1),
        ),
        system=True,
    )
    operation = await cloud.call(
        instance_service_pb2_grpc.InstanceServiceStub(cloud.channel).CreateInstance,
        instance_service_pb2.CreateInstanceRequest(
            request_id=ids.request_id(),
            name="traced",
            spec=instance_pb2.InstanceSpec(flavor_id=flavor.resource.id, image_id=ids.new("img")),
        ),
    )
    ended = await cloud.call(
        operation_service_pb2_grpc.OperationServiceStub(cloud.channel).WaitOperation,
        operation_pb2.WaitOperationRequest(id=operation.id),
    )
    assert ended.state == operation_pb2.Operation.STATE_FAILED
    tracing.flush()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root = spans.pop("mcloud.compute.v1.InstanceService/CreateInstance")
    assert set(spans) == {f"{step.number}. {step.name}" for step in ended.steps}
    assert {1, 2, 3, 4} == {step.number for step in ended.steps}
    for span in spans.values():
        assert span.parent is not None
        assert span.parent.span_id == root.context.span_id
        assert f"{span.context.trace_id:032x}" == ended.trace_id
        assert span.attributes is not None
        assert span.attributes["mcloud.service"]
