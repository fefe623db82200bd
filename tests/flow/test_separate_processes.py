"""The seven services as seven processes: found through identity, ended by SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import Cloud
from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from flow.small_image import upload_zeros
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import (
    flavor_pb2,
    flavor_service_pb2,
    flavor_service_pb2_grpc,
    instance_service_pb2,
    instance_service_pb2_grpc,
    operation_service_pb2_grpc,
)
from mcloud.identity.v1 import endpoint_service_pb2, endpoint_service_pb2_grpc
from mcloud.image.v1 import image_service_pb2_grpc
from mcloud.network.v1 import (
    network_pb2,
    network_service_pb2,
    network_service_pb2_grpc,
    subnet_pb2,
    subnet_service_pb2,
    subnet_service_pb2_grpc,
)
from mcloud.scheduler.v1 import placement_pb2
from mcloud.volume.v1 import volume_service_pb2, volume_service_pb2_grpc
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.settings import SERVICES

_START_S = 120
_END_S = 30


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return "sqlite"
    return str(request.getfixturevalue("postgresql_url"))


class Processes:
    """A control plane of one process a service, all over one state directory."""

    def __init__(self, directory: Path, ports: list[int], database_url: str) -> None:
        self.state_dir = directory / "state"
        self._directory = directory
        addresses = [f"127.0.0.1:{port}" for port in ports]
        self.public = dict(zip(SERVICES, addresses[::2], strict=True))
        self.internal = dict(zip(SERVICES, addresses[1::2], strict=True))
        self.running = {name: self._start(name, database_url) for name in SERVICES}

    def _start(self, name: str, database_url: str) -> subprocess.Popen[bytes]:
        values = {
            "state_dir": str(self.state_dir),
            "services": [name],
            "public_listen": self.public[name],
            "internal_listen": self.internal[name],
            "database": database_url,
        }
        tables = {"public_endpoints": self.public, "internal_endpoints": self.internal}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        for key, table in tables.items():
            lines += [f"[{key}]", *(f'{each} = "{where}"' for each, where in table.items())]
        config = self._directory / f"{name}.toml"
        config.write_text("\n".join(lines))
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "mcloud_controlplane", "--config", config],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def log(self, name: str) -> str:
        return self._log(name).read_text()

    def channel(self, address: str) -> grpc.aio.Channel:
        authority = (self.state_dir / "pki" / "ca.pem").read_bytes()
        return rpc.channel(address, grpc.ssl_channel_credentials(authority))

    async def ready(self) -> None:
        """Wait until each serves; identity's first, which makes the administrator's password."""
        async with asyncio.timeout(_START_S):
            while not (self.state_dir / "admin-password").exists():
                assert self.running["identity"].poll() is None, self.log("identity")
                await asyncio.sleep(0.05)  # nothing tells when a file is there but looking
        for name, address in self.public.items():
            channel = self.channel(address)
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            answer = await rpc.call(stub.Check, request, timeout_s=_START_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, self.log(name)
            await channel.close(None)

    def end(self) -> dict[str, int]:
        """Ask each to end; return the exit statuses."""
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        try:
            return {name: p.wait(timeout=_END_S) for name, p in self.running.items()}
        finally:
            for process in self.running.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()


@pytest.fixture
async def processes(
    tmp_path: Path, free_ports: Callable[[int], list[int]], database_url: str
) -> AsyncIterator[Processes]:
    started = Processes(tmp_path, free_ports(2 * len(SERVICES)), database_url)
    try:
        await started.ready()
        yield started
    finally:
        statuses = started.end()
    assert set(statuses.values()) == {0}, statuses
    for name in SERVICES:
        assert "Traceback" not in started.log(name), started.log(name)
        assert "control plane stops" in started.log(name)


async def test_seven_processes_are_one_cloud(processes: Processes) -> None:
    cloud = Cloud(processes.public["identity"], processes.state_dir)
    found = await rpc.call(
        endpoint_service_pb2_grpc.EndpointServiceStub(cloud.channel).ListEndpoints,
        endpoint_service_pb2.ListEndpointsRequest(),
    )
    addresses = {endpoint.service: endpoint.address for endpoint in found.endpoints}
    assert addresses == processes.public
    channels = {name: processes.channel(address) for name, address in addresses.items()}
    try:
        await _make_and_lose_an_instance(cloud, channels)
    finally:
        for channel in (cloud.channel, *channels.values()):
            await channel.close(None)


async def _make_and_lose_an_instance(cloud: Cloud, channels: dict[str, Any]) -> None:
    compute = channels["compute"]
    operations = operation_service_pb2_grpc.OperationServiceStub(compute)
    instances = instance_service_pb2_grpc.InstanceServiceStub(compute)
    flavor = await _made(
        cloud.call(
            flavor_service_pb2_grpc.FlavorServiceStub(compute).CreateFlavor,
            flavor_service_pb2.CreateFlavorRequest(
                request_id=ids.request_id(),
                name="m1.small",
                spec=flavor_pb2.FlavorSpec(vcpu_count=2, memory_mib=512, disk_gib=1),
            ),
            system=True,
        )
    )
    network = await _made(
        cloud.call(
            network_service_pb2_grpc.NetworkServiceStub(channels["network"]).CreateNetwork,
            network_service_pb2.CreateNetworkRequest(
                request_id=ids.request_id(), name="private", spec=network_pb2.NetworkSpec(mtu=0)
            ),
        )
    )
    await cloud.call(
        subnet_service_pb2_grpc.SubnetServiceStub(channels["network"]).CreateSubnet,
        subnet_service_pb2.CreateSubnetRequest(
            request_id=ids.request_id(),
            name="private",
            spec=subnet_pb2.SubnetSpec(network_id=network, cidr="10.0.0.0/24"),
        ),
    )
    volumes = volume_service_pb2_grpc.VolumeServiceStub(channels["volume"])
    listed = await cloud.call(volumes.ListVolumes, volume_service_pb2.ListVolumesRequest())
    assert not listed.volumes
    image = await upload_zeros(
        image_service_pb2_grpc.ImageServiceStub(channels["image"]), await cloud.token()
    )

    request = instance_service_pb2.CreateInstanceRequest(request_id=ids.request_id(), name="vm")
    request.spec.flavor_id, request.spec.image_id = flavor, image
    request.spec.nics.add(network_id=network)
    begun = await cloud.call(instances.CreateInstance, request)
    ended = await _wait(cloud, operations, begun.id)
    assert ended.state == operation_pb2.Operation.STATE_FAILED
    error = errors.from_status(ended.error)
    assert error.reason == "NO_VALID_HOST"
    explanation = errors.find_detail(error, placement_pb2.PlacementExplanation)
    assert isinstance(explanation, placement_pb2.PlacementExplanation)
    assert explanation.requested.vcpu_count == 2
    assert explanation.considered_count == 0
    steps = {step.number: step.service for step in ended.steps}
    assert steps == {
        1: "identity", 2: "compute", 3: "compute", 4: "compute", 5: "conductor",
    }  # fmt: skip

    deleting = await cloud.call(
        instances.DeleteInstance,
        instance_service_pb2.DeleteInstanceRequest(
            request_id=ids.request_id(), id=begun.resource.id
        ),
    )
    ended = await _wait(cloud, operations, deleting.id)
    assert ended.state == operation_pb2.Operation.STATE_SUCCEEDED, ended
    with pytest.raises(errors.NotFound):
        await cloud.call(
            instances.GetInstance, instance_service_pb2.GetInstanceRequest(id=begun.resource.id)
        )


async def _made(call: Any) -> str:
    return str((await call).resource.id)


async def _wait(cloud: Cloud, operations: Any, id_: str) -> operation_pb2.Operation:
    request = operation_pb2.WaitOperationRequest(id=id_, timeout=duration_pb2.Duration(seconds=60))
    found: operation_pb2.Operation = await cloud.call(
        operations.WaitOperation, request, timeout_s=70
    )
    return found
