"""Goes on where an operation had to end because a host was silent, once it has answered.

It looks only at rows: domains that their hosts have reported absent and that still hold room, and
instances that are deleted, or were never built, and still have reservations but no domain.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from peewee import fn

from mcloud_base import errors
from mcloud_controlplane.compute.model import Claim, Domain, Instance, shared
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.create_instance import release_reservations
from mcloud_controlplane.conductor.domains import Domains
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.workflow import Job

log = structlog.get_logger()

_INTERVAL_S = 10.0


class Reclaimer:
    """Run `run` for as long as the conductor serves."""

    def __init__(self, opened: Database, neighbours: Neighbours, domains: Domains) -> None:
        self._database = opened
        self._neighbours = neighbours
        self._domains = domains

    async def run(self) -> None:
        """Reclaim what there is, now and then and when something changed."""
        while True:
            try:
                await self.reclaim()
            except errors.Error as error:
                log.warning("reclaiming is tried again", reason=error.reason)
            await asyncio.sleep(_INTERVAL_S)

    async def reclaim(self) -> None:
        """Reclaim everything that can be."""
        for instance, domain_id, job in await self._database.read(_gone_domains):
            await self._domains.release(job, instance, domain_id)
        for instance, job in await self._database.read(_left_reservations):
            await release_reservations(self._neighbours, job, instance)
            await self._database.write(_released, instance)
            log.info("reservations reclaimed", instance=instance.id)


def _gone_domains() -> list[tuple[Any, str, Job]]:
    rows = (
        Domain.select(Domain)
        .join(Claim, on=(Claim.domain_id == Domain.id))
        .where(Domain.absent_time.is_null(False))
        .limit(100)
    )
    found = []
    for row in rows:
        instance = store.get_instance(row.instance_id)
        if not _is_worked_on(instance):
            found.append((instance, row.id, _job(instance)))
    return found


def _left_reservations() -> list[tuple[Any, Job]]:
    living = Domain.select(Domain.id).where(
        (Domain.instance_id == Instance.id) & Domain.absent_time.is_null()
    )
    over = Instance.delete_time.is_null(False) | (
        (Instance.state == "ERROR") & Instance.launch_time.is_null()
    )
    rows = Instance.select().where(Instance.reserved & over & ~fn.EXISTS(living)).limit(100)
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
