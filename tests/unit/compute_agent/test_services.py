"""The clients of the host's services, over real channels."""

# ruff: noqa: N802 (gRPC method names are CamelCase)

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from fakes.compute_services import TOKEN, step
from mcloud.common.v1 import operation_pb2
from mcloud.conductor.v1 import domain_pb2, domain_service_pb2_grpc
from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc
from mcloud.network.v1 import port_service_pb2, port_service_pb2_grpc
from mcloud.volume.v1 import attachment_service_pb2, attachment_service_pb2_grpc
from mcloud_agents.compute import services
from mcloud_base import errors, rpc

CONTENT = bytes(range(256)) * 16


async def admit(context: Any, number: int, service: str) -> None:
    """Do what an interceptor does: check the token, leave a row."""
    metadata = dict(context.invocation_metadata())
    context.set_trailing_metadata(((rpc.STEP_KEY, step(number, service).SerializeToString()),))
    if metadata.get("authorization") != f"Bearer {TOKEN}":
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no token")


class Services(
    domain_service_pb2_grpc.DomainServiceServicer,
    image_service_pb2_grpc.ImageServiceServicer,
    port_service_pb2_grpc.PortServiceServicer,
    attachment_service_pb2_grpc.AttachmentServiceServicer,
):
    async def GetDomainSpec(self, request: Any, context: Any) -> domain_pb2.DomainSpec:
        row = step(9, "conductor").SerializeToString()
        context.set_trailing_metadata(((rpc.STEP_KEY, row),))
        return domain_pb2.DomainSpec(domain_id=request.domain_id, epoch=request.epoch)

    async def GetImage(self, request: Any, context: Any) -> image_pb2.Image:
        await admit(context, 11, "image")
        return image_pb2.Image(status=image_pb2.ImageStatus(size_bytes=len(CONTENT)))

    async def DownloadImage(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await admit(context, 11, "image")
        yield image_service_pb2.DownloadImageResponse(image=image_pb2.Image())
        for start in range(request.offset, len(CONTENT), 1000):
            yield image_service_pb2.DownloadImageResponse(chunk=CONTENT[start : start + 1000])

    async def BindPort(self, request: Any, context: Any) -> port_service_pb2.BindPortResponse:
        await admit(context, 13, "network")
        return port_service_pb2.BindPortResponse(dataplane_generation=7)

    async def ConnectAttachment(
        self, request: Any, context: Any
    ) -> attachment_service_pb2.ConnectAttachmentResponse:
        await admit(context, 15, "volume")
        return attachment_service_pb2.ConnectAttachmentResponse()


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    servicer: Any = Services()  # type: ignore[abstract]  # only what hosts call
    domain_service_pb2_grpc.add_DomainServiceServicer_to_server(servicer, server)
    image_service_pb2_grpc.add_ImageServiceServicer_to_server(servicer, server)
    port_service_pb2_grpc.add_PortServiceServicer_to_server(servicer, server)
    attachment_service_pb2_grpc.add_AttachmentServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def test_rows_come_with_every_answer(channel: grpc.aio.Channel) -> None:
    rows: list[operation_pb2.OperationStep] = []
    spec = await services.GrpcConductor(channel).get_domain_spec("d-1", "e-1", rows.append)
    assert (spec.domain_id, spec.epoch) == ("d-1", "e-1")
    images = services.GrpcImages(channel)
    image = await images.get("img-1", TOKEN, rows.append)
    assert image.status.size_bytes == len(CONTENT)
    received = b"".join([chunk async for chunk in images.download("img-1", TOKEN, 96, rows.append)])
    assert received == CONTENT[96:]
    bound = await services.GrpcPorts(channel).bind("port-1", "d-1", 3, TOKEN, rows.append)
    assert bound.dataplane_generation == 7
    await services.GrpcAttachments(channel).connect("att-1", "d-1", 3, TOKEN, rows.append)
    assert [row.number for row in rows] == [9, 11, 11, 13, 15]


async def test_rows_come_with_refusals(channel: grpc.aio.Channel) -> None:
    rows: list[operation_pb2.OperationStep] = []
    with pytest.raises(errors.PermissionDenied):
        await services.GrpcPorts(channel).bind("port-1", "d-1", 3, "wrong", rows.append)
    stream = services.GrpcImages(channel).download("img-1", "wrong", 0, rows.append)
    with pytest.raises(errors.PermissionDenied):
        await anext(stream)
    assert [row.number for row in rows] == [13, 11]


async def test_a_download_may_be_left(channel: grpc.aio.Channel) -> None:
    stream = services.GrpcImages(channel).download("img-1", TOKEN, 0, lambda row: None)
    assert await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
