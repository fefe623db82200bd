"""Serves VerifyService: proves the invariants of the whole cloud, and has them mended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

from mcloud.common.v1 import operation_pb2
from mcloud.conductor.v1 import verify_service_pb2, verify_service_pb2_grpc
from mcloud_controlplane.conductor import (
    picture,
    repair,
    verify_hosts,
    verify_owners,
    verify_records,
)
from mcloud_controlplane.conductor.host_listings import HostListings
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.conductor.picture import Finding, Others
from mcloud_controlplane.core import contract, invariants
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.invariants import Invariant, Violation
from mcloud_controlplane.core.mutation import Frame

Look = tuple[int, list[Finding], list[str]]


class VerifyServicer(verify_service_pb2_grpc.VerifyServiceServicer):
    """Finds what has no owner, and owners that lack their things.

    Args:
        own: what the compute database proves of itself (core/invariants.py).
        confirm_s: for how long a finding must stand.
    """

    def __init__(
        self,
        opened: Database,
        frame: Frame,
        neighbours: Neighbours,
        hosts: HostListings,
        own: Collection[Invariant],
        confirm_s: float,
    ) -> None:
        self._database = opened
        self._frame = frame
        self._neighbours = neighbours
        self._hosts = hosts
        self._own = own
        self._confirm_s = confirm_s

    async def Verify(
        self, request: verify_service_pb2.VerifyRequest, context: Context
    ) -> AsyncIterator[verify_service_pb2.VerifyResponse]:
        """Check everything; findings, then the summary."""
        checked, findings, silent = await self._confirmed(request.host_id)
        findings = repair.select(findings, request.kinds, request.resources)
        for finding in findings:
            yield verify_service_pb2.VerifyResponse(finding=finding)
        yield verify_service_pb2.VerifyResponse(
            summary=verify_service_pb2.VerifySummary(
                checked_count=checked, finding_count=len(findings), silent_host_ids=silent
            )
        )

    async def Repair(
        self, request: verify_service_pb2.RepairRequest, context: Context
    ) -> operation_pb2.Operation:
        """Look, then leave the mending of what was found to a workflow."""
        _, findings, silent = await self._confirmed(request.host_id)
        report = repair.plan(findings, silent, request)
        return await self._frame.mutate(request, repair.record(report))

    async def _confirmed(self, host_id: str) -> Look:
        """Look until what is found was found twice."""
        checked, findings, silent = await self._look(host_id)
        if findings:
            # What is on its way from one database or host to another is right the second time.
            await asyncio.sleep(self._confirm_s)
            checked, again, silent = await self._look(host_id)
            seen = {_key(finding) for finding in findings}
            findings = [finding for finding in again if _key(finding) in seen]
        return checked, findings, silent

    async def _look(self, host_id: str) -> Look:
        """Return how many things were looked at, what is wrong, and which hosts are silent."""
        others = await picture.others(self._neighbours, self._hosts, host_id)
        count, findings = await self._database.read(self._compare, others, host_id)
        return others.checked + count, findings, others.silent

    def _compare(self, others: Others, host_id: str) -> tuple[int, list[Finding]]:
        """Return how many rows of our own were looked at, and all that is wrong. A unit."""
        rows = picture.rows()
        findings = list(verify_hosts.find(others, rows, host_id))
        if not host_id:
            findings += verify_records.find(rows)
            findings += verify_owners.find(others, rows)
            findings += (_of_service(*each) for each in others.violations)
            findings += (_of_service("", each) for each in invariants.violations(self._own))
        return len(rows.domains) + len(rows.claims) + len(rows.instances), findings


def _of_service(service: str, violation: Violation) -> Finding:
    return Finding(
        kind=contract.enum_value(violation.kind, Finding.Kind),
        service=service,
        subject=violation.subject,
        owner_id=violation.owner_id,
        host_id=violation.host_id,
        detail=violation.detail,
        repair=violation.repair,
    )


def _key(finding: Finding) -> tuple[int, int, str, str, str]:
    return (
        finding.kind,
        finding.artifact_kind,
        finding.subject,
        finding.owner_id,
        finding.host_id,
    )
