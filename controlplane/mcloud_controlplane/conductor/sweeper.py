"""Gives back by itself what is provably nobody's; what needs judgement is left to verify.

Provably: the instance that it is held for is DELETED, or not known at all, and was made so long ago
(its id says when) that nothing of it can be on its way. Ids are never given out twice, so such an
instance never comes back. One process at a time sweeps, a page of each kind a tick, so that a tick
costs the same however much there is.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

import structlog
from peewee import fn

from mcloud.image.v1 import image_service_pb2
from mcloud.network.v1 import port_service_pb2
from mcloud.volume.v1 import attachment_service_pb2
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.compute.model import Claim, Domain, Instance, shared
from mcloud_controlplane.conductor import host_listings, repair_store
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.conductor.picture import Finding
from mcloud_controlplane.conductor.repair import Mender
from mcloud_controlplane.core import database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.leases import Lease
from mcloud_controlplane.core.workflow import Job
from mcloud_controlplane.settings import Settings

log = structlog.get_logger()

_TIMEOUT_S = 20
_LEAST_LEASE_S = 120.0
_LIMIT = 200  # mended of a kind in a tick

Mend = Callable[[Job, Finding], Awaitable[bool]]


class Sweeper:
    """Run `run` for as long as the conductor serves."""

    def __init__(
        self, opened: Database, neighbours: Neighbours, mender: Mender, settings: Settings
    ) -> None:
        self._database = opened
        self._neighbours = neighbours
        self._mender = mender
        self._interval_s = settings.sweep_interval_s
        self._after_us = int(settings.sweep_after_s * 1_000_000)
        self._lease = Lease(shared, "sweeper", max(settings.sweep_interval_s * 3, _LEAST_LEASE_S))
        self._after: dict[str, str] = {}  # by kind: the last id that was looked at
        self._swept: Counter[str] = Counter()  # since the start, for the log

    async def run(self) -> None:
        """Sweep now and then, for ever."""
        try:
            while True:
                await asyncio.sleep(self._interval_s * random.uniform(0.7, 1.3))  # noqa: S311
                try:
                    await self.sweep()
                except errors.Error as error:
                    log.warning("sweeping is tried again", reason=error.reason)
        finally:
            with suppress(errors.Error):  # it runs out all the same
                await self._database.write(self._lease.give_up)

    async def sweep(self) -> None:
        """Look at a page of each kind, if it is this process's turn."""
        if not await self._database.write(self._lease.take):
            return
        await self._database.write(host_listings.forget_old)
        claims = await self._database.read(_orphan_claims, self._after_us)
        await self._mend("claims", claims, self._mender.release_claim)
        await self._mend("ports", await self._ports(), self._mender.release_port)
        attachments = await self._attachments()
        await self._mend("attachments", attachments, self._mender.release_attachment)
        await self._mend("image uses", await self._uses(), self._mender.release_image_use)

    async def _mend(self, kind: str, findings: Iterable[Finding], mend: Mend) -> None:
        for finding in list(findings)[:_LIMIT]:
            # Higher than of any operation that has ended; none that runs works on what is gone.
            job = Job("", finding.owner_id, "", self._database.now(), 1, None, {})
            try:
                if await mend(job, finding):
                    self._swept[kind] += 1
                    log.info(
                        "swept",
                        kind=kind,
                        subject=finding.subject,
                        owner=finding.owner_id,
                        total=self._swept[kind],
                    )
            except errors.Error as error:
                log.warning("not swept", subject=finding.subject, reason=error.reason)

    async def _ports(self) -> list[Finding]:
        request = port_service_pb2.ListOwnedPortsRequest(after_id=self._after.get("port", ""))
        answer = await rpc.call(
            self._neighbours.ports.ListOwnedPorts, request, timeout_s=_TIMEOUT_S
        )
        self._turn("port", answer.ports, lambda port: port.metadata.id)
        gone = await self._gone(port.status.owner_id for port in answer.ports)
        return [
            Finding(
                subject=port.metadata.id,
                owner_id=port.status.owner_id,
                domain_id=port.status.domain_id,
            )
            for port in answer.ports
            if port.status.owner_id in gone
        ]

    async def _attachments(self) -> list[Finding]:
        request = attachment_service_pb2.ListInstanceAttachmentsRequest(
            after_id=self._after.get("attachment", "")
        )
        answer = await rpc.call(
            self._neighbours.attachments.ListInstanceAttachments, request, timeout_s=_TIMEOUT_S
        )
        self._turn("attachment", answer.attachments, lambda each: each.metadata.id)
        gone = await self._gone(each.spec.instance_id for each in answer.attachments)
        return [
            Finding(
                subject=each.metadata.id,
                owner_id=each.spec.instance_id,
                domain_id=each.status.domain_id,
            )
            for each in answer.attachments
            if each.spec.instance_id in gone
        ]

    async def _uses(self) -> list[Finding]:
        request = image_service_pb2.ListImageUsesRequest(
            after_instance_id=self._after.get("use", "")
        )
        answer = await rpc.call(
            self._neighbours.images.ListImageUses, request, timeout_s=_TIMEOUT_S
        )
        self._turn("use", answer.uses, lambda use: use.instance_id)
        gone = await self._gone(use.instance_id for use in answer.uses)
        return [
            Finding(subject=use.image_id, owner_id=use.instance_id)
            for use in answer.uses
            if use.instance_id in gone
        ]

    def _turn(self, kind: str, page: Any, key: Callable[[Any], str]) -> None:
        """Note where the next tick goes on; after the last page at the beginning."""
        self._after[kind] = key(page[-1]) if page else ""

    async def _gone(self, instance_ids: Iterable[str]) -> set[str]:
        return await self._database.read(_gone, set(instance_ids), self._after_us)


def _gone(instance_ids: set[str], after_us: int) -> set[str]:
    """Return the instances that are nobody's any more, for long enough. Within a unit."""
    before = database.now() - after_us
    query = Instance.select(Instance.id, Instance.state, Instance.update_time)
    known = {row.id: row for row in query.where(Instance.id.in_(list(instance_ids)))}
    gone = set()
    for id_ in instance_ids:
        row = known.get(id_)
        if row is None:
            old = ids.is_id(id_, "i") and ids.time_of(id_) < before
        else:
            old = row.state == "DELETED" and row.update_time < before
        if old and not repair_store.is_worked_on(id_):
            gone.add(id_)
    return gone


def _orphan_claims(after_us: int) -> list[Finding]:
    """Return claims of domains of which there is no row; of others the reclaimer sees to it."""
    domain = Domain.select(Domain.id).where(Domain.id == Claim.domain_id)
    old = Claim.create_time < database.now() - after_us
    rows = list(Claim.select().where(old & ~fn.EXISTS(domain)).limit(_LIMIT))
    gone = _gone({row.instance_id for row in rows}, after_us)
    return [
        Finding(subject=row.domain_id, owner_id=row.instance_id, host_id=row.host_id)
        for row in rows
        if row.instance_id in gone
    ]
