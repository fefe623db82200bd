"""Attaching a volume to an instance, and detaching it, whether the guest runs or not."""

from __future__ import annotations

from typing import Any

from mcloud_controlplane.compute import instance_store
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.change_power import follow_domain
from mcloud_controlplane.conductor.domains import Domains
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.workflow import Job, Step, Workflow

_TIMEOUT_S = 120.0


class ChangeVolume:
    """The steps. `job.data` holds `domain_id` and `volume`: ids, device, delete_with_instance."""

    def __init__(self, opened: Database, neighbours: Neighbours, domains: Domains) -> None:
        self._database = opened
        self._neighbours = neighbours
        self._domains = domains

    async def reserve(self, job: Job) -> None:
        """Reserve the volume."""
        volume = job.data["volume"]
        await self._neighbours.ensure_attachment(
            job,
            volume["attachment_id"],
            volume["volume_id"],
            delete_with_instance=volume["delete_with_instance"],
        )

    async def release(self, job: Job) -> None:
        """Give the volume back, and retire the attachment's id."""
        await self._neighbours.release_attachments(job, [job.data["volume"]["attachment_id"]])

    async def add_disk(self, job: Job) -> None:
        """Desire the domain with the disk, and wait for it."""
        await self._apply(job, job.operation_id, with_disk=True)

    async def remove_disk(self, job: Job) -> None:
        """Desire the domain without the disk, wait, then cut the connection."""
        await self._apply(job, f"{job.operation_id}/remove", with_disk=False)
        await self._neighbours.disconnect(
            job, job.data["domain_id"], job.data["volume"]["attachment_id"]
        )

    async def _apply(self, job: Job, key: str, *, with_disk: bool) -> None:
        def change() -> int:
            instance = store.get_instance(job.resource_id)
            volumes = _without(instance.volumes, job.data["volume"])
            if with_disk:
                volumes.append(job.data["volume"])
            return store.desire(job.data["domain_id"], key, volumes=volumes)

        generation = await self._database.write(change)
        await self._domains.await_generation(
            job, job.data["domain_id"], generation, timeout_s=_TIMEOUT_S
        )

    def succeed(self, job: Job) -> None:
        """Free the instance."""
        follow_domain(job)
        job.response = instance_store.get_message(job.resource_id)

    def workflows(self) -> list[Workflow]:
        """Return the two tables."""
        wait = _TIMEOUT_S + 30
        attach = (
            Step(1, "reserve the volume", "volume", self.reserve, undo=self.release),
            Step(2, "add the disk", "agent", self.add_disk, undo=self.remove_disk, deadline_s=wait),
        )
        detach = (
            Step(1, "remove the disk", "agent", self.remove_disk, deadline_s=wait),
            Step(2, "give the volume back", "volume", self.release),
        )
        return [
            Workflow(name, steps, on_done=self.succeed, on_failed=follow_domain)
            for name, steps in (("attach_volume", attach), ("detach_volume", detach))
        ]


def _without(volumes: list[dict[str, Any]], volume: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in volumes if item["attachment_id"] != volume["attachment_id"]]
