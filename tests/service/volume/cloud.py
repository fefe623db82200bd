"""A control plane of identity and volume, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mcloud.common.v1 import operation_pb2
from mcloud.volume.v1 import (
    attachment_pb2,
    attachment_service_pb2,
    volume_pb2,
    volume_service_pb2,
)
from mcloud_base import ids, rpc
from mcloud_controlplane.volume import model
from service.identity.cloud import unpack
from service.image.cloud import Host, Project, StorageCloud
from service.volume.storage_host import StorageHost

State = volume_pb2.VolumeStatus
Operation = operation_pb2.Operation


class VolumeCloud(StorageCloud):
    async def begin_create(
        self, project: Project, name: str = "data", size_gib: int = 1, **how: Any
    ) -> Operation:
        request = volume_service_pb2.CreateVolumeRequest(
            request_id=ids.request_id(),
            name=name,
            spec=volume_pb2.VolumeSpec(size_gib=size_gib),
            **how,
        )
        return await rpc.call(self.storage.volumes.CreateVolume, request, metadata=project.user)

    async def begin_delete(self, project: Project, volume_id: str) -> Operation:
        request = volume_service_pb2.DeleteVolumeRequest(request_id=ids.request_id(), id=volume_id)
        return await rpc.call(self.storage.volumes.DeleteVolume, request, metadata=project.user)

    async def end_of(self, project: Project, operation_id: str, timeout_s: float = 60) -> Operation:
        request = operation_pb2.WaitOperationRequest(id=operation_id)
        request.timeout.FromSeconds(int(timeout_s))
        return await rpc.call(
            self.storage.operations.WaitOperation,
            request,
            metadata=project.user,
            timeout_s=timeout_s + 5,
        )

    async def create_volume(self, project: Project, **how: Any) -> volume_pb2.Volume:
        operation = await self.begin_create(project, **how)
        ended = await self.end_of(project, operation.id)
        assert ended.state == Operation.STATE_SUCCEEDED, ended
        volume: volume_pb2.Volume = unpack(ended, volume_pb2.Volume)
        return volume

    async def delete_volume(self, project: Project, volume_id: str) -> Operation:
        operation = await self.begin_delete(project, volume_id)
        return await self.end_of(project, operation.id)

    async def get_volume(self, project: Project, volume_id: str) -> volume_pb2.Volume:
        request = volume_service_pb2.GetVolumeRequest(id=volume_id)
        return await rpc.call(self.storage.volumes.GetVolume, request, metadata=project.user)

    async def volumes(self, project: Project, **how: Any) -> list[volume_pb2.Volume]:
        request = volume_service_pb2.ListVolumesRequest(**how)
        answer = await rpc.call(self.storage.volumes.ListVolumes, request, metadata=project.user)
        return list(answer.volumes)

    async def reserve(
        self,
        project: Project,
        volume_id: str,
        *,
        attachment_id: str = "",
        instance_id: str = "",
        delete_with_instance: bool = False,
        lease_number: int = 1,
    ) -> attachment_pb2.Attachment:
        request = attachment_service_pb2.EnsureAttachmentRequest(
            attachment_id=attachment_id or ids.new("att"),
            project_id=project.id,
            spec=attachment_pb2.AttachmentSpec(
                volume_id=volume_id,
                instance_id=instance_id or ids.new("i"),
                delete_with_instance=delete_with_instance,
            ),
            lease_number=lease_number,
        )
        return await rpc.call(self.services.attachments.EnsureAttachment, request)

    async def connect(
        self,
        host: Host,
        project: Project,
        attachment_id: str,
        domain_id: str,
        *,
        timeout_s: float = 20,
    ) -> attachment_service_pb2.ConnectAttachmentResponse:
        token = await self.delegate(
            host, project, domain_id=domain_id, attachment_ids=[attachment_id]
        )
        request = attachment_service_pb2.ConnectAttachmentRequest(
            attachment_id=attachment_id, domain_id=domain_id, generation=1
        )
        return await rpc.call(
            host.stubs.attachments.ConnectAttachment, request, metadata=token, timeout_s=timeout_s
        )

    async def disconnect(
        self, attachment_id: str, domain_id: str, *, lease_number: int = 1, timeout_s: float = 20
    ) -> attachment_pb2.Attachment:
        request = attachment_service_pb2.DisconnectAttachmentRequest(
            attachment_id=attachment_id, domain_id=domain_id, lease_number=lease_number
        )
        return await rpc.call(
            self.services.attachments.DisconnectAttachment, request, timeout_s=timeout_s
        )

    async def release(
        self, attachment_id: str, *, lease_number: int = 1, instance_deleted: bool = False
    ) -> attachment_service_pb2.ReleaseAttachmentResponse:
        request = attachment_service_pb2.ReleaseAttachmentRequest(
            attachment_id=attachment_id,
            lease_number=lease_number,
            instance_deleted=instance_deleted,
        )
        return await rpc.call(self.services.attachments.ReleaseAttachment, request)


async def assert_clean(cloud: VolumeCloud, project: Project, storage: StorageHost) -> None:
    """Nothing is on the host or meant for it, and the row can be deleted."""
    assert storage.volumes == {}
    for volume in await cloud.volumes(project):
        assert volume.status.state == State.STATE_ERROR
        assert volume.status.host_id == ""
        ended = await cloud.delete_volume(project, volume.metadata.id)
        assert ended.state == Operation.STATE_SUCCEEDED
    assert await cloud.volumes(project) == []


async def write(cloud: VolumeCloud, unit: Callable[[], object]) -> None:
    await cloud.runtime.database("volume", model.open_database).write(unit)
