"""Volumes served by real qemu-storage-daemons, used by real clients over real TLS."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import pki
from mcloud.common.v1 import session_pb2
from mcloud.volume.v1 import export_pb2
from mcloud_agents.volume import daemon, data
from mcloud_agents.volume.host import Settings, VolumeHost
from mcloud_base import errors, ids

pytestmark = pytest.mark.host

MIB = 1 << 20
SERVER = "h-server"
ONE, TWO = "h-one", "h-two"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="mcx-", dir="/tmp"))  # sockets need a short path
    yield directory
    for pids in daemon.scan(directory).values():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    authority = pki.Authority()
    for name in (SERVER, ONE, TWO):
        pki.write_qemu_files(authority.identity(name), directory / name)
    pki.write_qemu_files(pki.Authority("another").identity(ONE), directory / "stranger")
    return directory


@pytest.fixture
def settings(tmp_path: Path, run_dir: Path, certificates: Path) -> Settings:
    first = _free_ports(8)
    return Settings(
        directory=tmp_path / "volumes",
        run_dir=run_dir,
        pki_dir=shutil.copytree(certificates / SERVER, tmp_path / "pki"),
        address="127.0.0.1",
        port_first=first,
        port_last=first + 7,
    )


@pytest.fixture
async def host(settings: Settings) -> AsyncIterator[VolumeHost]:
    host = VolumeHost(settings)
    await host.start()
    yield host
    await host.close()


class Client:
    """qemu-io as one host's QEMU would connect: with its certificate and the told endpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def run(self, endpoint: export_pb2.ExportEndpoint, *commands: str, name: str = "") -> str:
        """Run commands; raise ConnectionError if the server refuses."""
        options = (
            f"driver=nbd,host={endpoint.address},port={endpoint.port},"
            f"export={name or endpoint.export_name},tls-creds=tls"
        )
        credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={self._directory}"
        return await _tool(
            "qemu-io",
            "--object",
            credentials,
            *(f"-c{c}" for c in commands),
            "--image-opts",
            options,
        )


@pytest.fixture
def one(certificates: Path) -> Client:
    return Client(certificates / ONE)


@pytest.fixture
def two(certificates: Path) -> Client:
    return Client(certificates / TWO)


def served_to(*hosts: str, size: int = 16 * MIB) -> export_pb2.VolumeDesired:
    desired = export_pb2.VolumeDesired(size_bytes=size)
    for name in hosts:
        desired.clients.add(
            attachment_id=f"att-{name}", host_id=name, certificate_subject=f"CN={name}"
        )
    return desired


async def test_only_the_named_host_reaches_a_volume(
    host: VolumeHost, one: Client, two: Client, certificates: Path
) -> None:
    volume = ids.new("vol")

    status = await host.ensure(volume, 1, served_to(ONE))

    (endpoint,) = status.endpoints
    assert endpoint.attachment_id == f"att-{ONE}"
    assert await one.run(endpoint, "length") == "16 MiB\n"
    assert "wrote" in await one.run(endpoint, "write -P 7 0 1M")
    with pytest.raises(ConnectionError, match="Failed to read|aborted|abort"):
        await two.run(endpoint, "length")
    with pytest.raises(ConnectionError):
        await Client(certificates / "stranger").run(endpoint, "length")
    plain = f"nbd://{endpoint.address}:{endpoint.port}/{endpoint.export_name}"
    with pytest.raises(ConnectionError, match="TLS negotiation required"):
        await _tool("qemu-io", "-c", "length", "-f", "raw", plain)
    with pytest.raises(ConnectionError, match="not present|not available|[Nn]o export"):
        await one.run(endpoint, "length", name=volume)


async def test_a_repeat_changes_nothing(host: VolumeHost) -> None:
    volume = ids.new("vol")
    status = await host.ensure(volume, 1, served_to(ONE))
    pid = host.pid(volume)

    assert await host.ensure(volume, 1, served_to(ONE)) == status
    assert host.pid(volume) == pid


async def test_with_no_clients_no_server_runs(host: VolumeHost, one: Client) -> None:
    volume = ids.new("vol")
    status = await host.ensure(volume, 1, served_to())
    assert status.allocated_bytes > 0
    assert not status.endpoints
    assert host.pid(volume) == 0
    (endpoint,) = (await host.ensure(volume, 2, served_to(ONE))).endpoints

    await host.ensure(volume, 3, served_to())

    with pytest.raises(ConnectionError, match="refused"):
        await one.run(endpoint, "length")
    (again,) = (await host.ensure(volume, 4, served_to(ONE))).endpoints
    assert (again.port, again.export_name) == (endpoint.port, endpoint.export_name)


async def test_a_second_client_comes_without_disturbing_the_first(
    host: VolumeHost, one: Client, two: Client
) -> None:
    volume = ids.new("vol")
    (endpoint,) = (await host.ensure(volume, 1, served_to(ONE))).endpoints
    pid = host.pid(volume)

    await host.ensure(volume, 2, served_to(ONE, TWO))

    assert host.pid(volume) == pid
    assert await two.run(endpoint, "length") == "16 MiB\n"
    await host.ensure(volume, 3, served_to(TWO))
    assert host.pid(volume) != pid  # the first has been cut off
    assert await two.run(endpoint, "length") == "16 MiB\n"
    with pytest.raises(ConnectionError):
        await one.run(endpoint, "length")


async def test_a_killed_server_comes_back_with_its_data(host: VolumeHost, one: Client) -> None:
    volume = ids.new("vol")
    (endpoint,) = (await host.ensure(volume, 1, served_to(ONE))).endpoints
    await one.run(endpoint, "write -P 42 1M 1M", "flush")
    pid = host.pid(volume)

    os.kill(pid, signal.SIGKILL)

    async with asyncio.timeout(30):
        await _until(lambda: host.pid(volume) not in {0, pid})
    assert await one.run(endpoint, "read -P 42 1M 1M", "read -P 0 0 1M")


async def test_a_new_agent_takes_the_server_over(
    host: VolumeHost, settings: Settings, one: Client, two: Client
) -> None:
    volume = ids.new("vol")
    status = await host.ensure(volume, 1, served_to(ONE), "epoch-1")
    pid = host.pid(volume)
    await host.close()
    assert await one.run(status.endpoints[0], "length") == "16 MiB\n"  # it runs on

    after = VolumeHost(settings)
    await after.start()
    try:
        (observed,) = await after.observe_all()
        assert (observed.id, observed.epoch, observed.generation) == (volume, "epoch-1", 1)
        assert await after.ensure(volume, 1, served_to(ONE)) == status
        assert after.pid(volume) == pid
        await after.ensure(volume, 2, served_to(TWO))  # it knows who was admitted before
        assert after.pid(volume) != pid
        killed = after.pid(volume)
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(30):
            await _until(lambda: after.pid(volume) not in {0, killed})
        assert await two.run(status.endpoints[0], "length") == "16 MiB\n"
    finally:
        await after.close()


async def test_a_new_agent_starts_what_has_died_meanwhile(
    host: VolumeHost, settings: Settings, one: Client
) -> None:
    volume = ids.new("vol")
    (endpoint,) = (await host.ensure(volume, 1, served_to(ONE))).endpoints
    pid = host.pid(volume)
    await host.close()
    os.kill(pid, signal.SIGKILL)

    after = VolumeHost(settings)
    await after.start()  # and the control plane says nothing
    try:
        async with asyncio.timeout(30):
            await _until(lambda: after.pid(volume) != 0)
        assert await one.run(endpoint, "length") == "16 MiB\n"
    finally:
        await after.close()


async def test_an_absent_volume_leaves_nothing(host: VolumeHost, settings: Settings) -> None:
    volume, other = ids.new("vol"), ids.new("vol")
    await host.ensure(volume, 1, served_to(ONE))
    await host.ensure(other, 1, served_to(ONE))
    before = await host.artifacts()
    kinds = session_pb2.Artifact.Kind
    assert sorted((a.kind, a.owner_id, a.generation) for a in before) == sorted(
        (kind, owner, 1)
        for kind in (kinds.KIND_VOLUME, kinds.KIND_EXPORT)
        for owner in (volume, other)
    )

    await host.ensure_absent(volume)
    await host.ensure_absent(volume)

    assert {a.owner_id for a in await host.artifacts()} == {other}
    assert {path.stem for path in settings.directory.iterdir()} == {other}


async def test_lost_data_is_reported_and_not_replaced(host: VolumeHost, settings: Settings) -> None:
    volume = ids.new("vol")
    await host.ensure(volume, 1, served_to())
    (settings.directory / f"{volume}.qcow2").unlink()

    with pytest.raises(errors.DataLoss, match="VOLUME_DATA_MISSING"):
        await host.ensure(volume, 2, served_to())

    (observed,) = await host.observe_all()
    assert errors.from_status(observed.error).reason == "VOLUME_DATA_MISSING"


async def test_data_that_a_killed_agent_has_not_made_is_no_loss(
    host: VolumeHost, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = ids.new("vol")

    async def killed(*arguments: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(data, "run", killed)
        with pytest.raises(RuntimeError, match="killed"):
            await host.ensure(volume, 1, served_to())

    after = VolumeHost(settings)
    await after.start()
    try:
        assert await after.observe_all() == []
        await after.ensure(volume, 1, served_to())
        assert [observed.id for observed in await after.observe_all()] == [volume]
    finally:
        await after.close()


async def test_a_volume_grows_and_never_shrinks(host: VolumeHost, one: Client) -> None:
    volume = ids.new("vol")
    (endpoint,) = (await host.ensure(volume, 1, served_to(ONE))).endpoints
    await one.run(endpoint, "write -P 5 0 64k")

    await host.ensure(volume, 2, served_to(ONE, size=32 * MIB))

    assert await one.run(endpoint, "length") == "32 MiB\n"
    assert await one.run(endpoint, "read -P 5 0 64k")
    with pytest.raises(errors.InvalidArgument, match="VOLUME_SHRINK"):
        await host.ensure(volume, 3, served_to(ONE))


async def test_a_renewed_certificate_is_taken_when_nobody_is_connected(
    host: VolumeHost, settings: Settings, one: Client
) -> None:
    volume = ids.new("vol")
    (endpoint,) = (await host.ensure(volume, 1, served_to(ONE))).endpoints
    pid = host.pid(volume)
    assert not await host.refresh_certificate(volume)
    newer = (settings.run_dir / f"{volume}.pid").stat().st_mtime + 10
    os.utime(settings.pki_dir / "server-cert.pem", (newer, newer))

    _, writer = await asyncio.open_connection(endpoint.address, endpoint.port)
    assert not await host.refresh_certificate(volume)
    writer.close()
    await writer.wait_closed()

    async with asyncio.timeout(30):
        while not await host.refresh_certificate(volume):
            await asyncio.sleep(0.01)
    assert host.pid(volume) != pid
    assert await one.run(endpoint, "length") == "16 MiB\n"


# An agent of its own process, which says when it begins, and is killed somewhere in the work.
AGENT = """
import asyncio, sys
from pathlib import Path
from mcloud.volume.v1 import export_pb2
from mcloud_agents.volume.host import Settings, VolumeHost

async def main(volume, directory, run_dir, pki_dir, first):
    host = VolumeHost(Settings(Path(directory), Path(run_dir), Path(pki_dir), "127.0.0.1",
                               int(first), int(first) + 7))
    await host.start()
    desired = export_pb2.VolumeDesired(size_bytes=16 << 20)
    desired.clients.add(attachment_id="att-h-one", host_id="h-one", certificate_subject="CN=h-one")
    print("begins", flush=True)
    await host.ensure(volume, 1, desired)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9])
async def test_an_agent_killed_at_any_instant_leaves_nothing_double(
    settings: Settings, one: Client, after_s: float
) -> None:
    volume = ids.new("vol")
    arguments = (settings.directory, settings.run_dir, settings.pki_dir, settings.port_first)
    victim = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, volume, *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert victim.stdout is not None
    async with asyncio.timeout(60):
        assert await victim.stdout.readline() == b"begins\n"
    await asyncio.sleep(after_s)  # the moment is the parameter; it waits for nothing
    victim.kill()
    await victim.communicate()

    after = VolumeHost(settings)
    await after.start()
    try:
        async with asyncio.timeout(60):
            status = await _insist(after, volume)
        assert daemon.scan(settings.run_dir) == {volume: [after.pid(volume)]}
        assert await one.run(status.endpoints[0], "write -P 1 0 64k", "read -P 1 0 64k")
    finally:
        await after.close()
    VolumeHost(settings)  # at its next start an agent tidies up
    assert {path.name for path in settings.directory.iterdir()} == {
        f"{volume}.json",
        f"{volume}.qcow2",
    }


async def _insist(host: VolumeHost, volume: str) -> export_pb2.VolumeOnHost:
    """Ensure the volume as a session would: again after each error."""
    while True:
        try:
            return await host.ensure(volume, 2, served_to(ONE))
        except errors.Unavailable:
            await asyncio.sleep(0.05)


async def test_what_is_no_volume_id_touches_no_file(host: VolumeHost) -> None:
    with pytest.raises(errors.InvalidArgument, match="BAD_VOLUME_ID"):
        await host.ensure("../../etc/passwd", 1, served_to())
    with pytest.raises(errors.InvalidArgument, match="BAD_VOLUME_ID"):
        await host.ensure_absent("../../etc/passwd")


async def test_when_no_port_is_left_the_next_volume_says_so(settings: Settings) -> None:
    host = VolumeHost(replace(settings, port_last=settings.port_first + 1))
    await host.start()
    first, second, third = (ids.new("vol") for _ in range(3))
    try:
        for volume in (first, second):
            await host.ensure(volume, 1, served_to(ONE))

        with pytest.raises(errors.Exhausted, match="NO_FREE_PORT"):
            await host.ensure(third, 1, served_to(ONE))

        await host.ensure_absent(first)
        (endpoint,) = (await host.ensure(third, 1, served_to(ONE))).endpoints
        assert endpoint.port == settings.port_first
    finally:
        await host.close()


async def _tool(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        output, trouble = await process.communicate()
    if process.returncode or b"Pattern verification failed" in output:
        raise ConnectionError((output + trouble).decode())
    return output.decode()


async def _until(condition: object) -> None:
    assert callable(condition)
    while not condition():
        await asyncio.sleep(0.005)


def _free_ports(count: int) -> int:
    """Return the first of a run of free ports below the ephemeral ones."""
    for first in range(11000 + os.getpid() % 500 * 20, 32000, count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no ports")
