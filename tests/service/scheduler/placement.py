"""The scheduler, as the conductor asks it for room."""

from __future__ import annotations

import asyncio
from typing import Any

from mcloud.compute.v1 import host_pb2, host_service_pb2, host_service_pb2_grpc
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2, placement_service_pb2_grpc
from mcloud_base import ids, rpc
from service.compute.host import Host
from service.core.cloud import Client
from service.core.keys import new_project


class Placement:
    """Asks for room, as the conductor does."""

    def __init__(self, client: Client) -> None:
        self.client = client
        channel = client.as_service("conductor")
        self.stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
        self.users = placement_service_pb2_grpc.PlacementServiceStub(client.public)

    def request(self, vcpus: int = 1, **values: Any) -> Any:
        return placement_service_pb2.SelectDestinationsRequest(
            **{"domain_id": ids.new("d"), "instance_id": ids.new("i"), "project_id": "p", **values},
            resources=placement_pb2.Resources(vcpu_count=vcpus, memory_mib=64, disk_gib=1),
        )

    async def select(self, request: Any) -> placement_service_pb2.SelectDestinationsResponse:
        return await rpc.call(self.stub.SelectDestinations, request, timeout_s=60)

    async def capacity(self, vcpus: int, zone: str) -> tuple[int, int]:
        request = placement_service_pb2.GetCapacityRequest(
            resources=placement_pb2.Resources(vcpu_count=vcpus, memory_mib=64, disk_gib=1),
            availability_zone=zone,
        )
        answer = await rpc.call(self.users.GetCapacity, request, metadata=await self.client.login())
        return answer.count, answer.host_count

    async def zone(self, *hosts: Host) -> str:
        """Put hosts into a zone of their own; wait until the scheduler knows."""
        zone = new_project()
        stub = host_service_pb2_grpc.HostServiceStub(self.client.public)
        system = await self.client.login()
        for host in hosts:
            request = host_service_pb2.UpdateHostRequest(request_id=ids.request_id(), id=host.id)
            request.spec.availability_zone = zone
            request.update_mask.paths.append("spec.availability_zone")
            await rpc.call(stub.UpdateHost, request, metadata=system)
        await self.until(1, zone, lambda found: found[1] == len(hosts))
        return zone

    async def until(self, vcpus: int, zone: str, holds: Any) -> None:
        async with asyncio.timeout(30):
            while not holds(await self.capacity(vcpus, zone)):
                await asyncio.sleep(0.02)  # its view follows the database's log

    async def host(self, host: Host) -> host_pb2.Host:
        stub = host_service_pb2_grpc.HostServiceStub(self.client.public)
        request = host_service_pb2.GetHostRequest(id=host.id)
        return await rpc.call(stub.GetHost, request, metadata=await self.client.login())
