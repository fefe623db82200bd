"""The fake driver and the one over libvirt, on libvirt's own test driver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fakes.driver import FakeDriver
from fakes.driver_contract import NODE, DriverContract
from mcloud_agents.compute.threaded_driver import Settings, ThreadedDriver

libvirt = pytest.importorskip("libvirt")


class TestFakeDriver(DriverContract):
    @pytest.fixture
    async def driver(self) -> FakeDriver:
        return FakeDriver()

    @pytest.fixture
    def plant_foreign(self, driver: FakeDriver) -> Callable[[str, str], None]:
        return driver.plant


class TestLibvirtTestDriver(DriverContract):
    @pytest.fixture
    async def driver(self, tmp_path: Path) -> AsyncIterator[ThreadedDriver]:
        from mcloud_agents.compute.libvirt_driver import LibvirtDriver

        node = tmp_path / "node.xml"
        node.write_text(NODE)
        driver = LibvirtDriver(Settings(tmp_path, uri=f"test://{node}"))
        await driver.start()
        yield driver
        await driver.close()

    @pytest.fixture
    def plant_foreign(self, driver: ThreadedDriver) -> Callable[[str, str], None]:
        # Such a connection has its domains to itself, so this has to be the driver's own.
        connection = driver._hypervisor._connection  # type: ignore[attr-defined]

        def plant(name: str, uuid: str) -> None:
            connection.createXML(
                f"<domain type='test'><name>{name}</name><uuid>{uuid}</uuid>"
                "<memory unit='MiB'>16</memory><os><type arch='i686'>hvm</type></os></domain>"
            )

        return plant
