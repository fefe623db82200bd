"""The driver over libvirt with real QEMU (TCG)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fakes import domains
from fakes.driver_contract import DEADLINE_S, DriverContract, Events
from fakes.lab_host import LabHost, running_host
from mcloud_agents.compute.driver import EventKind, State, libvirt_name
from mcloud_agents.compute.threaded_driver import Settings
from mcloud_base.errors import Unavailable, WrongState

libvirt = pytest.importorskip("libvirt")

from mcloud_agents.compute.libvirt_driver import LibvirtDriver  # noqa: E402 (needs libvirt)

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="a libvirtd of one's own needs root"),
]

BRIDGE = "mcbr101"


@pytest.fixture(scope="module")
def host() -> Iterator[LabHost]:
    with running_host() as host:
        host.run("ip", "link", "add", BRIDGE, "type", "bridge")
        host.run("ip", "link", "set", BRIDGE, "up")
        yield host


@pytest.fixture
def settings(host: LabHost, tmp_path: Path) -> Settings:
    # The guests of these tests have no operating system that would shut down.
    return Settings(tmp_path, uri=host.uri, shutdown_deadline_s=2.0)


@pytest.fixture
async def driver(settings: Settings) -> AsyncIterator[LibvirtDriver]:
    driver = LibvirtDriver(settings)
    await driver.start()
    yield driver
    await driver.close()


class TestQemu(DriverContract):
    @pytest.fixture
    def plant_foreign(self, host: LabHost) -> Iterator[Callable[[str, str], None]]:
        connection = libvirt.open(host.uri)
        planted = []

        def plant(name: str, uuid: str) -> None:
            planted.append(
                connection.createXML(
                    f"<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid>"
                    "<memory unit='MiB'>16</memory>"
                    "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
                )
            )

        yield plant
        for domain in planted:
            domain.destroy()
        connection.close()


def live_xml(host: LabHost, uuid: str) -> ElementTree.Element:
    return ElementTree.fromstring(host.run("virsh", "dumpxml", uuid))


async def test_the_definition_says_what_was_meant(
    driver: LibvirtDriver, host: LabHost, tmp_path: Path
) -> None:
    spec = domains.spec()
    wanted = domains.resolved(tmp_path, spec, nics=(domains.nic(),))
    await driver.ensure(wanted)

    live = live_xml(host, spec.uuid)
    root_disk = live.find("devices/disk[@type='file']")
    assert root_disk is not None
    chain = [root_disk.find(path) for path in ("backingStore/format", "backingStore/backingStore")]
    assert chain[0] is not None
    assert chain[0].get("type") == "qcow2"
    assert chain[1] is not None
    assert not list(chain[1])  # the end: nothing was probed below
    assert host.run("ip", "-o", "link", "show", "master", BRIDGE).count("tap00000001") == 1
    assert "mtu 1450" in host.run("ip", "-o", "link", "show", "tap00000001")
    listen = live.find("devices/graphics/listen")
    assert listen is not None
    assert listen.get("address") == "127.0.0.1"
    await driver.ensure_absent(spec.domain_id, spec.epoch, 1)
    assert "tap00000001" not in host.run("ip", "-o", "link", "show")


async def test_nics_are_plugged_and_unplugged(
    driver: LibvirtDriver, host: LabHost, tmp_path: Path
) -> None:
    spec = domains.spec()
    wanted = domains.resolved(tmp_path, spec)
    await driver.ensure(wanted)
    before = host.run("virsh", "domid", spec.uuid)
    spec.generation = 2
    wanted = replace(wanted, nics=(domains.nic(1), domains.nic(2)))
    await driver.ensure(wanted)

    assert "tap00000002" in host.run("ip", "-o", "link", "show", "master", BRIDGE)
    inactive = host.run("virsh", "dumpxml", "--inactive", spec.uuid)
    assert "tap00000001" in inactive
    assert host.run("virsh", "domid", spec.uuid) == before, "it was started again"
    await driver.ensure_absent(spec.domain_id, spec.epoch, 2)


async def until_unavailable(driver: LibvirtDriver) -> None:
    """Ask until there is no answer any more."""
    with contextlib.suppress(Unavailable):
        while True:
            await driver.list()


async def test_a_killed_libvirtd_is_found_again(
    driver: LibvirtDriver, host: LabHost, tmp_path: Path
) -> None:
    spec = domains.spec()
    wanted = domains.resolved(tmp_path, spec)
    await driver.ensure(wanted)
    events = Events(driver)
    for pid in host.libvirtd_pids():
        os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        await until_unavailable(driver)
    await asyncio.to_thread(host.lab, "up")
    await events.until(lambda event: event.kind == EventKind.CONNECTED)

    found = await driver.find(spec.domain_id)
    assert found is not None
    assert found.state == State.STATE_RUNNING
    events.seen.clear()
    await driver.ensure_absent(spec.domain_id, spec.epoch, 1)
    await events.until(lambda event: event.uuid == spec.uuid)  # registered again


async def test_a_hung_libvirtd_hangs_nobody(
    settings: Settings, host: LabHost, tmp_path: Path
) -> None:
    driver = LibvirtDriver(replace(settings, call_deadline_s=1.0, thread_count=2))
    await driver.start()
    (pid,) = host.libvirtd_pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(4):  # more than there are threads
            with pytest.raises(Unavailable, match="HYPERVISOR_UNAVAILABLE"):
                await driver.list()
        assert time.monotonic() - began < 15
    finally:
        os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await driver.list()
                break
            except Unavailable:
                continue
    await driver.close()


async def test_a_refusal_carries_libvirts_words(driver: LibvirtDriver, tmp_path: Path) -> None:
    spec = domains.spec()
    wanted = domains.resolved(tmp_path, spec, nics=(domains.nic(3, bridge="mcbr999"),))
    with pytest.raises(WrongState, match="mcbr999.*HYPERVISOR_REFUSED"):
        await driver.ensure(wanted)
    await driver.ensure_absent(spec.domain_id, spec.epoch, 1)
    assert await driver.list() == []


class Overtaken:
    """A domain of libvirt's that was looked at just before it became what it is."""

    def __init__(self, domain: Any, *, was_active: bool) -> None:
        self._domain = domain
        self._looks = [was_active]

    def isActive(self) -> bool:  # noqa: N802 (libvirt's)
        return self._looks.pop() if self._looks else bool(self._domain.isActive())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)


async def test_an_order_that_has_come_true_meanwhile_has_not_failed(
    driver: LibvirtDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = domains.spec()
    wanted = domains.resolved(tmp_path, spec)
    await driver.ensure(wanted)
    hypervisor: Any = driver._hypervisor
    found = hypervisor._wanted(wanted)
    for order, was_active in (
        (lambda: hypervisor.start(wanted), False),
        (lambda: hypervisor.cut_power(wanted), True),
        (lambda: hypervisor.remove(spec.domain_id, spec.epoch, 1), True),
    ):
        if was_active and found.isActive():
            found.destroy()
        overtaken = Overtaken(found, was_active=was_active)
        with monkeypatch.context() as patched:
            patched.setattr(hypervisor, "_wanted", lambda _, found=overtaken: found)
            patched.setattr(hypervisor, "_find", lambda _, found=overtaken: found)
            await asyncio.to_thread(order)
        assert not overtaken._looks
    assert await driver.list() == []


async def test_a_paused_guest_is_resumed(
    driver: LibvirtDriver, host: LabHost, tmp_path: Path
) -> None:
    spec = domains.spec()
    await driver.ensure(domains.resolved(tmp_path, spec))
    host.run("virsh", "suspend", spec.uuid)
    paused = await driver.find(spec.domain_id)
    assert paused is not None
    assert (paused.state, paused.reason) == (State.STATE_PAUSED, "paused on the host")

    resumed = await driver.resume(spec.domain_id)
    assert resumed.state == State.STATE_RUNNING
    await driver.ensure_absent(spec.domain_id, spec.epoch, 1)


async def test_a_killed_guest_is_noticed(
    driver: LibvirtDriver, host: LabHost, tmp_path: Path
) -> None:
    spec = domains.spec()
    await driver.ensure(domains.resolved(tmp_path, spec))
    events = Events(driver)
    pid_file = f"/run/libvirt/qemu/{libvirt_name(spec.instance_id)}.pid"
    host.run("sh", "-c", f"kill -KILL $(cat {pid_file})")
    await events.until(lambda event: event.uuid == spec.uuid)
    found = await driver.find(spec.domain_id)
    assert found is not None
    assert (found.state, found.reason) == (State.STATE_SHUTOFF, "crashed")
    await driver.ensure_absent(spec.domain_id, spec.epoch, 1)
