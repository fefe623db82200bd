"""How an instance goes. The name and the quota were free when the operation was accepted.

It has no undo: it only goes forward. If the host is silent, the operation ends in an error at its
deadline, everything on the host stays held, and the reclaimer goes on once it has answered.
"""

from __future__ import annotations

from typing import Any

from mcloud_controlplane.compute import instance_store
from mcloud_controlplane.compute.model import shared
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.create_instance import fail_instance, release_reservations
from mcloud_controlplane.conductor.domains import REMOVE_S, Domains, left
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.workflow import Job, Step, Workflow

_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")


class DeleteInstance:
    """The steps. `job.data` holds `domain_id` and `preempted`, the operation to wait for."""

    def __init__(self, opened: Database, neighbours: Neighbours, domains: Domains) -> None:
        self._database = opened
        self._neighbours = neighbours
        self._domains = domains

    async def await_preempted(self, job: Job) -> None:
        """1. Wait until the operation that was in the way has been undone."""
        other = job.data.get("preempted")
        if not other:
            job.skip("no operation was in the way")
            return
        await self._database.until(
            lambda: _has_ended(other),
            timeout_s=left(job, REMOVE_S * 2, share=0.5),
            types=("end",),
            id_=other,
        )

    async def remove_domain(self, job: Job) -> None:
        """2. Have the host remove the domain, then give back what belonged to it."""
        instance = await self._database.read_few(store.get_instance, job.resource_id)
        job.known["instance"] = instance  # nothing else works on it any more
        domain_id = instance.domain_id or job.data.get("domain_id")
        if not domain_id:
            job.skip("it was on no host")
            return
        await self._domains.remove(job, instance, domain_id, timeout_s=left(job, REMOVE_S))

    async def release(self, job: Job) -> None:
        """3. Give back what was reserved: ports, attachments, the use of the image."""
        instance: Any = job.known.get("instance")
        if instance is None:  # another process has removed the domain
            instance = await self._database.read_few(store.get_instance, job.resource_id)
        await release_reservations(self._neighbours, job, instance)

    def succeed(self, job: Job) -> None:
        """Mark the instance DELETED."""
        job.response = instance_store.messages([store.end_instance(job.resource_id)])[0]

    def fail(self, job: Job) -> None:
        """Leave the rest to the reclaimer."""
        fail_instance(job)

    def workflow(self) -> Workflow:
        """Return the table of steps."""
        return Workflow(
            "delete_instance",
            (
                Step(1, "wait for the operation in the way", "conductor", self.await_preempted,
                     deadline_s=REMOVE_S * 2 + 5),
                Step(2, "remove the domain", "agent", self.remove_domain, deadline_s=REMOVE_S + 30),
                Step(3, "give back", "conductor", self.release, deadline_s=120),
            ),
            on_done=self.succeed,
            on_failed=self.fail,
        )  # fmt: skip


def _has_ended(operation_id: str) -> bool | None:
    row = shared.operation.find(operation_id)
    return True if row is None or row.state in _ENDED else None
