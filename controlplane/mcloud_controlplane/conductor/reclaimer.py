"""Goes on where an operation had to end before its work: most often because a host was silent.

It looks only at rows that no operation works on: volumes that were to be detached, instances that
are deleted and still have a domain, domains that their hosts have reported absent and that still
hold room, and instances that are deleted, or were never built, and still have reservations but no
domain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import structlog
from peewee import fn

from mcloud_base import errors
from mcloud_controlplane.compute.model import Claim, Domain, Instance, shared
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.create_instance import release_reservations
from mcloud_controlplane.conductor.domains import Domains
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.core import tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.workflow import Job

log = structlog.get_logger()

_INTERVAL_S = 10.0
_PAUSE_S = 1.0  # between two rounds that changes have caused
_AT_ONCE = 10


class Reclaimer:
    """Run `run` for as long as the conductor serves."""

    def __init__(self, opened: Database, neighbours: Neighbours, domains: Domains) -> None:
        self._database = opened
        self._neighbours = neighbours
        self._domains = domains
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Reclaim what there is, now and then and when something changed."""
        with self._database.listening() as event:
            while True:
                event.clear()
                try:
                    await self.reclaim()
                except errors.Error as error:
                    log.warning("reclaiming is tried again", reason=error.reason)
                await asyncio.sleep(_PAUSE_S)
                try:
                    async with asyncio.timeout(_INTERVAL_S):
                        await event.wait()
                except TimeoutError:
                    continue

    async def reclaim(self) -> None:
        """Reclaim everything that can be; what cannot be now is not in the way of the rest."""
        for domain_id, job in await self._database.read(_left_domains):
            await self._database.write(store.desire_absent, job, domain_id)
            log.info("domain of a deleted instance is removed", domain=domain_id)
        leaving = await self._database.read(_left_volumes)
        await asyncio.gather(
            *(
                self._try(instance, self._detach(job, instance, volume))
                for instance, volume, job in leaving
            )
        )
        gone = await self._database.read(_gone_domains)
        await asyncio.gather(
            *(
                self._try(instance, self._domains.release(job, instance, domain_id))
                for instance, domain_id, job in gone
            )
        )
        left = await self._database.read(_left_reservations)
        await asyncio.gather(
            *(self._try(instance, self._release(job, instance)) for instance, job in left)
        )

    async def _detach(self, job: Job, instance: Instance, volume: dict[str, Any]) -> None:
        await self._neighbours.disconnect(job, instance.domain_id, volume["attachment_id"])
        await self._neighbours.release_attachments(job, [volume["attachment_id"]])
        await self._database.write(store.drop_volume, job, volume)
        log.info("volume reclaimed", instance=instance.id, volume=volume["volume_id"])

    async def _release(self, job: Job, instance: Instance) -> None:
        await release_reservations(self._neighbours, job, instance)
        await self._database.write(_released, instance)
        log.info("reservations reclaimed", instance=instance.id)

    async def _try(self, instance: Instance, work: Awaitable[None]) -> None:
        async with self._slots:
            try:
                await work
            except errors.Error as error:
                log.warning("reclaiming is tried again", instance=instance.id, reason=error.reason)


def _left_volumes() -> list[tuple[Instance, dict[str, Any], Job]]:
    """Return volumes that were to be detached and that the host has taken off by now."""
    rows = (
        Instance.select()
        .join(Domain, on=(Domain.id == Instance.domain_id))
        .where(
            Instance.volumes.cast("text").contains('"leaving"')
            & (Instance.operation_id == "")
            & Instance.delete_time.is_null()
            & (Domain.observed_generation >= Domain.generation)
            & ~Domain.absent
        )
        .limit(100)
    )
    found = []
    for row in rows:
        if not _is_worked_on(row):
            job = _job(row)
            found += [(row, volume, job) for volume in row.volumes if "leaving" in volume]
    return found


def _left_domains() -> list[tuple[str, Job]]:
    """Return domains of deleted instances that have no tombstone."""
    rows = (
        Domain.select(Domain.id, Domain.instance_id)
        .join(Instance, on=(Instance.id == Domain.instance_id))
        .where(Instance.delete_time.is_null(False) & ~Domain.absent)
        .limit(100)
    )
    found = []
    for row in rows:
        instance = store.get_instance(row.instance_id)
        if not _is_worked_on(instance):
            found.append((row.id, _job(instance)))
    return found


def _gone_domains() -> list[tuple[Instance, str, Job]]:
    rows = (
        Domain.select(Domain)
        .join(Claim, on=(Claim.domain_id == Domain.id))
        .where(Domain.absent_time.is_null(False))
        .order_by(fn.RANDOM())  # so that nothing that cannot be done yet is in the way
        .limit(100)
    )
    found = []
    for row in rows:
        instance = store.get_instance(row.instance_id)
        if not _is_worked_on(instance):
            found.append((instance, row.id, _job(instance)))
    return found


def _left_reservations() -> list[tuple[Instance, Job]]:
    living = Domain.select(Domain.id).where(
        (Domain.instance_id == Instance.id) & Domain.absent_time.is_null()
    )
    held = Claim.select(Claim.domain_id).where(Claim.instance_id == Instance.id)
    going = Instance.delete_time.is_null(False) & (Instance.state != "DELETED")
    unbuilt = (Instance.state == "ERROR") & Instance.launch_time.is_null() & Instance.reserved
    rows = (
        Instance.select()
        .where((going | unbuilt) & ~fn.EXISTS(living) & ~fn.EXISTS(held))
        .order_by(fn.RANDOM())
        .limit(100)
    )
    return [(row, _job(row)) for row in rows if not _is_worked_on(row)]


def _is_worked_on(instance: Any) -> bool:
    table = shared.operation
    running = (table.resource_id == instance.id) & table.state.in_(("RUNNING", "UNDOING"))
    return bool(table.select().where(running).exists())


def _job(instance: Any) -> Job:
    """Return a job that acts for the instance's last operation, with its lease."""
    table = shared.operation
    last = (
        table.select()
        .where((table.resource_id == instance.id) & (table.workflow != ""))
        .order_by(table.create_time.desc())
        .first()
    )
    return Job(
        operation_id=last.id if last else "",
        resource_id=instance.id,
        project_id=instance.project_id,
        lease_number=last.lease_number if last else 0,
        attempt=1,
        deadline=None,
        data={},
    )


def _released(instance: Any) -> None:
    values: dict[str, Any] = {"reserved": False}
    if instance.delete_time is not None:
        values["state"] = "DELETED"
    store.set_instance(instance.id, **values)
    if instance.delete_time is not None:
        tables.changed("instance", instance.id, instance.project_id, "DELETED")
