"""mcloud-agent as a process on a host of its own: sessions, reports, and what outlives it.

The host is a network and a mount namespace with libvirt's test hypervisor; the services are
reached over unix sockets, which no network namespace hides, with the TLS of the internal port.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from fakes import pki
from fakes.secrecy import assert_no_cores
from fakes.session_service import ServerStream, SessionService
from mcloud.conductor.v1 import domain_service_pb2_grpc
from mcloud.network.v1 import dataplane_pb2
from mcloud.network.v1 import session_service_pb2_grpc as network_grpc
from mcloud.scheduler.v1 import placement_service_pb2 as placement
from mcloud.scheduler.v1 import placement_service_pb2_grpc
from mcloud.volume.v1 import export_pb2
from mcloud.volume.v1 import session_service_pb2_grpc as volume_grpc
from mcloud_agents.enrolment import Files, Membership
from mcloud_agents.volume import daemon
from mcloud_base import endpoints, ids, tls

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]

HOST_ID = ids.new("h")
EPOCH = "e1"
FURNISH = "mount -t tmpfs tmpfs /run && ip link set lo up && echo up && exec sleep infinity"


class Scheduler(placement_service_pb2_grpc.HostReportServiceServicer):
    def __init__(self) -> None:
        self.reports: asyncio.Queue[placement.ReportHostRequest] = asyncio.Queue()

    async def ReportHost(  # noqa: N802
        self,
        request_iterator: AsyncIterator[placement.ReportHostRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[placement.ReportHostResponse]:
        async for report in request_iterator:
            self.reports.put_nowait(report)
            yield placement.ReportHostResponse(sequence=report.sequence)


@dataclass
class ControlPlane:
    """The internal port of all services."""

    conductor: SessionService = field(default_factory=SessionService)
    network: SessionService = field(default_factory=SessionService)
    volume: SessionService = field(default_factory=SessionService)
    scheduler: Scheduler = field(default_factory=Scheduler)

    @asynccontextmanager
    async def serving(self, authority: pki.Authority, endpoint: str) -> AsyncIterator[None]:
        own = authority.identity("conductor", dns=(endpoints.SERVICE_NAME,))
        server = grpc.aio.server()
        domain_service_pb2_grpc.add_SessionServiceServicer_to_server(self.conductor, server)  # type: ignore[arg-type]
        network_grpc.add_SessionServiceServicer_to_server(self.network, server)  # type: ignore[arg-type]
        volume_grpc.add_SessionServiceServicer_to_server(self.volume, server)
        placement_service_pb2_grpc.add_HostReportServiceServicer_to_server(self.scheduler, server)
        credentials = grpc.ssl_server_credentials(
            [(own.key, own.certificate)], authority.certificate, require_client_auth=True
        )
        server.add_secure_port(endpoint, credentials)
        await server.start()
        try:
            yield
        finally:
            await server.stop(grace=0)

    async def report(self) -> placement.ReportHostRequest:
        async with asyncio.timeout(60):
            return await self.scheduler.reports.get()


@dataclass
class Host:
    """A machine that has been enrolled."""

    directory: Path
    pid: int  # of the process that keeps its namespaces
    authority: pki.Authority

    @property
    def endpoint(self) -> str:
        return f"unix:{self.directory}/internal.sock"

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--", *arguments]

    async def start_agent(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.command(
                sys.executable,
                *("-m", "mcloud_agents", "run", "--config", f"{self.directory}/agent.toml"),
            ),
            stdin=asyncio.subprocess.DEVNULL,
        )

    async def run(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *self.command(*arguments), stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
        assert process.returncode == 0, output
        return output.decode()

    def dhcp_servers(self) -> set[int]:
        """Of this network namespace's children: found by their directory."""
        return _processes("dnsmasq", str(self.directory))

    def volume_servers(self) -> dict[str, list[int]]:
        return daemon.scan(self.directory / "run" / "volumes")


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    directory = Path(tempfile.mkdtemp(prefix="mcx-", dir="/tmp"))  # sockets: a short path
    directory.chmod(0o755)  # DHCP servers give root's rights up
    authority = pki.Authority()
    files = Files(directory / "lib" / "identity", directory / "pki")
    csr = tls.signing_request(files.key(), HOST_ID)
    certificate = authority.sign(csr, HOST_ID, uri=tls.HOST_URI + HOST_ID)
    identity = tls.Identity(files.key(), certificate, authority.certificate)
    files.save(identity, Membership(HOST_ID, "node-1", "unused:1", "unused:1"))
    (directory / "agent.toml").write_text(
        f'underlay_ip = "127.0.0.1"\nname = "node-1"\nlibvirt_uri = "test:///default"\n'
        f'state_dir = "{directory}/lib"\nrun_dir = "{directory}/run"\n'
        f'pki_dir = "{directory}/pki"\nreport_interval_s = 600\nlog_level = "debug"\n'
        f'internal_endpoint = "unix:{directory}/internal.sock"\nhypervisor = "qemu"\n'
    )
    keeper = await asyncio.create_subprocess_exec(
        *("unshare", "--net", "--mount", "--propagation=private", "sh", "-c", FURNISH),
        stdout=asyncio.subprocess.PIPE,
    )
    assert keeper.stdout is not None
    async with asyncio.timeout(30):
        assert await keeper.stdout.readline() == b"up\n"
    host = Host(directory, keeper.pid, authority)
    try:
        yield host
    finally:
        left = host.dhcp_servers().union(*host.volume_servers().values())
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        keeper.kill()
        await keeper.wait()
        keeper._transport.close()  # type: ignore[attr-defined]  # asyncio would warn
        shutil.rmtree(directory)


@pytest.fixture
def stranger(host: Host) -> Path:
    """QEMU's files of another host."""
    return pki.write_qemu_files(host.authority.identity("h-other"), host.directory / "other")


async def _desire_volume(stream: ServerStream, volume_id: str, generation: int) -> None:
    desired = export_pb2.VolumeDesired(size_bytes=16 << 20)
    desired.clients.add(attachment_id="att-1", host_id="h-other", certificate_subject="CN=h-other")
    stream.desire(volume_id, generation, spec=desired)


def _document() -> dataplane_pb2.HostDataplane:
    subnet = dataplane_pb2.SubnetBinding(
        subnet_id=ids.new("sub"),
        cidr="10.0.0.0/24",
        gateway_ip="10.0.0.1",
        service_ip="10.0.0.2",
        dhcp_enabled=True,
    )
    segment = dataplane_pb2.NetworkSegment(
        network_id=ids.new("net"),
        vni=77,
        mtu=1400,
        subnets=[subnet],
        service_mac="fa:16:3e:ff:00:02",
    )
    return dataplane_pb2.HostDataplane(networks=[segment])


async def test_the_agent_serves_three_services_and_touches_nothing_when_it_ends(
    host: Host, stranger: Path
) -> None:
    world, volume = ControlPlane(), ids.new("vol")
    async with world.serving(host.authority, host.endpoint):
        agent = await host.start_agent()
        domains = await world.conductor.stream()
        networks = await world.network.stream()
        volumes = await world.volume.stream()
        for stream in (domains, networks, volumes):
            hello = stream.received[0].hello
            assert (hello.incarnation, hello.underlay_ip, hello.epoch) == (1, "127.0.0.1", "")
            assert list(hello.capabilities) == ["storage"]
            stream.lease(epoch=EPOCH)
        report = await world.report()
        assert (report.name, report.incarnation, report.sequence) == ("node-1", 1, 1)
        assert report.total.memory_mib > 0
        assert report.reserved.memory_mib == 512

        networks.desire(HOST_ID, 5, spec=_document())
        await networks.until(lambda: networks.observed)
        assert networks.observed[0].generation == 5, networks.observed[0].error
        assert "mcbr77" in await host.run("ip", "-o", "link", "show", "type", "bridge")
        dhcp_servers = host.dhcp_servers()
        assert dhcp_servers

        await _desire_volume(volumes, volume, 1)
        await volumes.until(lambda: volumes.observed)
        status = export_pb2.VolumeOnHost()
        assert volumes.observed[0].status.Unpack(status)
        (endpoint,) = status.endpoints
        assert await _length(host, stranger, endpoint) == "16 MiB\n"
        (server,) = host.volume_servers()[volume]
        for pid in (agent.pid, server, *dhcp_servers):
            assert_no_cores(pid)

        agent.terminate()
        async with asyncio.timeout(60):
            assert await agent.wait() == 0
        assert host.dhcp_servers() == dhcp_servers
        assert host.volume_servers() == {volume: [server]}
        assert await _length(host, stranger, endpoint) == "16 MiB\n"

        agent = await host.start_agent()
        volumes = await world.volume.stream()
        assert volumes.received[0].hello.incarnation == 2
        assert volumes.received[0].hello.epoch == EPOCH
        volumes.lease(2, EPOCH)
        await volumes.until(lambda: volumes.observed)  # what it found, unasked
        assert (volumes.observed[0].id, volumes.observed[0].generation) == (volume, 1)
        agent.kill()
        await agent.wait()
        assert host.volume_servers() == {volume: [server]}
        assert host.dhcp_servers() == dhcp_servers

        agent = await host.start_agent()
        networks, volumes = await world.network.stream(), await world.volume.stream()
        while volumes.received[0].hello.incarnation != 3:
            volumes = await world.volume.stream()
        volumes.lease(3, EPOCH)
        volumes.desire(volume, 2, absent=True, epoch=EPOCH)
        await volumes.until(lambda: any(observed.absent for observed in volumes.observed))
        assert host.volume_servers() == {}
        agent.terminate()
        async with asyncio.timeout(60):
            assert await agent.wait() == 0


async def test_without_a_control_plane_the_agent_keeps_volumes_served(host: Host) -> None:
    world, volume = ControlPlane(), ids.new("vol")
    async with world.serving(host.authority, host.endpoint):
        agent = await host.start_agent()
        volumes = await world.volume.stream()
        volumes.lease(epoch=EPOCH)
        await _desire_volume(volumes, volume, 1)
        await volumes.until(lambda: volumes.observed)
    (server,) = host.volume_servers()[volume]

    os.kill(server, signal.SIGKILL)

    async with asyncio.timeout(60):
        while set(host.volume_servers().get(volume, ())) <= {server}:
            await asyncio.sleep(0.02)
    agent.terminate()
    async with asyncio.timeout(60):
        assert await agent.wait() == 0


async def test_a_second_agent_is_refused(host: Host) -> None:
    world = ControlPlane()
    async with world.serving(host.authority, host.endpoint):
        agent = await host.start_agent()
        await world.volume.stream()
        second = await host.start_agent()
        async with asyncio.timeout(60):
            assert await second.wait() == 1
        assert agent.returncode is None
        agent.terminate()
        async with asyncio.timeout(60):
            await agent.wait()


async def _length(host: Host, directory: Path, endpoint: export_pb2.ExportEndpoint) -> str:
    options = (
        f"driver=nbd,host={endpoint.address},port={endpoint.port},"
        f"export={endpoint.export_name},tls-creds=tls"
    )
    credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={directory}"
    return await host.run(
        "qemu-io", "--object", credentials, "-c", "length", "--image-opts", options
    )


def _processes(name: str, mark: str) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if Path(os.fsdecode(line.split(b"\0")[0])).name == name and mark.encode() in line:
            found.add(int(entry.name))
    return found
