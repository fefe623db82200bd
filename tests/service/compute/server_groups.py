"""Server groups, as one project sees them."""

from __future__ import annotations

from typing import Any

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    server_group_pb2,
    server_group_service_pb2,
    server_group_service_pb2_grpc,
)
from mcloud_base import ids, rpc
from mcloud_controlplane.compute import model
from mcloud_controlplane.core import database

Spec = server_group_pb2.ServerGroupSpec


class ServerGroups:
    """The service of server groups, as one caller sees it."""

    def __init__(self, channel: Any, who: rpc.Metadata) -> None:
        self.stub = server_group_service_pb2_grpc.ServerGroupServiceStub(channel)
        self.who = who

    async def call(self, method: str, request: Any) -> Any:
        return await rpc.call(getattr(self.stub, method), request, metadata=self.who)

    async def create(self, policy: str, name: str = "", **values: Any) -> operation_pb2.Operation:
        request = server_group_service_pb2.CreateServerGroupRequest(
            request_id=ids.request_id(), name=name or ids.request_id()
        )
        request.spec.policy = Spec.Policy.Value(f"POLICY_{policy}")
        request.spec.max_instances_per_host = values.pop("most", 0)
        request.MergeFrom(server_group_service_pb2.CreateServerGroupRequest(**values))
        operation: operation_pb2.Operation = await self.call("CreateServerGroup", request)
        return operation

    async def make(self, policy: str, **values: Any) -> str:
        return (await self.create(policy, **values)).resource.id

    async def get(self, id_: str) -> server_group_pb2.ServerGroup:
        request = server_group_service_pb2.GetServerGroupRequest(id=id_)
        found: server_group_pb2.ServerGroup = await self.call("GetServerGroup", request)
        return found

    async def list(self, **values: Any) -> list[server_group_pb2.ServerGroup]:
        request = server_group_service_pb2.ListServerGroupsRequest(**values)
        return list((await self.call("ListServerGroups", request)).server_groups)

    async def update(self, id_: str, *paths: str, **values: Any) -> operation_pb2.Operation:
        request = server_group_service_pb2.UpdateServerGroupRequest(
            request_id=ids.request_id(), id=id_, **values
        )
        request.update_mask.paths.extend(paths)
        operation: operation_pb2.Operation = await self.call("UpdateServerGroup", request)
        return operation

    async def delete(self, id_: str) -> operation_pb2.Operation:
        request = server_group_service_pb2.DeleteServerGroupRequest(
            request_id=ids.request_id(), id=id_
        )
        operation: operation_pb2.Operation = await self.call("DeleteServerGroup", request)
        return operation

    def watch(self, **values: Any) -> Any:
        request = server_group_service_pb2.WatchServerGroupsRequest(**values)
        return self.stub.WatchServerGroups(request, metadata=tuple(self.who))


def insert(project_id: str, policy: str, most: int = 1) -> str:
    """Insert a server group's row; return its id. Within a unit."""
    moment, id_ = database.now(), ids.new("grp")
    model.ServerGroup.create(
        id=id_, name=id_, project_id=project_id, create_time=moment, update_time=moment,
        policy=policy, max_instances_per_host=most,
    )  # fmt: skip
    return id_
