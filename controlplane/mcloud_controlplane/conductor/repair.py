"""Mends what verify finds, through the operations that the services have for it.

A repair is an operation like any other: who asked for it and when stand in its row, what it did in
its response. Its plan is made of the findings before it begins, so that a dry run, which is the
same plan without the operation, says exactly what is done. Mending is repeatable, and everything
looks again whether it is needed: what has changed since is left.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace

import structlog

from mcloud.common.v1 import invariant_pb2, session_pb2
from mcloud.conductor.v1 import verify_service_pb2
from mcloud.network.v1 import invariant_service_pb2 as network_pb2
from mcloud.volume.v1 import invariant_service_pb2 as volume_pb2
from mcloud_base import errors, rpc
from mcloud_controlplane.compute.model import shared
from mcloud_controlplane.conductor import repair_store, store, verify_hosts
from mcloud_controlplane.conductor.domains import Domains
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.conductor.picture import Finding
from mcloud_controlplane.core import contract, invariants
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.invariants import Invariant
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.core.workflow import Job, Step, Workflow

log = structlog.get_logger()

Repair = verify_service_pb2.Repair
Report = verify_service_pb2.RepairReport
Artifact = session_pb2.Artifact

WORKFLOW = "repair"
_LIMIT = 1000  # findings mended by one operation
_AT_ONCE = 10
_DEADLINE_S = 600.0
_CALL_S = 20
_HOST_S = 60.0  # for a host to do what it is told

# What is mended first: rows before what is decided by them.
_ORDER = (
    Finding.KIND_OPERATION_OVERDUE,
    Finding.KIND_INSTANCE_WITHOUT_OPERATION,
    Finding.KIND_DOMAIN_WITHOUT_INSTANCE,
    Finding.KIND_CLAIM_WITHOUT_DOMAIN,
)


def select(
    findings: Sequence[Finding], kinds: Collection[int], resources: Collection[str]
) -> list[Finding]:
    """Return the findings of some kinds (empty: all) about some resources (empty: all)."""
    return [
        finding
        for finding in findings
        if (not kinds or finding.kind in kinds)
        and (not resources or {finding.subject, finding.owner_id} & set(resources))
    ]


def plan(
    findings: Sequence[Finding], silent: Sequence[str], request: verify_service_pb2.RepairRequest
) -> Report:
    """Return what is to be done about findings, in the order of doing it."""
    chosen = select(findings, request.kinds, request.resources)
    chosen.sort(key=lambda finding: _ORDER.index(finding.kind) if finding.kind in _ORDER else 99)
    report = Report(silent_host_ids=silent)
    for finding in chosen[:_LIMIT]:
        mendable = finding.repair and (request.resources or not finding.must_be_named)
        state = Repair.STATE_PLANNED if mendable else Repair.STATE_LEFT
        report.repairs.add(finding=finding, state=state)
    return report


def record(
    report: Report,
) -> Callable[[Mutation, verify_service_pb2.RepairRequest], Report | None]:
    """Return the unit that leaves a plan to the workflow, or answers with it."""

    def unit(work: Mutation, request: verify_service_pb2.RepairRequest) -> Report | None:
        table = shared.operation
        running = (table.workflow == WORKFLOW) & table.state.in_(invariants.RUNNING)
        other = table.select(table.id).where(running).first()
        if other is not None:
            raise errors.Conflict(
                "REPAIR_IN_PROGRESS",
                f"operation {other.id} repairs; wait for it: mcloud operation wait {other.id}",
                operation_id=other.id,
            )
        if request.validate_only or not _planned(report):
            return report
        job = {"report": base64.b64encode(report.SerializeToString()).decode()}
        work.start(WORKFLOW, json.dumps(job), deadline_s=_DEADLINE_S)
        return None

    return unit


def _planned(report: Report) -> list[Repair]:
    return [each for each in report.repairs if each.state == Repair.STATE_PLANNED]


class Mender:
    """Knows how each kind is mended. Every method tells whether there was something to mend.

    Args:
        own: what the compute database proves of itself.
    """

    def __init__(
        self,
        opened: Database,
        neighbours: Neighbours,
        domains: Domains,
        own: Collection[Invariant],
    ) -> None:
        self._database = opened
        self._neighbours = neighbours
        self._domains = domains
        self._own = own
        self._mends: dict[int, Callable[[Job, Finding], Awaitable[bool]]] = {
            Finding.KIND_CLAIM_WITHOUT_DOMAIN: self.release_claim,
            Finding.KIND_CLAIM_DIFFERS: self._hold_claim,
            Finding.KIND_DOMAIN_WITHOUT_CLAIM: self._hold_claim,
            Finding.KIND_DOMAIN_WITHOUT_INSTANCE: self._remove_domain,
            Finding.KIND_INSTANCE_WITHOUT_OPERATION: self._free_instance,
            Finding.KIND_PORT_WITHOUT_INSTANCE: self.release_port,
            Finding.KIND_PORT_BOUND_TO_NO_DOMAIN: self._unbind_port,
            Finding.KIND_ATTACHMENT_WITHOUT_INSTANCE: self.release_attachment,
            Finding.KIND_ATTACHMENT_CONNECTED_TO_NO_DOMAIN: self._disconnect,
            Finding.KIND_IMAGE_USE_WITHOUT_INSTANCE: self.release_image_use,
            Finding.KIND_INSTANCE_WITHOUT_ATTACHMENT: self._forget_volume,
            Finding.KIND_INSTANCE_WITHOUT_IMAGE_USE: self._record_use,
            Finding.KIND_DATAPLANE_BEHIND: self._refresh_dataplane,
            Finding.KIND_UNKNOWN_ARTIFACT: self._remove_artifact,
            Finding.KIND_MISSING_ARTIFACT: self._make_artifact,
        }

    async def mend(self, job: Job, finding: Finding) -> bool:
        """Mend one finding.

        Raises:
            errors.Error: it could not be mended now.
        """
        if finding.kind in self._mends:
            return await self._mends[finding.kind](job, finding)
        violation = invariant_pb2.Violation(
            kind=contract.enum_name(finding.kind, Finding.Kind),
            subject=finding.subject,
            owner_id=finding.owner_id,
            host_id=finding.host_id,
        )
        if not finding.service:
            return await self._database.write(invariants.mend, self._own, violation)
        request = invariant_pb2.MendViolationRequest(
            violation=violation, lease_number=job.lease_number
        )
        stub = self._neighbours.invariants[finding.service]
        answer = await rpc.call(stub.MendViolation, request, timeout_s=_CALL_S)
        return not answer.already_kept

    # --- what the sweeper does, too -------------------------------------------------------------

    async def release_claim(self, job: Job, finding: Finding) -> bool:
        """Give back the room of a domain that is gone, and what is bound for it."""
        if not await self._database.read(repair_store.has_claim, finding.subject):
            return False
        instance = await self._database.read(repair_store.find_instance, finding.owner_id)
        if instance is not None:
            await self._domains.release(job, instance, finding.subject)
        else:
            await self._database.write(store.release_claim, job, finding.subject)
        return True

    async def release_port(self, job: Job, finding: Finding) -> bool:
        """End the reservation of a port."""
        if await self._database.read(repair_store.is_worked_on, finding.owner_id):
            return False
        nic = {"port_id": finding.subject}
        if finding.domain_id:
            await self._neighbours.unbind(job, finding.domain_id, [nic], [])
        await self._neighbours.release_ports(replace(job, resource_id=finding.owner_id), [nic])
        return True

    async def release_attachment(self, job: Job, finding: Finding) -> bool:
        """Give a volume back; it is kept."""
        if await self._database.read(repair_store.is_worked_on, finding.owner_id):
            return False
        if finding.domain_id:
            await self._neighbours.disconnect(job, finding.domain_id, finding.subject)
        await self._neighbours.release_attachments(job, [finding.subject])
        return True

    async def release_image_use(self, job: Job, finding: Finding) -> bool:
        """Forget the use of an image."""
        if await self._database.read(repair_store.is_worked_on, finding.owner_id):
            return False
        of_instance = replace(job, resource_id=finding.owner_id)
        await self._neighbours.release_image_use(of_instance, finding.subject)
        return True

    # --- rows -----------------------------------------------------------------------------------

    async def _hold_claim(self, job: Job, finding: Finding) -> bool:
        return await self._database.write(repair_store.hold_claim, job, finding.subject)

    async def _free_instance(self, job: Job, finding: Finding) -> bool:
        return await self._database.write(repair_store.free_instance, job, finding.subject)

    async def _remove_domain(self, job: Job, finding: Finding) -> bool:
        await self._database.write(store.desire_absent, job, finding.subject)
        await self._await_absent(finding.subject, finding.host_id)
        instance = await self._database.read(repair_store.find_instance, finding.owner_id)
        if instance is not None:
            await self._domains.release(job, instance, finding.subject)
        else:
            await self._database.write(store.release_claim, job, finding.subject)
        return True

    async def _unbind_port(self, job: Job, finding: Finding) -> bool:
        await self._neighbours.unbind(job, finding.owner_id, [{"port_id": finding.subject}], [])
        return True

    async def _disconnect(self, job: Job, finding: Finding) -> bool:
        await self._neighbours.disconnect(job, finding.owner_id, finding.subject)
        return True

    async def _forget_volume(self, job: Job, finding: Finding) -> bool:
        return await self._database.write(repair_store.forget_volume, job, finding)

    async def _record_use(self, job: Job, finding: Finding) -> bool:
        row = await self._database.read(repair_store.find_instance, finding.subject)
        if row is None or row.delete_time is not None:
            return False
        of_instance = replace(job, resource_id=row.id, project_id=row.project_id)
        await self._neighbours.ensure_image_use(of_instance, finding.owner_id)
        return True

    # --- hosts ----------------------------------------------------------------------------------

    async def _refresh_dataplane(self, job: Job, finding: Finding) -> bool:
        request = network_pb2.RefreshHostDataplaneRequest(
            host_id=finding.host_id, generation=finding.generation
        )
        stub = self._neighbours.network_invariants
        await rpc.call(stub.RefreshHostDataplane, request, timeout_s=_CALL_S)
        return True

    async def _remove_artifact(self, job: Job, finding: Finding) -> bool:
        kind = finding.artifact_kind
        if kind in verify_hosts.OF_DOMAINS:
            await self._database.write(repair_store.bury_unknown, job, finding)
            await self._await_absent(finding.owner_id, finding.host_id)
            return True
        if kind == Artifact.KIND_VOLUME:
            request = volume_pb2.BuryUnknownVolumeRequest(
                volume_id=finding.owner_id,
                host_id=finding.host_id,
                generation=finding.generation,
            )
            stub = self._neighbours.volume_invariants
            await rpc.call(stub.BuryUnknownVolume, request, timeout_s=_CALL_S)
            return True
        if kind == Artifact.KIND_EXPORT:
            return await self._refresh_volume(finding.owner_id, finding.generation)
        if kind == Artifact.KIND_DISK:
            domain_id = finding.subject.partition("/")[0]
            return await self._database.write(repair_store.desire_again, job, domain_id)
        return await self._refresh_dataplane(job, finding)

    async def _make_artifact(self, job: Job, finding: Finding) -> bool:
        if finding.artifact_kind == Artifact.KIND_EXPORT:
            return await self._refresh_volume(finding.subject, finding.generation)
        on_disk = finding.artifact_kind == Artifact.KIND_DISK
        domain_id = finding.owner_id if on_disk else finding.subject
        return await self._database.write(repair_store.desire_again, job, domain_id)

    async def _refresh_volume(self, volume_id: str, generation: int) -> bool:
        request = volume_pb2.RefreshStoredVolumeRequest(volume_id=volume_id, generation=generation)
        stub = self._neighbours.volume_invariants
        await rpc.call(stub.RefreshStoredVolume, request, timeout_s=_CALL_S)
        return True

    async def _await_absent(self, domain_id: str, host_id: str) -> None:
        try:
            await self._database.until(
                lambda: repair_store.is_absent(domain_id), timeout_s=_HOST_S, types=("domain",)
            )
        except TimeoutError as error:
            raise errors.DeadlineExceeded(
                "HOST_SILENT",
                f"host {host_id} did not remove it within {_HOST_S:.0f} s; its tombstone stays",
                host=host_id,
            ) from error


class RepairFindings:
    """The workflow: one step, that only goes forward. `job.data` holds the `report`."""

    def __init__(self, mender: Mender) -> None:
        self._mender = mender

    async def mend(self, job: Job) -> None:
        """1. Mend what is planned; what cannot be mended is not in the way of the rest."""
        report = _report(job)
        slots = asyncio.Semaphore(_AT_ONCE)
        for kind in dict.fromkeys(each.finding.kind for each in report.repairs):
            of_kind = [each for each in _planned(report) if each.finding.kind == kind]
            await asyncio.gather(*(self._mend(job, each, slots) for each in of_kind))
        job.data["report"] = base64.b64encode(report.SerializeToString()).decode()
        done = sum(each.state == Repair.STATE_DONE for each in report.repairs)
        job.detail = f"{done} of {len(report.repairs)} mended"

    async def _mend(self, job: Job, repair: Repair, slots: asyncio.Semaphore) -> None:
        finding = repair.finding
        async with slots:
            try:
                mended = await self._mender.mend(job, finding)
            except errors.Error as error:
                repair.state, repair.error = Repair.STATE_FAILED, str(error)
                log.warning("not repaired", subject=finding.subject, reason=error.reason)
                return
        repair.state = Repair.STATE_DONE if mended else Repair.STATE_NOT_NEEDED
        kind = contract.enum_name(finding.kind, Finding.Kind)
        log.info("repaired", kind=kind, subject=finding.subject, host=finding.host_id)

    def succeed(self, job: Job) -> None:
        """Answer with what was done."""
        job.response = _report(job)

    def workflow(self) -> Workflow:
        """Return the table."""
        step = Step(1, "mend what was found", "conductor", self.mend, deadline_s=_DEADLINE_S)
        return Workflow(WORKFLOW, (step,), on_done=self.succeed, on_failed=lambda job: None)


def _report(job: Job) -> Report:
    return Report.FromString(base64.b64decode(job.data["report"]))
