"""An agent over a hypervisor that needs no root, with its services in memory."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fakes import domains
from fakes.compute_services import (
    FakeAttachments,
    FakeConductor,
    FakeImages,
    FakePorts,
    Reports,
)
from fakes.driver import FakeDriver
from fakes.driver_contract import NODE
from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute.agent import ComputeAgent, Settings
from mcloud_agents.compute.driver import Driver
from mcloud_agents.compute.threaded_driver import Settings as DriverSettings


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "image.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64M"], check=True, timeout=60
    )
    return path.read_bytes()


@dataclass
class Bench:
    """An agent and all that is around it."""

    make_driver: Callable[[], Driver]
    settings: Settings
    images: FakeImages
    conductor: FakeConductor = field(default_factory=FakeConductor)
    ports: FakePorts = field(default_factory=FakePorts)
    attachments: FakeAttachments = field(default_factory=FakeAttachments)
    reports: Reports = field(default_factory=Reports)
    agent: ComputeAgent = field(init=False)
    driver: Driver = field(init=False)

    async def start(self) -> None:
        """Start an agent on what is on disk."""
        self.reports = Reports()
        self.driver = self.make_driver()
        self.agent = ComputeAgent(
            self.settings,
            self.driver,
            conductor=self.conductor,
            images=self.images,
            ports=self.ports,
            attachments=self.attachments,
            dataplane=self.ports,
            report=self.reports,
        )
        await self.agent.start()

    def place(self, **fields: Any) -> domain_pb2.DomainSpec:
        """Have the conductor place a domain here."""
        root_disk = domain_pb2.RootDisk(
            image_id="img-1", image_sha256=self.images.sha256, image_format="qcow2", size_gib=1
        )
        spec = domains.spec(**({"root_disk": root_disk} | fields))
        self.conductor.specs[spec.domain_id] = spec
        return spec

    def desire(self, spec: domain_pb2.DomainSpec, **fields: Any) -> None:
        """Send the order for it, or its tombstone."""
        values: dict[str, Any] = {
            "id": spec.domain_id,
            "epoch": domains.EPOCH,
            "generation": spec.generation,
        }
        desired = session_pb2.Desired(**(values | fields))
        desired.spec.Pack(domain_pb2.DomainDesired(instance_id=spec.instance_id))
        self.agent.desire(desired)

    async def reach(
        self, spec: domain_pb2.DomainSpec
    ) -> tuple[session_pb2.Observed, domain_pb2.DomainStatus]:
        """Desire it and wait until it is reported as reached."""
        self.desire(spec)
        return await self.reports.until(
            lambda observed, _: (
                observed.id == spec.domain_id and observed.generation == spec.generation
            )
        )

    def directory(self, spec: domain_pb2.DomainSpec) -> Path:
        return self.settings.state_dir / "instances" / spec.domain_id


@pytest.fixture(params=["fake", "libvirt"])
def make_driver(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Driver]:
    """The driver of each agent that is started, over one hypervisor."""
    if request.param == "fake":
        fake = FakeDriver()
        return lambda: fake
    pytest.importorskip("libvirt")
    from mcloud_agents.compute.libvirt_driver import LibvirtDriver

    node = tmp_path / "node.xml"
    node.write_text(NODE)
    return lambda: LibvirtDriver(DriverSettings(tmp_path, uri=f"test://{node}"))


@pytest.fixture
async def bench(
    make_driver: Callable[[], Driver], tmp_path: Path, image: bytes
) -> AsyncIterator[Bench]:
    settings = Settings("host-1", tmp_path / "state", listing_interval_s=0.2, longest_pause_s=0.2)
    bench = Bench(make_driver, settings, FakeImages(image))
    await bench.start()
    yield bench
    await bench.agent.close()
