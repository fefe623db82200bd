"""A whole control plane over PostgreSQL, in the databases that docs/deploy.md names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import duration_pb2

from conftest import Cloud
from fixtures_postgresql import Server, postgresql_server  # noqa: F401
from flow.small_image import upload_zeros
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
from mcloud.image.v1 import image_service_pb2_grpc
from mcloud.network.v1 import (
    network_pb2,
    network_service_pb2,
    network_service_pb2_grpc,
    port_service_pb2,
    port_service_pb2_grpc,
    subnet_pb2,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud_base import errors, ids

pytestmark = pytest.mark.postgres

GUIDE = Path(__file__).parents[2] / "docs" / "deploy.md"
Operation = operation_pb2.Operation


@pytest.fixture
def database_url(postgresql_server: Server) -> Iterator[str]:  # noqa: F811 (a fixture)
    names = re.findall(r"^createdb .*\b(mcloud_\w+)$", GUIDE.read_text(), re.MULTILINE)
    assert len(names) > 3, "the guide says which databases to make"
    for name in names:
        postgresql_server.execute(f"CREATE DATABASE {name}")
    yield f"postgresql://{postgresql_server.user}@127.0.0.1:{postgresql_server.port}/mcloud_{{name}}"
    for name in names:
        postgresql_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_everything_but_the_host_works(cloud: Cloud) -> None:
    channel = cloud.channel
    instances = instance_service_pb2_grpc.InstanceServiceStub(channel)
    spec = instance_pb2.InstanceSpec(
        flavor_id=await _made(
            cloud,
            flavor_service_pb2_grpc.FlavorServiceStub(channel).CreateFlavor,
            flavor_service_pb2.CreateFlavorRequest(
                name="m1.small",
                spec=flavor_pb2.FlavorSpec(vcpu_count=1, memory_mib=128, disk_gib=1),
            ),
            system=True,
        ),
        image_id=await upload_zeros(
            image_service_pb2_grpc.ImageServiceStub(channel), await cloud.token()
        ),
    )
    network_id = await _made(
        cloud,
        network_service_pb2_grpc.NetworkServiceStub(channel).CreateNetwork,
        network_service_pb2.CreateNetworkRequest(name="lan", spec=network_pb2.NetworkSpec()),
    )
    await _made(
        cloud,
        subnet_service_pb2_grpc.SubnetServiceStub(channel).CreateSubnet,
        subnet_service_pb2.CreateSubnetRequest(
            name="lan", spec=subnet_pb2.SubnetSpec(network_id=network_id, cidr="10.10.0.0/24")
        ),
    )
    spec.nics.add(network_id=network_id)

    create = instance_service_pb2.CreateInstanceRequest(
        request_id=ids.request_id(), name="web", spec=spec
    )
    operation = await cloud.call(instances.CreateInstance, create)
    assert (await cloud.call(instances.CreateInstance, create)).id == operation.id
    operation = await _ended(cloud, operation)
    assert operation.state == Operation.STATE_FAILED
    assert errors.from_status(operation.error).reason == "NO_VALID_HOST"
    get = instance_service_pb2.GetInstanceRequest(id=operation.resource.id)
    instance = await cloud.call(instances.GetInstance, get)
    assert instance.status.state == instance_pb2.InstanceStatus.STATE_ERROR
    assert instance.status.fault.reason == "NO_VALID_HOST"
    ports = port_service_pb2_grpc.PortServiceStub(channel)
    listed = await cloud.call(ports.ListPorts, port_service_pb2.ListPortsRequest())
    assert not listed.ports, "what was reserved has been given back"

    delete = instance_service_pb2.DeleteInstanceRequest(
        request_id=ids.request_id(), id=operation.resource.id
    )
    operation = await _ended(cloud, await cloud.call(instances.DeleteInstance, delete))
    assert operation.state == Operation.STATE_SUCCEEDED


async def _made(cloud: Cloud, method: Any, request: Any, *, system: bool = False) -> str:
    request.request_id = ids.request_id()
    operation = await cloud.call(method, request, system=system)
    assert operation.state == Operation.STATE_SUCCEEDED, operation.error
    return str(operation.resource.id)


async def _ended(cloud: Cloud, operation: Operation) -> Operation:
    stub = operation_service_pb2_grpc.OperationServiceStub(cloud.channel)
    wait = operation_pb2.WaitOperationRequest(
        id=operation.id, timeout=duration_pb2.Duration(seconds=120)
    )
    ended: Operation = await cloud.call(stub.WaitOperation, wait, timeout_s=130)
    return ended
