"""The other services, as the conductor's workflows call them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mcloud.identity.v1 import invariant_service_pb2_grpc as identity_grpc
from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc
from mcloud.image.v1 import invariant_service_pb2_grpc as image_grpc
from mcloud.network.v1 import invariant_service_pb2_grpc as network_grpc
from mcloud.network.v1 import port_pb2, port_service_pb2, port_service_pb2_grpc
from mcloud.scheduler.v1 import invariant_service_pb2_grpc as scheduler_grpc
from mcloud.scheduler.v1 import placement_service_pb2, placement_service_pb2_grpc
from mcloud.volume.v1 import (
    attachment_pb2,
    attachment_service_pb2,
    attachment_service_pb2_grpc,
)
from mcloud.volume.v1 import invariant_service_pb2_grpc as volume_grpc
from mcloud_base import errors, rpc
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.core.workflow import Job

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

_TIMEOUT_S = 15
# Calls about ports and images: those of many operations wait here, where no time runs out, and not
# for the same rows of a database. (What waits for a host takes its time, and is not counted.)
_AT_ONCE = 16


class Neighbours:
    """Stubs of network, volume, image and scheduler; calls are idempotent and have deadlines."""

    def __init__(self, runtime: Runtime) -> None:
        self._room = asyncio.Semaphore(_AT_ONCE)
        self.images = image_service_pb2_grpc.ImageServiceStub(runtime.channel("image"))
        self.ports = port_service_pb2_grpc.PortServiceStub(runtime.channel("network"))
        self.attachments = attachment_service_pb2_grpc.AttachmentServiceStub(
            runtime.channel("volume")
        )
        self.placement = placement_service_pb2_grpc.PlacementServiceStub(
            runtime.channel("scheduler")
        )
        self.network_invariants = network_grpc.InvariantServiceStub(runtime.channel("network"))
        self.volume_invariants = volume_grpc.InvariantServiceStub(runtime.channel("volume"))
        # By the service that proves its own records.
        self.invariants: dict[str, Any] = {
            "identity": identity_grpc.InvariantServiceStub(runtime.channel("identity")),
            "image": image_grpc.InvariantServiceStub(runtime.channel("image")),
            "network": self.network_invariants,
            "scheduler": scheduler_grpc.InvariantServiceStub(runtime.channel("scheduler")),
            "volume": self.volume_invariants,
        }

    async def _call(
        self, method: rpc.UnaryCall[RequestT, ResponseT], request: RequestT
    ) -> ResponseT:
        async with self._room:
            return await rpc.call(method, request, timeout_s=_TIMEOUT_S)

    async def ensure_port(
        self, job: Job, nic: Mapping[str, Any], spec: port_pb2.PortSpec, hostname: str
    ) -> port_pb2.Port:
        """Reserve a NIC's port."""
        request = port_service_pb2.EnsurePortRequest(
            port_id=nic["port_id"],
            project_id=job.project_id,
            instance_id=job.resource_id,
            hostname=hostname,
            spec=spec,
            existing=nic["existing"],
            lease_number=job.lease_number,
            operation_id=job.operation_id,
        )
        return await self._call(self.ports.EnsurePort, request)

    async def release_ports(self, job: Job, nics: Iterable[Mapping[str, Any]]) -> None:
        """Give ports back; retires their ids."""
        for nic in nics:
            request = port_service_pb2.ReleasePortRequest(
                port_id=nic["port_id"], instance_id=job.resource_id, lease_number=job.lease_number
            )
            await self._call(self.ports.ReleasePort, request)

    async def unbind(
        self,
        job: Job,
        domain_id: str,
        nics: Sequence[Mapping[str, Any]],
        volumes: Sequence[Mapping[str, Any]],
    ) -> None:
        """Take ports and attachments off a domain that is gone from its host."""
        for nic in nics:
            unbind = port_service_pb2.UnbindPortRequest(
                port_id=nic["port_id"], domain_id=domain_id, lease_number=job.lease_number
            )
            await _unless_gone(self._call(self.ports.UnbindPort, unbind))
        for volume in volumes:
            await self.disconnect(job, domain_id, volume["attachment_id"])

    async def disconnect(self, job: Job, domain_id: str, attachment_id: str) -> None:
        """Take an attachment's volume back from a domain."""
        request = attachment_service_pb2.DisconnectAttachmentRequest(
            attachment_id=attachment_id, domain_id=domain_id, lease_number=job.lease_number
        )
        await _unless_gone(
            rpc.call(self.attachments.DisconnectAttachment, request, timeout_s=_TIMEOUT_S)
        )

    async def ensure_attachment(
        self, job: Job, attachment_id: str, volume_id: str, *, delete_with_instance: bool
    ) -> attachment_pb2.Attachment:
        """Reserve a volume."""
        request = attachment_service_pb2.EnsureAttachmentRequest(
            attachment_id=attachment_id,
            project_id=job.project_id,
            spec=attachment_pb2.AttachmentSpec(
                volume_id=volume_id,
                instance_id=job.resource_id,
                delete_with_instance=delete_with_instance,
            ),
            lease_number=job.lease_number,
            operation_id=job.operation_id,
        )
        return await rpc.call(self.attachments.EnsureAttachment, request, timeout_s=_TIMEOUT_S)

    async def release_attachments(
        self, job: Job, attachment_ids: Iterable[str], *, instance_deleted: bool = False
    ) -> None:
        """Give volumes back; retires the attachments' ids."""
        for attachment_id in attachment_ids:
            request = attachment_service_pb2.ReleaseAttachmentRequest(
                attachment_id=attachment_id,
                lease_number=job.lease_number,
                instance_deleted=instance_deleted,
            )
            await rpc.call(self.attachments.ReleaseAttachment, request, timeout_s=_TIMEOUT_S)

    async def ensure_image_use(self, job: Job, image_id: str) -> image_pb2.Image:
        """Record the use of an image, and return the image."""
        use = image_service_pb2.EnsureImageUseRequest(
            image_id=image_id,
            instance_id=job.resource_id,
            project_id=job.project_id,
            lease_number=job.lease_number,
        )
        recorded = await self._call(self.images.EnsureImageUse, use)
        if recorded.HasField("image"):
            return recorded.image
        # The image service is of an earlier release.
        get = image_service_pb2.GetImageRequest(id=image_id)
        return await self._call(self.images.GetImage, get)

    async def release_image_use(self, job: Job, image_id: str) -> None:
        """Forget the use of an image."""
        request = image_service_pb2.ReleaseImageUseRequest(
            image_id=image_id, instance_id=job.resource_id, lease_number=job.lease_number
        )
        await self._call(self.images.ReleaseImageUse, request)

    async def select_destination(
        self, request: placement_service_pb2.SelectDestinationsRequest
    ) -> placement_service_pb2.SelectDestinationsResponse:
        """Ask the scheduler for a host."""
        return await rpc.call(self.placement.SelectDestinations, request, timeout_s=_TIMEOUT_S)


async def together(*work: Any) -> list[Any]:
    """Await several calls; the first error is raised when all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def _unless_gone(work: Any) -> None:
    try:
        await work
    except errors.NotFound:
        return
