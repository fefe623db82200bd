"""The services that a domain's workflow asks, and their clients over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

import grpc

from mcloud.common.v1 import operation_pb2
from mcloud.conductor.v1 import domain_pb2, domain_service_pb2, domain_service_pb2_grpc
from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc
from mcloud.network.v1 import port_service_pb2, port_service_pb2_grpc
from mcloud.volume.v1 import attachment_service_pb2, attachment_service_pb2_grpc
from mcloud_base import rpc
from mcloud_base.errors import Unavailable

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

# Takes the rows that a service returns, also with an error.
Collect = Callable[[operation_pb2.OperationStep], None]

CALL_DEADLINE_S = 30.0
CONNECT_DEADLINE_S = 90.0  # the storing host has to serve the volume first
IDLE_DEADLINE_S = 30.0  # of a stream that brings nothing


class Conductor(Protocol):
    """Answers what a domain is to be (step 9)."""

    async def get_domain_spec(
        self, domain_id: str, epoch: str, collect: Collect
    ) -> domain_pb2.DomainSpec:
        """See DomainService.GetDomainSpec."""


class Images(Protocol):
    """Gives images out (step 11)."""

    async def get(self, image_id: str, token: str, collect: Collect) -> image_pb2.Image:
        """See ImageService.GetImage."""

    def download(
        self, image_id: str, token: str, offset: int, collect: Collect
    ) -> AsyncIterator[bytes]:
        """See ImageService.DownloadImage: the bytes from the offset on."""


class Ports(Protocol):
    """Binds ports to this host (step 13)."""

    async def bind(
        self, port_id: str, domain_id: str, generation: int, token: str, collect: Collect
    ) -> port_service_pb2.BindPortResponse:
        """See PortService.BindPort."""


class Attachments(Protocol):
    """Serves volumes to this host (step 15)."""

    async def connect(
        self, attachment_id: str, domain_id: str, generation: int, token: str, collect: Collect
    ) -> attachment_service_pb2.ConnectAttachmentResponse:
        """See AttachmentService.ConnectAttachment."""


class Dataplane(Protocol):
    """The network part of this agent."""

    async def wait_ports(
        self, port_ids: Collection[str], generation: int, deadline_s: float
    ) -> None:
        """Return once guests may be plugged into ports, as this or a later generation has them.

        Raises:
            Unavailable: they may not, by the deadline.
        """


# --- over gRPC ----------------------------------------------------------------------------------


class GrpcConductor:
    """A Conductor at the end of a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = domain_service_pb2_grpc.DomainServiceStub(channel)

    async def get_domain_spec(
        self, domain_id: str, epoch: str, collect: Collect
    ) -> domain_pb2.DomainSpec:
        """See Conductor."""
        return await rpc.call(
            _collecting(self._stub.GetDomainSpec, collect),
            domain_service_pb2.GetDomainSpecRequest(domain_id=domain_id, epoch=epoch),
            timeout_s=CALL_DEADLINE_S,
        )


class GrpcImages:
    """Images at the end of a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = image_service_pb2_grpc.ImageServiceStub(channel)

    async def get(self, image_id: str, token: str, collect: Collect) -> image_pb2.Image:
        """See Images."""
        return await rpc.call(
            _collecting(self._stub.GetImage, collect),
            image_service_pb2.GetImageRequest(id=image_id),
            timeout_s=CALL_DEADLINE_S,
            metadata=rpc.bearer(token),
        )

    async def download(
        self, image_id: str, token: str, offset: int, collect: Collect
    ) -> AsyncIterator[bytes]:
        """See Images."""
        request = image_service_pb2.DownloadImageRequest(id=image_id, offset=offset)
        call = self._stub.DownloadImage(request, metadata=tuple(rpc.bearer(token)))
        try:
            stream = aiter(call)
            while True:
                try:
                    async with asyncio.timeout(IDLE_DEADLINE_S):
                        message = await anext(stream, None)
                except TimeoutError as error:
                    raise Unavailable(
                        "IMAGE_STREAM_SILENT", f"no bytes for {IDLE_DEADLINE_S:g} s"
                    ) from error
                if message is None:
                    break
                if message.WhichOneof("part") == "chunk":
                    yield message.chunk
            _collect(await call.trailing_metadata(), collect)
        except grpc.RpcError as error:
            _collect(_trailing(error), collect)
            raise rpc.from_rpc_error(error) from error
        finally:
            call.cancel()


class GrpcPorts:
    """Ports at the end of a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = port_service_pb2_grpc.PortServiceStub(channel)

    async def bind(
        self, port_id: str, domain_id: str, generation: int, token: str, collect: Collect
    ) -> port_service_pb2.BindPortResponse:
        """See Ports."""
        return await rpc.call(
            _collecting(self._stub.BindPort, collect),
            port_service_pb2.BindPortRequest(
                port_id=port_id, domain_id=domain_id, generation=generation
            ),
            timeout_s=CALL_DEADLINE_S,
            metadata=rpc.bearer(token),
        )


class GrpcAttachments:
    """Attachments at the end of a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = attachment_service_pb2_grpc.AttachmentServiceStub(channel)

    async def connect(
        self, attachment_id: str, domain_id: str, generation: int, token: str, collect: Collect
    ) -> attachment_service_pb2.ConnectAttachmentResponse:
        """See Attachments."""
        return await rpc.call(
            _collecting(self._stub.ConnectAttachment, collect),
            attachment_service_pb2.ConnectAttachmentRequest(
                attachment_id=attachment_id, domain_id=domain_id, generation=generation
            ),
            timeout_s=CONNECT_DEADLINE_S,
            metadata=rpc.bearer(token),
        )


def _collecting(method: Callable[..., Any], collect: Collect) -> Callable[..., Awaitable[Any]]:
    """Wrap a stub's method so that the rows in its trailing metadata are handed to `collect`."""

    async def call(request: object, *, timeout: float | None = None, metadata: Any = None) -> Any:
        running = method(request, timeout=timeout, metadata=metadata)
        try:
            response = await running
        except grpc.RpcError as error:
            _collect(_trailing(error), collect)
            raise
        _collect(await running.trailing_metadata(), collect)
        return response

    return call


def _trailing(error: grpc.RpcError) -> Any:
    return error.trailing_metadata() if hasattr(error, "trailing_metadata") else ()


def _collect(metadata: Any, collect: Collect) -> None:
    for key, value in metadata or ():
        if key == rpc.STEP_KEY and isinstance(value, bytes):
            collect(operation_pb2.OperationStep.FromString(value))
