"""One real guest, from order to tombstone: the agent over real libvirt, QEMU, qcow2 and NBD."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fakes import domains, pki
from fakes.compute_services import (
    FakeAttachments,
    FakeConductor,
    FakeImages,
    FakePorts,
    Reports,
)
from fakes.lab_host import LabHost, running_host
from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute.agent import ComputeAgent, Settings
from mcloud_agents.compute.driver import IO_ERROR, State
from mcloud_agents.compute.threaded_driver import Settings as DriverSettings

pytest.importorskip("libvirt")

from mcloud_agents.compute.libvirt_driver import LibvirtDriver  # noqa: E402 (needs libvirt)

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="a libvirtd of one's own needs root"),
]

ROOT = Path(__file__).parents[2]
BOOT_DEADLINE_S = 240.0  # seven seconds on a quiet machine
USER_DATA = b"""#!/bin/sh
echo user-data says hello
while :; do
    if [ -b /dev/vdb ]; then
        dd if=/dev/zero of=/dev/vdb bs=4096 count=1 conv=fsync 2>/dev/null || echo WRITE FAILED
    fi
    sleep 0.2
done &
"""
CONFIG = domain_pb2.GuestConfig(
    config_drive=True,
    user_data=USER_DATA,
    public_keys=[domain_pb2.PublicKey(name="my_key", public_key="ssh-ed25519 AAAA me@home")],
)


@pytest.fixture(scope="module")
def image() -> bytes:
    path = ROOT / "build" / "guest.qcow2"
    command = [sys.executable, str(ROOT / "scripts" / "guest-image"), str(path)]
    subprocess.run(command, check=True, timeout=900)
    return path.read_bytes()


@pytest.fixture(scope="module")
def host() -> Iterator[LabHost]:
    with running_host() as host:
        host.run("ip", "link", "add", "mcbr101", "type", "bridge")
        host.run("ip", "link", "set", "mcbr101", "up")
        yield host


@dataclass
class NbdServer:
    """A volume, served over TLS to who shows a certificate, at 127.0.0.1 in the host."""

    host: LabHost
    directory: Path
    export: str

    def start(self) -> None:
        data = self.directory / "volume.raw"
        if not data.exists():
            with data.open("wb") as file:
                file.truncate(64 << 20)
        self.host.lab(
            "exec", "--detach", "--pid-file", str(self.directory / "nbd.pid"),
            "--log", str(self.directory / "nbd.log"), "h1", "--",
            "qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--cache=none",
            "--object", "tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir=/etc/pki/qemu",
            "--tls-creds=t", "--bind=127.0.0.1", "--port=10809",
            f"--export-name={self.export}", str(data),
        )  # fmt: skip

    def stop(self) -> None:
        os.kill(int((self.directory / "nbd.pid").read_text()), signal.SIGKILL)


@dataclass
class Bench:
    """The agent of a host, and what it asks."""

    host: LabHost
    directory: Path
    images: FakeImages
    conductor: FakeConductor = field(default_factory=FakeConductor)
    ports: FakePorts = field(default_factory=FakePorts)
    attachments: FakeAttachments = field(default_factory=lambda: FakeAttachments("127.0.0.1"))
    reports: Reports = field(default_factory=Reports)
    agent: ComputeAgent = field(init=False)

    async def start(self) -> None:
        settings = Settings("h1", self.directory / "state", listing_interval_s=2.0)
        driver = LibvirtDriver(DriverSettings(self.directory, uri=self.host.uri))
        self.agent = ComputeAgent(
            settings,
            driver,
            conductor=self.conductor,
            images=self.images,
            ports=self.ports,
            attachments=self.attachments,
            dataplane=self.ports,
            report=self.reports,
        )
        await self.agent.start()

    async def reach(self, spec: domain_pb2.DomainSpec) -> domain_pb2.DomainStatus:
        self.conductor.specs[spec.domain_id] = spec
        self.agent.desire(
            session_pb2.Desired(id=spec.domain_id, epoch=domains.EPOCH, generation=spec.generation)
        )
        async with asyncio.timeout(BOOT_DEADLINE_S):
            _, status = await self.reports.until(
                lambda observed, _: observed.generation == spec.generation
            )
        return status

    async def writes_on(self, server: NbdServer) -> bool:
        """Whether the guest's writes reach the volume, and go on doing so for a while."""
        data = server.directory / "volume.raw"
        for _ in range(5):
            before = data.stat().st_mtime_ns
            try:
                async with asyncio.timeout(2):
                    while data.stat().st_mtime_ns == before:
                        await asyncio.sleep(0.05)
            except TimeoutError:
                return False
        return True

    async def console(self, spec: domain_pb2.DomainSpec, pattern: str, count: int = 1) -> str:
        """Wait until the guest has printed what matches, so many times."""
        path = self.directory / "state/instances" / spec.domain_id / "console.log"
        async with asyncio.timeout(BOOT_DEADLINE_S):
            while True:
                text = path.read_text(errors="replace") if path.exists() else ""
                if len(re.findall(pattern, text)) >= count:
                    return text
                await asyncio.sleep(0.1)


async def test_a_guest_from_order_to_tombstone(host: LabHost, image: bytes, tmp_path: Path) -> None:
    identity = pki.Authority().identity("h1")
    pki.write_qemu_files(identity, host.state / "hosts/h1/pki")
    server = NbdServer(host, tmp_path, "att-1")
    server.start()
    bench = Bench(host, tmp_path, FakeImages(image, chunk=1 << 20))
    await bench.start()
    root_disk = domain_pb2.RootDisk(
        image_id="img-1", image_sha256=bench.images.sha256, image_format="qcow2", size_gib=1
    )
    spec = domains.spec(root_disk=root_disk, memory_mib=160, config=CONFIG)

    status = await bench.reach(spec)
    assert status.state == State.STATE_RUNNING
    booted = await bench.console(spec, "guest: READY")
    assert "guest: metadata-source: config-drive" in booted
    assert "guest: hostname: stack-testvm" in booted
    assert "guest: ssh-key: ssh-ed25519 AAAA me@home" in booted
    assert "user-data says hello" in booted
    assert f"vda={(1 << 30) // 512}" in booted
    first_boot = host.run("virsh", "domid", spec.uuid)

    # A NIC and a volume come while it runs.
    spec.generation = 2
    spec.nics.add(port_id="port-00000000000000000001")
    spec.disks.add(attachment_id="att-1", volume_id="vol-1", device="vdb")
    await bench.reach(spec)
    await bench.console(spec, f"guest: disks:.* vdb={(64 << 20) // 512}")
    await bench.console(spec, "guest: eth0: added")

    # The agent is started again: the guest is the same.
    await bench.agent.close()
    await bench.start()
    (observed,) = await bench.agent.observe_all()
    assert observed.generation == 2
    assert host.run("virsh", "domid", spec.uuid) == first_boot

    # The volume's server dies: the guest stands still, and runs on when it is back.
    server.stop()
    async with asyncio.timeout(BOOT_DEADLINE_S):
        _, status = await bench.reports.until(lambda _, status: status.state == State.STATE_PAUSED)
    assert status.reason == IO_ERROR
    server.start()
    async with asyncio.timeout(BOOT_DEADLINE_S):
        while True:
            _, status = await bench.reports.until(
                lambda _, status: status.state == State.STATE_RUNNING
            )
            if await bench.writes_on(server):
                break
    # (Taken away while it writes, a disk does fail it: what it says later is no matter.)
    text = await bench.console(spec, "guest: eth0: added")
    assert "WRITE FAILED" not in text, "the guest has seen an I/O error"

    # Both are taken away while it runs.
    spec.generation = 3
    del spec.nics[:], spec.disks[:]
    await bench.reach(spec)
    await bench.console(spec, "guest: disks: vda=[0-9]+ *\r?\n", 2)
    assert host.run("virsh", "domid", spec.uuid) == first_boot
    server.stop()

    # A soft reboot: the guest shuts itself down and boots once more.
    spec.generation, spec.boot_number = 4, 2
    status = await bench.reach(spec)
    assert status.boot_number == 2
    assert host.run("virsh", "domid", spec.uuid) != first_boot
    await bench.console(spec, "guest: READY", 2)

    spec.generation, spec.power_state = 5, domain_pb2.POWER_STATE_SHUTOFF
    status = await bench.reach(spec)
    assert (status.state, status.reason) == (State.STATE_SHUTOFF, "guest shut down")

    bench.agent.desire(
        session_pb2.Desired(id=spec.domain_id, epoch=domains.EPOCH, generation=6, absent=True)
    )
    await bench.reports.until(lambda observed, _: observed.absent)
    assert await bench.agent.artifacts() == []
    assert host.run("virsh", "list", "--all", "--uuid").strip() == ""
    assert list((tmp_path / "state/instances").iterdir()) == []
    await bench.agent.close()
