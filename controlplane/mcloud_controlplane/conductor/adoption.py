"""After a restore: finds out what hosts have of the domains that the records name.

A restored domain is `unproven`, and nothing but its removal is asked of its host (store.py). Hosts
report everything when they meet the new epoch, and the instance follows what they say: a guest
that was stopped since the backup stays so. Then they are asked for a listing, and

- what is there is adopted: from then on it is desired as it is;
- of what is not there the instance ends in ERROR (DOMAIN_LOST): it was deleted after the backup,
  or lost. It is never built again behind its owner's back.

What is there and no row names is not touched; `mcloud admin verify` shows it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

import structlog

from mcloud.common.v1 import session_pb2
from mcloud_base import errors
from mcloud_controlplane.compute.model import Domain, Instance, locked, shared
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.host_listings import HostListings
from mcloud_controlplane.core import database, tables
from mcloud_controlplane.core.database import Database

log = structlog.get_logger()

_INTERVAL_S = 10.0
_PAUSE_S = 1.0  # between two rounds that changes have caused
# For how long a domain that is there is left until its agent reports it; one whose agent has lost
# its records never does.
_REPORT_S = 60.0
_PROOF = (session_pb2.Artifact.KIND_DOMAIN, session_pb2.Artifact.KIND_OVERLAY)


class Adopter:
    """Run `run` for as long as the conductor serves; where nothing was restored it only looks.

    Args:
        deadline_s: what operations that waited have from then on.
    """

    def __init__(self, opened: Database, listings: HostListings, deadline_s: float) -> None:
        self._database = opened
        self._listings = listings
        self._deadline_us = int(deadline_s * 1_000_000)
        self._listed: dict[str, float] = {}  # when an unreported domain was first seen; monotonic

    async def run(self) -> None:
        """Adopt as hosts connect."""
        with self._database.listening("host", "domain") as event:
            while True:
                event.clear()
                try:
                    await self.adopt()
                except errors.Error as error:
                    log.warning("adopting is tried again", reason=error.reason)
                await asyncio.sleep(_PAUSE_S)
                try:
                    async with asyncio.timeout(_INTERVAL_S):
                        await event.wait()
                except TimeoutError:
                    continue

    async def adopt(self) -> None:
        """Settle the unproven domains of every host that is connected."""
        hosts = await self._database.read(_hosts)
        await asyncio.gather(*map(self._adopt, hosts))

    async def _adopt(self, host_id: str) -> None:
        listings, _ = await self._listings.ask(host_id)
        if (artifacts := listings.get(host_id)) is None:
            return
        there = {artifact.owner_id for artifact in artifacts if artifact.kind in _PROOF}
        unreported = await self._database.read(_unreported, host_id, there)
        moment = time.monotonic()
        waiting = {
            id_ for id_ in unreported if moment - self._listed.setdefault(id_, moment) < _REPORT_S
        }
        await self._database.write(self._settle, host_id, there, waiting)

    def _settle(self, host_id: str, there: Collection[str], waiting: Collection[str]) -> None:
        rows = list(locked(_unproven().where(Domain.host_id == host_id).order_by(Domain.id)))
        for row in rows:
            if row.id in waiting:
                continue
            row.unproven = False
            if row.id not in there:
                _lose(row)
            row.save()
            tables.changed("domain", row.id, row.project_id)
            tables.wake_host(host_id)
            self._release_operations(row)
            log.info("restored domain", domain=row.id, host=host_id, found=row.id in there)

    def _release_operations(self, row: Any) -> None:
        """Let operations go on that have waited for the domain."""
        table = shared.operation
        held = (table.resource_id == row.instance_id) & (table.not_before == tables.HELD)
        deadline = database.now() + self._deadline_us
        if table.update(not_before=0, deadline=deadline).where(held).execute():
            tables.changed("operation", row.operation_id, row.project_id)
            tables.wake_runners(row.operation_id, row.project_id)


def _unproven() -> Any:
    return Domain.select().where(Domain.unproven & ~Domain.absent & Domain.absent_time.is_null())


def _hosts() -> list[str]:
    """Return the hosts that are connected and have something to prove."""
    rows = list(_unproven().select(Domain.host_id).distinct())
    if not rows:
        return []
    session = shared.host_session
    connected = {row.host_id for row in session.select(session.host_id).where(shared.connected())}
    return sorted(connected & {row.host_id for row in rows})


def _unreported(host_id: str, there: Collection[str]) -> list[str]:
    """Return the domains that are there and of which the host has not said how they are."""
    silent = _unproven().where((Domain.host_id == host_id) & (Domain.sequence == 0))
    return [row.id for row in silent if row.id in there]


def _lose(row: Any) -> None:
    """Note that a domain is gone, as if it had been removed, and why its instance has none."""
    moment = database.now()
    row.absent, row.state, row.absent_time = True, "ABSENT", moment
    row.generation += 1
    row.observed_generation = row.generation
    concerned = (Instance.id == row.instance_id) & (Instance.domain_id == row.id)
    instance = locked(Instance.select().where(concerned & Instance.delete_time.is_null())).first()
    if instance is not None:
        message = (
            f"the control plane was restored from a backup, and host {row.host_id} does not have "
            "the guest: it was deleted after the backup was taken, or lost; delete the instance"
        )
        fault = {"reason": "DOMAIN_LOST", "message": message, "time": moment}
        store.set_instance(instance.id, state="ERROR", power_state="SHUTOFF", fault=fault)
