"""How a volume comes to be, and how it goes: the two tables of steps and what they do.

Nothing is done here but in the database: a row says what the volume's host is to have, the host's
session delivers it, and the steps wait for what the host reports.
"""

from __future__ import annotations

from collections.abc import Callable

from mcloud.common.v1 import metadata_pb2
from mcloud.volume.v1 import volume_pb2
from mcloud_base import errors
from mcloud_controlplane.core import database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.workflow import Job, Step, Workflow
from mcloud_controlplane.volume import storage_store, volume_store
from mcloud_controlplane.volume.model import Volume, locked, shared

_WAIT_S = 120.0
_UNDO_WAIT_S = 30.0


class CreateVolume:
    """The steps. The volume's row was recorded with the operation."""

    def __init__(self, store: Database) -> None:
        self._database = store

    async def choose_host(self, job: Job) -> None:
        """1. Give the volume to the host with the least on it that has room.

        Raises:
            errors.Exhausted: NO_STORAGE.
        """
        await self._database.write(_choose_host, job)

    async def leave_host(self, job: Job) -> None:
        """Undo 1. Give the room back, unless something may be on the host."""
        await self._database.write(_leave_host, job)

    async def desire(self, job: Job) -> None:
        """2. Desire the volume on its host."""
        await self._database.write(_desire, job)

    async def remove(self, job: Job) -> None:
        """Undo 2. Bury it, and wait until its host says that it is gone.

        If the host is silent the tombstone stays, and holds the room, until it answers.
        """
        await self._database.write(_bury, job)
        try:
            await self._database.until(_seen_gone, job.resource_id, timeout_s=_UNDO_WAIT_S)
        except TimeoutError:
            job.detail = "held until its host answers"

    async def await_host(self, job: Job) -> None:
        """3. Wait until the host has it.

        Raises:
            errors.Unavailable: STORAGE_HOST_SILENT, STORAGE_HOST_FAILED.
            errors.Error: the host's own, where another try would not help.
        """
        await _until(self._database, _seen_created, job)

    def workflow(self) -> Workflow:
        """Return the table."""
        steps = (
            Step(1, "choose a storage host", "volume", self.choose_host, undo=self.leave_host),
            Step(2, "desire the volume", "volume", self.desire, undo=self.remove),
            Step(3, "make the volume", "agent", self.await_host, deadline_s=_WAIT_S),
        )
        return Workflow(volume_store.CREATE, steps, on_done=_created, on_failed=_not_created)


class DeleteVolume:
    """The steps. The tombstone was recorded with the operation."""

    def __init__(self, store: Database) -> None:
        self._database = store

    async def bury(self, job: Job) -> None:
        """1. Desire that the host removes it; forget at once what is on no host."""
        await self._database.write(_bury, job)

    async def await_host(self, job: Job) -> None:
        """2. Wait until the host says that it is gone.

        Raises:
            errors.Unavailable: STORAGE_HOST_SILENT; the tombstone stays until it answers.
        """
        await _until(self._database, _seen_gone, job)

    def workflow(self) -> Workflow:
        """Return the table."""
        steps = (
            Step(1, "bury the volume", "volume", self.bury),
            Step(2, "remove the volume", "agent", self.await_host, deadline_s=_WAIT_S),
        )
        return Workflow(volume_store.DELETE, steps, on_done=_deleted, on_failed=_not_deleted)


def workflows(store: Database) -> dict[str, Workflow]:
    """Return every workflow of the volume database."""
    tables = (CreateVolume(store).workflow(), DeleteVolume(store).workflow())
    return {table.name: table for table in tables}


async def _until(store: Database, seen: Callable[[str], bool | None], job: Job) -> None:
    """Wait for a host's report until the step's time is over."""
    timeout_s = _WAIT_S
    if job.deadline is not None:
        timeout_s = min(timeout_s, (job.deadline - database.now()) / 1e6)
    try:
        # A little less than the runner waits, whose error would not name the host.
        await store.until(seen, job.resource_id, timeout_s=max(timeout_s - 0.09, 0.05))
    except TimeoutError as error:
        raise await store.read(_why, job.resource_id) from error


# -- units -----------------------------------------------------------------------------------------


def _hold(job: Job) -> Volume | None:
    """Lock the volume, for as long as the operation is still this runner's.

    Raises:
        errors.Conflict: STALE_LEASE.
    """
    table = shared.operation
    mine = (table.id == job.operation_id) & (table.lease_number == job.lease_number)
    if locked(table.select(table.id).where(mine)).first() is None:
        raise errors.Conflict("STALE_LEASE", "another runner has taken over the operation")
    row: Volume | None = locked(Volume.select().where(Volume.id == job.resource_id)).first()
    return row


def _hold_living(job: Job) -> Volume:
    row = _hold(job)
    if row is None or row.delete_time is not None:
        raise _deleted_meanwhile(job.resource_id)
    return row


def _choose_host(job: Job) -> None:
    row = _hold_living(job)
    if not row.host_id:
        row.host_id = storage_store.choose(row.size_gib)
        volume_store.save(row)
    job.detail = row.host_id


def _leave_host(job: Job) -> None:
    row = _hold(job)
    if row is not None and row.host_id and not row.desired_generation:
        storage_store.forget(row)


def _desire(job: Job) -> None:
    row = _hold_living(job)
    if not row.desired_generation:
        row.desired_generation = 1
        volume_store.save(row)


def _bury(job: Job) -> None:
    row = _hold(job)
    if row is None:
        return
    if storage_store.is_gone(row):
        storage_store.forget(row)
    elif not row.absent:
        storage_store.bury(row)
        volume_store.save(row)


def _created(job: Job) -> None:
    row = _hold(job)
    if row is not None:
        if row.state == "CREATING":
            row.state = "AVAILABLE"
            volume_store.save(row)
        job.response = volume_store.message(row)


def _not_created(job: Job) -> None:
    row = _hold(job)
    if row is not None and row.delete_time is None:
        row.state = "ERROR"
        row.fault = job.error.message if job.error else ""
        volume_store.save(row)


def _deleted(job: Job) -> None:
    job.response = volume_pb2.Volume(
        metadata=metadata_pb2.ResourceMetadata(id=job.resource_id, project_id=job.project_id)
    )


def _not_deleted(job: Job) -> None:
    row = _hold(job)
    if row is not None:
        row.fault = f"held until host {row.host_id} answers"
        volume_store.save(row)


def _seen_created(id_: str) -> bool | None:
    row = Volume.find(id_)
    if row is None or row.delete_time is not None:
        raise _deleted_meanwhile(id_)
    error = storage_store.host_error(row)
    if error is not None and not isinstance(error, errors.Unavailable):
        raise error
    reached = error is None and row.observed_generation >= row.desired_generation
    return True if reached else None


def _seen_gone(id_: str) -> bool | None:
    row = Volume.find(id_)
    return True if row is None or storage_store.is_gone(row) else None


def _why(id_: str) -> errors.Error:
    row = Volume.find(id_)
    return _deleted_meanwhile(id_) if row is None else storage_store.why(row)


def _deleted_meanwhile(id_: str) -> errors.WrongState:
    return errors.WrongState("VOLUME_DELETED", f"volume {id_} was deleted meanwhile", id=id_)
