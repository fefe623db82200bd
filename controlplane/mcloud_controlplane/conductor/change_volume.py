"""Attaching a volume to an instance, and detaching it, whether the guest runs or not."""

from __future__ import annotations

from mcloud_base import errors
from mcloud_controlplane.compute import instance_store
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.change_power import follow_domain
from mcloud_controlplane.conductor.domains import Domains, HostSilent, left
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
        if job.data.get("held"):
            return  # the host is silent: the reclaimer does it when it has answered
        volume = job.data["volume"]
        await self._neighbours.release_attachments(job, [volume["attachment_id"]])
        await self._database.write(store.drop_volume, job, volume)

    async def add_disk(self, job: Job) -> None:
        """Desire the domain with the disk, and wait for it."""
        generation = await self._database.write(store.add_volume, job, job.data["volume"])
        await self._await(job, generation, share=0.5)

    async def take_disk_back(self, job: Job) -> None:
        """Undo add_disk."""
        try:
            await self.remove_disk(job)
        except HostSilent as error:
            job.data["held"] = job.detail = error.message
        except errors.WrongState as error:
            if error.reason != "DOMAIN_ABSENT":
                raise
            job.data["held"] = job.detail = error.message  # whoever removes the domain goes on

    async def remove_disk(self, job: Job) -> None:
        """Desire the domain without the disk, wait, then cut the connection."""
        volume = job.data["volume"]
        generation = await self._database.write(store.remove_volume, job, volume)
        await self._await(job, generation)
        await self._neighbours.disconnect(job, job.data["domain_id"], volume["attachment_id"])

    async def _await(self, job: Job, generation: int, *, share: float = 1.0) -> None:
        await self._domains.await_generation(
            job,
            job.data["domain_id"],
            generation,
            timeout_s=left(job, _TIMEOUT_S, share=share),
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
            Step(
                2, "add the disk", "agent", self.add_disk, undo=self.take_disk_back, deadline_s=wait
            ),
        )
        detach = (
            Step(1, "remove the disk", "agent", self.remove_disk, deadline_s=wait),
            Step(2, "give the volume back", "volume", self.release),
        )
        return [
            Workflow(name, steps, on_done=self.succeed, on_failed=follow_domain)
            for name, steps in (("attach_volume", attach), ("detach_volume", detach))
        ]
