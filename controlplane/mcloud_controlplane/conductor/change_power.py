"""Start, stop and reboot: another desired state of the same domain.

compute has recorded in the instance what is wanted; one step tells the host and waits.
"""

from __future__ import annotations

from mcloud_controlplane.compute import instance_store
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.domains import Domains, left
from mcloud_controlplane.core import database
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.workflow import Job, Step, Workflow

_STATES = {"RUNNING": "ACTIVE", "SHUTOFF": "SHUTOFF", "PAUSED": "PAUSED", "CRASHED": "SHUTOFF"}
_TIMEOUT_S = 180.0


class ChangePower:
    """One step for the three verbs. `job.data` holds `domain_id` and `values` of the instance."""

    def __init__(self, opened: Database, domains: Domains) -> None:
        self._database = opened
        self._domains = domains

    async def apply(self, job: Job) -> None:
        """Tell the host, and wait until it has done it."""
        values = job.data["values"]
        generation = await self._database.write(store.desire, job, job.data["domain_id"], **values)
        state = values.get("power_state", "RUNNING")
        await self._domains.await_generation(
            job,
            job.data["domain_id"],
            generation,
            state=state,
            timeout_s=left(job, _TIMEOUT_S),
        )

    def succeed(self, job: Job) -> None:
        """Let the instance say what its domain does."""
        follow_domain(job)
        job.response = instance_store.get_message(job.resource_id)

    def workflows(self) -> list[Workflow]:
        """Return the three tables, of one step each."""
        return [
            Workflow(
                name,
                (Step(1, text, "agent", self.apply, deadline_s=_TIMEOUT_S + 10),),
                on_done=self.succeed,
                on_failed=follow_domain,
            )
            for name, text in (
                ("start_instance", "start the domain"),
                ("stop_instance", "stop the domain"),
                ("reboot_instance", "reboot the domain"),
            )
        ]


def follow_domain(job: Job) -> None:
    """Free the instance, in the state that its domain is in. Within a unit."""
    row = store.find_domain(store.get_instance(job.resource_id).domain_id)
    values: dict[str, object] = {}
    if row is not None and row.state in _STATES:
        values["state"] = _STATES[row.state]
    if job.error is not None:
        values["fault"] = {
            "reason": job.error.reason,
            "message": job.error.message,
            "time": database.now(),
        }
    store.end_operation(job, **values)
