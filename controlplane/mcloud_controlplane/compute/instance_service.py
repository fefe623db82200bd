"""Serves mcloud.compute.v1.InstanceService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import instance_pb2, instance_service_pb2, instance_service_pb2_grpc
from mcloud.scheduler.v1 import (
    placement_pb2,
    placement_service_pb2,
    placement_service_pb2_grpc,
)
from mcloud_base import ids, rpc
from mcloud_controlplane.compute import instance_store
from mcloud_controlplane.compute.model import shared
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame


class InstanceServicer(instance_service_pb2_grpc.InstanceServiceServicer):
    """Instances: what their owners ask for."""

    def __init__(
        self,
        database: Database,
        frame: Frame,
        placement: placement_service_pb2_grpc.PlacementServiceAsyncStub,
    ) -> None:
        self._database = database
        self._frame = frame
        self._placement = placement

    async def CreateInstance(
        self, request: instance_service_pb2.CreateInstanceRequest, context: Context
    ) -> operation_pb2.Operation:
        """Record instances and their operations (step 4); the conductor goes on."""
        operation = await self._frame.mutate(
            request, instance_store.create, is_long=request.count > 1
        )
        if request.validate_only:
            await self._explain_placement(operation, request.count)
        return operation

    async def _explain_placement(self, operation: operation_pb2.Operation, count: int) -> None:
        """Ask the scheduler whether there is room for so many, without a claim.

        Raises:
            errors.Exhausted: NO_VALID_HOST, with the explanation.
        """
        wanted = instance_pb2.Instance()
        operation.response.Unpack(wanted)
        size = wanted.status.flavor
        await rpc.call(
            self._placement.SelectDestinations,
            placement_service_pb2.SelectDestinationsRequest(
                domain_id=ids.new("d"),
                instance_id=wanted.metadata.id,
                project_id=wanted.metadata.project_id,
                resources=placement_pb2.Resources(
                    vcpu_count=size.vcpu_count, memory_mib=size.memory_mib, disk_gib=size.disk_gib
                ),
                host_id=wanted.spec.placement.host_id,
                availability_zone=wanted.spec.placement.availability_zone,
                server_group_id=wanted.spec.placement.server_group_id,
                count=count,
                dry_run=True,
            ),
        )

    async def ExplainInstance(
        self, request: instance_service_pb2.ExplainInstanceRequest, context: Context
    ) -> instance_service_pb2.ExplainInstanceResponse:
        """Tell why it is where it is."""
        return await self._database.read_few(instance_store.explain, auth.caller(), request)

    async def GetInstance(
        self, request: instance_service_pb2.GetInstanceRequest, context: Context
    ) -> instance_pb2.Instance:
        """Return one."""
        return await self._database.read_one(instance_store.get_visible, auth.caller(), request.id)

    async def ListInstances(
        self, request: instance_service_pb2.ListInstancesRequest, context: Context
    ) -> instance_service_pb2.ListInstancesResponse:
        """Return a page."""
        return await self._database.read(instance_store.list_page, auth.caller(), request)

    async def WatchInstances(
        self, request: instance_service_pb2.WatchInstancesRequest, context: Context
    ) -> AsyncIterator[instance_service_pb2.WatchInstancesResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "instance",
            instance_pb2.Instance,
            request,
            auth.caller(),
            instance_store.load,
        ):
            yield instance_service_pb2.WatchInstancesResponse(
                type=event.type, instance=event.message, revision=event.revision
            )

    async def UpdateInstance(
        self, request: instance_service_pb2.UpdateInstanceRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change name or labels."""
        return await self._frame.mutate(request, instance_store.update)

    async def DeleteInstance(
        self, request: instance_service_pb2.DeleteInstanceRequest, context: Context
    ) -> operation_pb2.Operation:
        """Begin to delete one."""
        return await self._frame.mutate(request, instance_store.delete)

    async def StartInstance(
        self, request: instance_service_pb2.StartInstanceRequest, context: Context
    ) -> operation_pb2.Operation:
        """Begin to start one."""
        return await self._frame.mutate(request, instance_store.start)

    async def StopInstance(
        self, request: instance_service_pb2.StopInstanceRequest, context: Context
    ) -> operation_pb2.Operation:
        """Begin to stop one."""
        return await self._frame.mutate(request, instance_store.stop)

    async def RebootInstance(
        self, request: instance_service_pb2.RebootInstanceRequest, context: Context
    ) -> operation_pb2.Operation:
        """Begin to reboot one."""
        return await self._frame.mutate(request, instance_store.reboot)

    async def AttachVolume(
        self, request: instance_service_pb2.AttachVolumeRequest, context: Context
    ) -> operation_pb2.Operation:
        """Begin to attach a volume."""
        return await self._frame.mutate(request, instance_store.attach_volume)

    async def DetachVolume(
        self, request: instance_service_pb2.DetachVolumeRequest, context: Context
    ) -> operation_pb2.Operation:
        """Begin to detach a volume."""
        return await self._frame.mutate(request, instance_store.detach_volume)
