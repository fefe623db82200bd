"""What every Driver does; run for the fake, for libvirt's test driver, and for QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import domains
from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute.driver import Driver, Event, EventKind, State, libvirt_name
from mcloud_base import ids
from mcloud_base.errors import NotFound, WrongState

DEADLINE_S = 120.0  # of anything that is waited for
SHUTOFF = domain_pb2.POWER_STATE_SHUTOFF

# A host for libvirt's own test driver.
NODE = """<node><cpu><mhz>2000</mhz><model>x</model><active>4</active><nodes>1</nodes>
<sockets>1</sockets><cores>4</cores><threads>1</threads></cpu><memory>8388608</memory></node>"""


class Events:
    """The events of a driver, to wait for."""

    def __init__(self, driver: Driver) -> None:
        self.seen: list[Event] = []
        self._more = asyncio.Event()
        driver.subscribe(self._take)

    def _take(self, event: Event) -> None:
        self.seen.append(event)
        self._more.set()

    async def until(self, wanted: Callable[[Event], bool]) -> Event:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                self._more.clear()
                for event in self.seen:
                    if wanted(event):
                        return event
                await self._more.wait()


class DriverContract:
    """Subclasses have a fixture `driver` (started) and one `plant_foreign`."""

    @pytest.fixture(autouse=True)
    async def _clean(self, driver: Driver) -> AsyncIterator[None]:
        yield
        for domain in await driver.list():
            if domain.identity:
                identity = domain.identity
                await driver.ensure_absent(identity.domain_id, identity.epoch, identity.generation)

    async def test_a_domain_is_defined_and_runs(self, driver: Driver, tmp_path: Path) -> None:
        spec = domains.spec()
        events = Events(driver)

        domain = await driver.ensure(domains.resolved(tmp_path, spec))

        assert domain.state == State.STATE_RUNNING
        assert (domain.name, domain.uuid) == (libvirt_name(spec.instance_id), spec.uuid)
        assert domain.identity is not None
        assert domain.identity.domain_id == spec.domain_id
        assert domain.identity.instance_id == spec.instance_id
        assert (domain.identity.epoch, domain.identity.generation) == (domains.EPOCH, 1)
        assert await driver.find(spec.domain_id) == domain
        assert await driver.list() == [domain]
        event = await events.until(lambda e: e.uuid == spec.uuid)
        assert event.kind == EventKind.CHANGED

    async def test_repeating_an_order_changes_nothing(self, driver: Driver, tmp_path: Path) -> None:
        wanted = domains.resolved(tmp_path, domains.spec())
        first = await driver.ensure(wanted)
        events = Events(driver)

        assert await driver.ensure(wanted) == first
        await driver.ensure_absent(wanted.spec.domain_id, domains.EPOCH, 1)
        await driver.ensure_absent(wanted.spec.domain_id, domains.EPOCH, 1)

        assert await driver.list() == []
        assert await driver.find(wanted.spec.domain_id) is None
        await events.until(lambda e: e.uuid == wanted.spec.uuid)  # the first is of the removal

    async def test_a_hostile_name_stays_a_name(self, driver: Driver, tmp_path: Path) -> None:
        name = "</title><devices>&\"'<![CDATA[ \u2028 x"
        domain = await driver.ensure(domains.resolved(tmp_path, domains.spec(name=name)))
        assert domain.state == State.STATE_RUNNING

    async def test_a_later_generation_is_recorded_without_a_boot(
        self, driver: Driver, tmp_path: Path
    ) -> None:
        spec = domains.spec()
        await driver.ensure(domains.resolved(tmp_path, spec))
        spec.generation = 5

        domain = await driver.ensure(domains.resolved(tmp_path, spec))

        assert domain.identity is not None
        assert (domain.identity.generation, domain.identity.boot_number) == (5, 1)

    async def test_an_older_generation_is_refused(self, driver: Driver, tmp_path: Path) -> None:
        spec = domains.spec(generation=5)
        wanted = domains.resolved(tmp_path, spec)
        await driver.ensure(wanted)
        older = domain_pb2.DomainSpec()
        older.CopyFrom(spec)
        older.generation = 4

        with pytest.raises(WrongState, match="STALE_GENERATION"):
            await driver.ensure(replace(wanted, spec=older))
        with pytest.raises(WrongState, match="STALE_GENERATION"):
            await driver.ensure_absent(spec.domain_id, domains.EPOCH, 4)

        assert await driver.find(spec.domain_id) is not None

    async def test_a_new_epoch_accepts_lower_generations(
        self, driver: Driver, tmp_path: Path
    ) -> None:
        spec = domains.spec(generation=5)
        await driver.ensure(domains.resolved(tmp_path, spec))
        spec.epoch, spec.generation = "epoch-2", 2

        domain = await driver.ensure(domains.resolved(tmp_path, spec))
        assert domain.identity is not None
        assert (domain.identity.epoch, domain.identity.generation) == ("epoch-2", 2)
        await driver.ensure_absent(spec.domain_id, "epoch-3", 1)
        assert await driver.list() == []

    async def test_one_domain_of_an_instance_at_a_time(
        self, driver: Driver, tmp_path: Path
    ) -> None:
        first = domains.spec()
        second = domains.spec(first.instance_id)
        await driver.ensure(domains.resolved(tmp_path, first))

        with pytest.raises(WrongState, match="INSTANCE_HAS_DOMAIN"):
            await driver.ensure(domains.resolved(tmp_path, second))
        await driver.ensure_absent(second.domain_id, domains.EPOCH, 9)  # not that one
        assert await driver.find(first.domain_id) is not None

        await driver.ensure_absent(first.domain_id, domains.EPOCH, 1)
        await driver.ensure(domains.resolved(tmp_path, second))

    async def test_power(self, driver: Driver, tmp_path: Path) -> None:
        spec = domains.spec()
        await driver.ensure(domains.resolved(tmp_path, spec))
        spec.power_state, spec.generation = SHUTOFF, 2
        domain = await driver.ensure(domains.resolved(tmp_path, spec))
        assert domain.state == State.STATE_SHUTOFF
        assert domain.reason in ("guest shut down", "powered off")
        assert domain.identity is not None
        assert domain.identity.generation == 2

        spec.power_state, spec.generation = domain_pb2.POWER_STATE_RUNNING, 3
        domain = await driver.ensure(domains.resolved(tmp_path, spec))
        assert domain.state == State.STATE_RUNNING

    async def test_a_domain_may_be_defined_and_stay_off(
        self, driver: Driver, tmp_path: Path
    ) -> None:
        spec = domains.spec(power_state=SHUTOFF)
        domain = await driver.ensure(domains.resolved(tmp_path, spec))
        assert domain.state == State.STATE_SHUTOFF

    @pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
    async def test_a_higher_boot_number_boots_once(
        self, driver: Driver, tmp_path: Path, hard: bool
    ) -> None:
        spec = domains.spec()
        await driver.ensure(domains.resolved(tmp_path, spec))
        spec.boot_number, spec.generation, spec.hard_reboot = 2, 2, hard
        spec.memory_mib = 96  # what only a boot can change

        domain = await driver.ensure(domains.resolved(tmp_path, spec))
        assert domain.state == State.STATE_RUNNING
        assert domain.identity is not None
        assert domain.identity.boot_number == 2
        assert await driver.ensure(domains.resolved(tmp_path, spec)) == domain

    async def test_a_restored_control_plane_forgets_no_boot(
        self, driver: Driver, tmp_path: Path
    ) -> None:
        spec = domains.spec(boot_number=3, generation=3)
        await driver.ensure(domains.resolved(tmp_path, spec))
        spec.epoch, spec.generation, spec.boot_number = "epoch-2", 1, 2

        domain = await driver.ensure(domains.resolved(tmp_path, spec))

        assert domain.state == State.STATE_RUNNING
        assert domain.identity is not None
        assert (domain.identity.epoch, domain.identity.boot_number) == ("epoch-2", 3)

    async def test_foreign_domains_are_shown_and_left_alone(
        self, driver: Driver, tmp_path: Path, plant_foreign: Callable[[str, str], None]
    ) -> None:
        spec = domains.spec()
        plant_foreign("somebodys", ids.libvirt_uuid("another"))
        plant_foreign(libvirt_name(spec.instance_id), ids.libvirt_uuid("a third"))
        before = await driver.list()
        assert [domain.identity for domain in before] == [None, None]

        with pytest.raises(WrongState, match="FOREIGN_DOMAIN"):
            await driver.ensure(domains.resolved(tmp_path, spec))
        await driver.ensure_absent(spec.domain_id, domains.EPOCH, 1)

        assert await driver.list() == before

    async def test_resuming(self, driver: Driver, tmp_path: Path) -> None:
        spec = domains.spec()
        with pytest.raises(NotFound, match="DOMAIN_NOT_FOUND"):
            await driver.resume(spec.domain_id)
        await driver.ensure(domains.resolved(tmp_path, spec))
        domain = await driver.resume(spec.domain_id)  # it runs: nothing to do
        assert domain.state == State.STATE_RUNNING

    async def test_host_facts(self, driver: Driver) -> None:
        facts = await driver.host_facts()
        assert facts.vcpu_count >= 1
        assert facts.memory_mib >= 256
        assert facts.disk_gib >= 1
        assert facts.hypervisor_version
        assert facts.cpu_arch
