"""Instances, as one project sees them."""

from __future__ import annotations

from typing import Any

from flow.small_image import upload_zeros
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    flavor_service_pb2,
    flavor_service_pb2_grpc,
    instance_pb2,
    instance_service_pb2,
    instance_service_pb2_grpc,
    operation_service_pb2_grpc,
)
from mcloud.image.v1 import image_service_pb2_grpc
from mcloud_base import ids, rpc
from service.core.cloud import Client, Rule, wait
from service.core.keys import new_project

State = instance_pb2.InstanceStatus


class Instances:
    """The service of instances for a project of its own, with a flavor and an image."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.stub = instance_service_pb2_grpc.InstanceServiceStub(client.public)
        self.operations = operation_service_pb2_grpc.OperationServiceStub(client.public)

    async def prepare(self, **size: int) -> Instances:
        """Make project, member, flavor and image."""
        self.project = new_project()
        self.who = await self.client.make_user(self.project, Rule.ROLE_MEMBER, self.project)
        self.flavor_id = await self.make_flavor(**size)
        images = image_service_pb2_grpc.ImageServiceStub(self.client.public)
        token = dict(self.who)["authorization"]
        self.image_id = await upload_zeros(images, str(token).removeprefix("Bearer "))
        return self

    async def make_flavor(self, **size: int) -> str:
        request = flavor_service_pb2.CreateFlavorRequest(
            request_id=ids.request_id(), name=ids.request_id()
        )
        for field, value in {"vcpu_count": 1, "memory_mib": 64, "disk_gib": 1, **size}.items():
            setattr(request.spec, field, value)
        flavors = flavor_service_pb2_grpc.FlavorServiceStub(self.client.public)
        made = await rpc.call(flavors.CreateFlavor, request, metadata=await self.client.login())
        return str(made.resource.id)

    def request(self, name: str, **values: Any) -> instance_service_pb2.CreateInstanceRequest:
        request = instance_service_pb2.CreateInstanceRequest(
            **{"request_id": ids.request_id(), "name": name, **values}
        )
        request.spec.flavor_id, request.spec.image_id = self.flavor_id, self.image_id
        return request

    async def create(self, name: str, **values: Any) -> operation_pb2.Operation:
        return await self.call("CreateInstance", self.request(name, **values))

    async def call(self, method: str, request: Any) -> Any:
        return await rpc.call(getattr(self.stub, method), request, metadata=self.who)

    async def change(self, verb: str, id_: str, **values: Any) -> operation_pb2.Operation:
        """Delete, Start, Stop, Reboot."""
        request = getattr(instance_service_pb2, f"{verb}InstanceRequest")(
            request_id=ids.request_id(), id=id_, **values
        )
        operation: operation_pb2.Operation = await self.call(f"{verb}Instance", request)
        return operation

    async def get(self, id_: str) -> instance_pb2.Instance:
        request = instance_service_pb2.GetInstanceRequest(id=id_)
        instance: instance_pb2.Instance = await self.call("GetInstance", request)
        return instance

    async def wait(self, operation: operation_pb2.Operation) -> operation_pb2.Operation:
        return await wait(self.operations, operation.id, self.who)

    async def cancel(self, id_: str, **values: Any) -> operation_pb2.Operation:
        request = operation_pb2.CancelOperationRequest(
            **{"id": id_, "request_id": ids.request_id(), **values}
        )
        return await rpc.call(self.operations.CancelOperation, request, metadata=self.who)
