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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("internal error: process exited while connecting to monitor", "QEMU_DIED"),
        ("internal error: qemu unexpectedly closed the monitor", "QEMU_DIED"),
        ("internal error: QEMU unexpectedly closed the monitor (vm='instance-1')", "QEMU_DIED"),
        ("Requested operation is not valid: domain is not running", "QEMU_DIED"),
        (
            "internal error: qemu unexpectedly closed the monitor: 2026-01-01T00:00:00.0Z "
            "qemu-system-x86_64: warning: host doesn't support requested feature: CPUID.svm\n"
            "2026-01-01T00:00:01.0Z qemu-system-x86_64: terminating on signal 15 from pid 1",
            "QEMU_DIED",
        ),
        (
            "internal error: process exited while connecting to monitor: qemu-system-x86_64: "
            "warning: it is old\nqemu-system-x86_64: -nonsense: invalid option",
            "HYPERVISOR_REFUSED",
        ),
        (
            "internal error: QEMU unexpectedly closed the monitor (vm='instance-1'): "
            "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory",
            "HYPERVISOR_REFUSED",
        ),
        ("unsupported configuration: this QEMU does not know 'x'", "HYPERVISOR_REFUSED"),
        (
            "internal error: process exited while connecting to monitor: qemu-system-x86_64: "
            "-blockdev {}: Failed to connect to '192.0.2.1:10809': Connection refused",
            "VOLUME_UNREACHABLE",
        ),
    ],
)
def test_who_ended_qemu_is_told_from_libvirts_words(text: str, reason: str) -> None:
    from mcloud_agents.compute.libvirt_driver import translated

    error = libvirt.libvirtError("start")
    error.err = (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_QEMU, text, 2)
    assert translated(error).reason == reason
