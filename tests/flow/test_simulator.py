"""`mcloud-agent simulate` on a whole control plane: many hosts, a burst of instances, faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmarks.client import Client
from benchmarks.cloud import ControlPlane
from benchmarks.storm import Storm

from conftest import Cloud
from mcloud.compute.v1 import (
    host_pb2,
    host_service_pb2,
    host_service_pb2_grpc,
    instance_pb2,
)
from mcloud_agents.simulate import keep
from mcloud_agents.simulate.state_file import StateFile
from mcloud_base import errors

_DEADLINE_S = 120


class Simulator:
    """The program, and what it said at its end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.summary: dict[str, Any] = {}

    async def connected(self, count: int) -> None:
        """Wait until all hosts are."""
        await self.says(f"{count} of {count} hosts connected")

    async def says(self, text: str) -> None:
        """Wait until it says so, or find that it has since the last time."""
        assert self._process.stderr
        said = b""
        async with asyncio.timeout(_DEADLINE_S):
            while text.encode() not in said:
                line = await self._process.stderr.readline()
                assert line, said.decode()
                said += line

    async def end(self) -> None:
        """Interrupt it; read its summary."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
        async with asyncio.timeout(_DEADLINE_S):
            out, told = await self._process.communicate()
        assert self._process.returncode == 0, told.decode()
        self.summary = json.loads(out)


@asynccontextmanager
async def simulated(
    cloud: Cloud, state_dir: Path, count: int, *options: str
) -> AsyncIterator[Simulator]:
    """Run hosts until the end of the block, from their connection on."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mcloud_agents", "simulate", "--control-plane", cloud.public,
        "--ca", str(cloud.state_dir / "pki" / "ca.pem"), "--state-dir", str(state_dir),
        "--hosts", str(count), "--seed", "7", "-o", "json", *options,
        env={**os.environ, "MCLOUD_PASSWORD": cloud.password},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    simulator = Simulator(process)
    try:
        await simulator.connected(count)
        yield simulator
        await simulator.end()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def client(cloud: Cloud) -> AsyncIterator[Client]:
    async with Client(ControlPlane(cloud.state_dir, cloud.public)) as made:
        yield made


async def hosts(client: Client) -> list[host_pb2.Host]:
    stub = host_service_pb2_grpc.HostServiceStub(client.channel)
    request = host_service_pb2.ListHostsRequest(page_size=1000)
    return list((await client.call(stub.ListHosts, request, system=True)).hosts)


async def assert_all_active(storm: Storm, count: int) -> None:
    created = await storm.create(count, clients=8)
    assert (len(created.succeeded), dict(created.failed)) == (count, {})
    states = [instance.status.state for instance in await storm.instances()]
    assert states == [instance_pb2.InstanceStatus.STATE_ACTIVE] * count


async def assert_nothing_is_left(storm: Storm, client: Client, count: int) -> None:
    deleted = await storm.delete(clients=8)
    assert (len(deleted.succeeded), dict(deleted.failed)) == (count, {})
    for host in await hosts(client):
        assert host.status.instance_count == 0
        assert host.status.claimed == host_pb2.HostResources()


async def test_a_burst_fills_hosts_evenly_and_a_restart_finds_them_again(
    cloud: Cloud, client: Client, tmp_path: Path
) -> None:
    storm = Storm(client)
    await storm.prepare()
    state = tmp_path / "simulated"
    async with simulated(cloud, state, 20, "--vcpus", "4") as simulator:
        found = await hosts(client)
        assert sorted(host.metadata.name for host in found) == [
            f"sim-{number:05d}" for number in range(1, 21)
        ]
        assert {host.status.total.vcpu_count for host in found} == {4}
        await assert_all_active(storm, 30)
        counts = [host.status.instance_count for host in await hosts(client)]
        assert (min(counts), max(counts), sum(counts)) == (1, 2, 30)
    assert simulator.summary["domains"] == 30
    assert simulator.summary["calls"]["PortService/BindPort"] == 30
    before = {host.metadata.id for host in found}

    async with simulated(cloud, state, 20, "--vcpus", "4") as simulator:
        assert {host.metadata.id for host in await hosts(client)} == before
        await assert_nothing_is_left(storm, client, 30)
    assert simulator.summary["domains"] == 0
    assert simulator.summary["domains_started"] == 0  # they were there
    assert _kinds(state) == {"record": 30, "guest": 0}  # tombstones are remembered


async def test_broken_connections_and_crashes_lose_nothing(
    cloud: Cloud, client: Client, tmp_path: Path
) -> None:
    storm = Storm(client)
    await storm.prepare()
    faults = ("--disconnects-per-hour", "900", "--crashes-per-hour", "900", "--log-level", "info")
    async with simulated(cloud, tmp_path / "simulated", 8, *faults) as simulator:
        await assert_all_active(storm, 12)
        await simulator.says("agent crashed")  # a quick cloud is done before, and deletes after it
        await assert_nothing_is_left(storm, client, 12)
    assert simulator.summary["domains"] == 0
    assert simulator.summary["disconnects"] > 0
    assert simulator.summary["crashes"] > 0


async def test_a_refusal_ends_the_operation_with_its_reason(
    cloud: Cloud, client: Client, tmp_path: Path
) -> None:
    storm = Storm(client)
    await storm.prepare()
    async with simulated(cloud, tmp_path / "simulated", 2, "--refuse", "1") as simulator:
        created = await storm.create(2, clients=2)
        await assert_nothing_is_left(storm, client, 2)
    assert dict(created.failed) == {"SIMULATED_REFUSAL": 2}
    assert simulator.summary["refusals"] > 0


async def test_one_simulator_has_a_state(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    with pytest.raises(errors.WrongState, match="SIMULATOR_RUNNING"):
        StateFile(tmp_path)
    file.close()
    StateFile(tmp_path).close()


def _kinds(state: Path) -> dict[str, int]:
    file = StateFile(state)
    try:
        return {kind: file.count(kind) for kind in (keep.RECORD, "guest")}
    finally:
        file.close()
