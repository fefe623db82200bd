"""Serves VerifyService: compares the records of all services with each other and with the hosts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import verify_service_pb2, verify_service_pb2_grpc
from mcloud.image.v1 import image_service_pb2
from mcloud.network.v1 import port_service_pb2
from mcloud.volume.v1 import attachment_service_pb2
from mcloud_base import rpc
from mcloud_controlplane.compute.model import Claim, Domain, Host, Instance, shared
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.core import database, sessions
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database

Finding = verify_service_pb2.Finding
Artifact = session_pb2.Artifact

_RUNNING = ("RUNNING", "UNDOING")
_OVERDUE_US = 60_000_000
_CONFIRM_S = 2.0

# What of a host's belongs to which table of ours.
_OF_DOMAINS = (Artifact.KIND_DOMAIN, Artifact.KIND_OVERLAY, Artifact.KIND_CONFIG_DRIVE)
_OF_PORTS = (Artifact.KIND_TAP, Artifact.KIND_FILTER, Artifact.KIND_DHCP_ENTRY)


class VerifyServicer(verify_service_pb2_grpc.VerifyServiceServicer):
    """Finds what has no owner, and owners that lack their things."""

    def __init__(self, opened: Database, neighbours: Neighbours, hosts: sessions.Sessions) -> None:
        self._database = opened
        self._neighbours = neighbours
        self._hosts = hosts

    async def Verify(
        self, request: verify_service_pb2.VerifyRequest, context: Context
    ) -> AsyncIterator[verify_service_pb2.VerifyResponse]:
        """Check everything; findings, then the summary."""
        checked, findings, silent = await self._look(request.host_id)
        if findings:
            # What is on its way from one database or host to another is right the second time.
            await asyncio.sleep(_CONFIRM_S)
            checked, again, silent = await self._look(request.host_id)
            seen = {_key(finding) for finding in findings}
            findings = [finding for finding in again if _key(finding) in seen]
        for finding in findings:
            yield verify_service_pb2.VerifyResponse(finding=finding)
        yield verify_service_pb2.VerifyResponse(
            summary=verify_service_pb2.VerifySummary(
                checked_count=checked, finding_count=len(findings), silent_host_ids=silent
            )
        )

    async def _look(self, host_id: str) -> tuple[int, list[Finding], list[str]]:
        """Return how many things were looked at, what is wrong, and which hosts are silent."""
        # What others hold is read before our own rows: an owner that appears meanwhile is found.
        ports, attachments, uses = await asyncio.gather(
            self._all_ports(), self._all_attachments(), self._all_uses()
        )
        listings, silent = await self._listings(host_id)
        checked, findings = await self._database.read(
            _compare, ports, attachments, uses, listings, host_id
        )
        return checked, findings, silent

    async def _all_ports(self) -> list[Any]:
        async def page(after: str) -> list[Any]:
            request = port_service_pb2.ListOwnedPortsRequest(after_id=after)
            answer = await rpc.call(self._neighbours.ports.ListOwnedPorts, request)
            return list(answer.ports)

        return await _pages(page, lambda port: port.metadata.id)

    async def _all_attachments(self) -> list[Any]:
        async def page(after: str) -> list[Any]:
            request = attachment_service_pb2.ListInstanceAttachmentsRequest(after_id=after)
            answer = await rpc.call(self._neighbours.attachments.ListInstanceAttachments, request)
            return list(answer.attachments)

        return await _pages(page, lambda attachment: attachment.metadata.id)

    async def _all_uses(self) -> list[Any]:
        async def page(after: str) -> list[Any]:
            request = image_service_pb2.ListImageUsesRequest(after_instance_id=after)
            answer = await rpc.call(self._neighbours.images.ListImageUses, request)
            return list(answer.uses)

        return await _pages(page, lambda use: use.instance_id)

    async def _listings(
        self, host_id: str
    ) -> tuple[dict[str, list[session_pb2.Artifact]], list[str]]:
        wanted = [host_id] if host_id else await self._database.read(_living_hosts)
        answers = await asyncio.gather(*(self._hosts.list_artifacts(id_) for id_ in wanted))
        found = {
            id_: list(answer.artifacts)
            for id_, answer in zip(wanted, answers, strict=True)
            if answer is not None
        }
        return found, [id_ for id_ in wanted if id_ not in found]


async def _pages(
    page: Callable[[str], Awaitable[list[Any]]], key: Callable[[Any], str]
) -> list[Any]:
    rows: list[Any] = []
    while more := await page(key(rows[-1]) if rows else ""):
        rows += more
    return rows


def _key(finding: Finding) -> tuple[int, str, str, str]:
    return finding.kind, finding.subject, finding.owner_id, finding.host_id


def _living_hosts() -> list[str]:
    return [row.id for row in Host.select(Host.id).where(Host.delete_time.is_null())]


def _compare(
    ports: list[Any],
    attachments: list[Any],
    uses: list[Any],
    listings: dict[str, list[session_pb2.Artifact]],
    only_host: str,
) -> tuple[int, list[Finding]]:
    """Return how many things were looked at, and what is wrong. Within a unit."""
    findings: list[Finding] = []
    instances = {row.id: row for row in Instance.select().where(Instance.state != "DELETED")}
    domains = {row.id: row for row in Domain.select().where(Domain.absent_time.is_null())}
    claims = {row.domain_id: row for row in Claim.select()}
    checked = len(ports) + len(attachments) + len(uses) + len(domains) + len(claims)
    if not only_host:
        findings += _claims(claims, domains, instances)
        findings += _owners(ports, attachments, uses, instances)
        findings += _operations(instances)
    by_port = {port.metadata.id: port for port in ports}
    for host_id, artifacts in listings.items():
        checked += len(artifacts)
        findings += _host(host_id, artifacts, domains, by_port)
    return checked, findings


def _claims(
    claims: dict[str, Any], domains: dict[str, Any], instances: dict[str, Any]
) -> list[Finding]:
    # An operation that has seen a domain go gives its room back last.
    worked_on = {id_ for id_, row in instances.items() if row.operation_id}
    findings = [
        Finding(
            kind=Finding.KIND_CLAIM_WITHOUT_DOMAIN,
            subject=id_,
            owner_id=row.instance_id,
            host_id=row.host_id,
            detail="room is held for a domain that is gone",
        )
        for id_, row in claims.items()
        if id_ not in domains and row.instance_id not in worked_on
    ]
    findings += [
        Finding(
            kind=Finding.KIND_DOMAIN_WITHOUT_CLAIM,
            subject=id_,
            owner_id=row.instance_id,
            host_id=row.host_id,
            detail="a domain is placed without room held for it",
        )
        for id_, row in domains.items()
        if id_ not in claims and not row.absent
    ]
    return findings


def _owners(
    ports: list[Any], attachments: list[Any], uses: list[Any], instances: dict[str, Any]
) -> list[Finding]:
    # Before the first reservation this is noted, and again after the last is given back.
    holders = {id_: row for id_, row in instances.items() if row.reserved or row.operation_id}
    held_ports = {nic["port_id"] for row in holders.values() for nic in row.nics}
    held = {volume["attachment_id"] for row in holders.values() for volume in row.volumes}
    held |= _being_attached()
    findings = [
        Finding(
            kind=Finding.KIND_PORT_WITHOUT_INSTANCE,
            subject=port.metadata.id,
            owner_id=port.status.owner_id,
            detail="its instance is gone, or does not name it",
        )
        for port in ports
        if port.status.owner_type == "instance"
        and (port.metadata.id not in held_ports or port.status.owner_id not in holders)
    ]
    findings += [
        Finding(
            kind=Finding.KIND_ATTACHMENT_WITHOUT_INSTANCE,
            subject=attachment.metadata.id,
            owner_id=attachment.spec.instance_id,
            detail="its instance is gone, or does not name it",
        )
        for attachment in attachments
        if attachment.metadata.id not in held or attachment.spec.instance_id not in holders
    ]
    findings += [
        Finding(
            kind=Finding.KIND_IMAGE_USE_WITHOUT_INSTANCE,
            subject=use.image_id,
            owner_id=use.instance_id,
            detail="its instance is gone",
        )
        for use in uses
        if use.instance_id not in holders
    ]
    return findings


def _being_attached() -> set[str]:
    """Return the attachments that running operations are about to add or have just taken off."""
    table = shared.operation
    rows = table.select(table.job).where(table.state.in_(_RUNNING))

    jobs = [json.loads(row.job) for row in rows]
    return {job["volume"]["attachment_id"] for job in jobs if "volume" in job}


def _operations(instances: dict[str, Any]) -> list[Finding]:
    table = shared.operation
    moment = database.now()
    running = list(table.select().where(table.state.in_(_RUNNING)))
    findings = [
        Finding(
            kind=Finding.KIND_OPERATION_OVERDUE,
            subject=row.id,
            owner_id=row.resource_id,
            detail="its deadline is past and it has not ended",
        )
        for row in running
        if row.deadline is not None and row.deadline + _OVERDUE_US < moment
    ]
    alive = {row.id for row in running}
    findings += [
        Finding(
            kind=Finding.KIND_INSTANCE_WITHOUT_OPERATION,
            subject=row.id,
            detail=f"it is in {row.state}, and no operation works on it",
        )
        for row in instances.values()
        if (row.state in ("BUILD", "REBOOT") or row.operation_id) and row.operation_id not in alive
    ]
    return findings


def _host(
    host_id: str,
    artifacts: list[session_pb2.Artifact],
    domains: dict[str, Any],
    ports: dict[str, Any],
) -> list[Finding]:
    here = {id_: row for id_, row in domains.items() if row.host_id == host_id}
    bound = {id_ for id_, port in ports.items() if port.status.host_id == host_id}
    findings = []
    for artifact in artifacts:
        if artifact.kind in _OF_DOMAINS:
            known = artifact.owner_id in here
        elif artifact.kind in _OF_PORTS:
            known = artifact.owner_id in bound
        else:
            known = True  # networks, routers and volumes are their own services' to prove
        if not known:
            findings.append(
                Finding(
                    kind=Finding.KIND_UNKNOWN_ARTIFACT,
                    subject=artifact.name,
                    owner_id=artifact.owner_id,
                    host_id=host_id,
                    artifact_kind=artifact.kind,
                    detail="no row and no tombstone names it; it is left alone",
                )
            )
    present = {a.owner_id for a in artifacts if a.kind == Artifact.KIND_DOMAIN}
    findings += [
        Finding(
            kind=Finding.KIND_MISSING_ARTIFACT,
            subject=id_,
            owner_id=row.instance_id,
            host_id=host_id,
            artifact_kind=Artifact.KIND_DOMAIN,
            detail=f"the host reached generation {row.observed_generation}, and has it no more",
        )
        for id_, row in here.items()
        if row.observed_generation and not row.absent and id_ not in present
    ]
    return findings
