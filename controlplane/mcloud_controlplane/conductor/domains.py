"""What several workflows do with a domain: wait for its host, remove it, give back what it held."""

from __future__ import annotations

from typing import Any

from mcloud_base import errors
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.neighbours import Neighbours
from mcloud_controlplane.core import database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.workflow import Job

REMOVE_S = 120.0
# Reasons by which the volume service says that a volume's host does not let go of it.
STORAGE_SILENT = ("STORAGE_HOST_SILENT", "STORAGE_HOST_FAILED")
_ROUND_S = 1.0  # between the end of a wait and that of the operation
_LEAST_S = 3.0  # that a host is given also by an operation which is late


class Domains:
    """Bound to the compute database and the other services."""

    def __init__(self, opened: Database, neighbours: Neighbours) -> None:
        self._database = opened
        self._neighbours = neighbours

    async def await_generation(
        self, job: Job, domain_id: str, generation: int, *, state: str = "", timeout_s: float
    ) -> None:
        """Wait until the host has reached a generation, and the domain is in a state.

        Raises:
            errors.Error: what the host says that keeps it from it, unless that may pass.
            errors.DeadlineExceeded: HOST_SILENT.
        """

        def look() -> errors.Error | bool | None:
            row = store.find_progress(domain_id)
            if row is None or row.absent:
                return errors.WrongState("DOMAIN_ABSENT", "the domain has been removed meanwhile")
            error = store.domain_error(row)
            if error is not None and row.observed_generation < generation:
                return None if isinstance(error, errors.Unavailable) else error
            if row.observed_generation >= generation and state in ("", row.state):
                return True
            return None

        await self._until(domain_id, look, timeout_s)

    async def remove(
        self, job: Job, instance: Any, domain_id: str, *, timeout_s: float = REMOVE_S
    ) -> None:
        """Have a domain removed by its host and give back what belongs to it.

        Repeatable; also where the claim was never made: its id is retired, so that it never will.

        Raises:
            errors.DeadlineExceeded: HOST_SILENT. Everything stays held until the host answers; the
                reclaimer then goes on.
        """
        await self._database.write(store.desire_absent, job, domain_id)

        def look() -> errors.Error | bool | None:
            current = store.find_progress(domain_id)
            return True if current is None or current.absent_time is not None else None

        await self._until(domain_id, look, timeout_s)
        await self.release(job, instance, domain_id)

    async def release(self, job: Job, instance: Any, domain_id: str) -> None:
        """Give back what belongs to a domain that its host has reported absent."""
        await self._neighbours.unbind(job, domain_id, instance.nics, instance.volumes)
        await self._database.write(store.release_claim, job, domain_id)

    async def _until(self, domain_id: str, look: Any, timeout_s: float) -> None:
        try:
            found = await self._database.until(
                look, timeout_s=timeout_s, types=("domain",), id_=domain_id
            )
        except TimeoutError as error:
            row = await self._database.read_few(store.find_domain, domain_id)
            last = store.domain_error(row) if row is not None else None
            why = f"; its last word: {last.message}" if last else ""
            raise HostSilent(
                "HOST_SILENT",
                f"host {row.host_id if row else ''} did not do it within {timeout_s:.0f} s{why}; "
                "what belongs to the domain is held until it answers",
                host=row.host_id if row else "",
            ) from error
        if isinstance(found, errors.Error):
            raise found


def is_overdue(job: Job) -> bool:
    """Tell whether the operation should have ended."""
    return job.deadline is not None and job.deadline < database.now()


def left(job: Job, longest_s: float, *, share: float = 1.0) -> float:
    """Return for how long a step may wait for a host.

    Args:
        share: of what is left to the job; a step that has an undo leaves some to it.
    """
    if job.deadline is None:
        return longest_s
    left_s = (job.deadline - database.now()) / 1e6 * share
    return min(max(left_s - _ROUND_S, _LEAST_S), longest_s)


class HostSilent(errors.Error):
    """A host did not answer in time. Not tried again by the runner: the wait was the trying."""

    code = errors.DeadlineExceeded.code
