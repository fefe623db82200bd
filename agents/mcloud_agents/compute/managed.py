"""A domain in the agent's memory: its record, the work on it, and what was last seen of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from google.rpc import status_pb2

from mcloud.common.v1 import session_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud_agents.compute.driver import Domain, State
from mcloud_agents.compute.record import Record
from mcloud_agents.compute.steps import StepLog


class Managed:
    """One domain that the control plane has named."""

    def __init__(self, record: Record, host_name: str) -> None:
        self.record = record
        self.steps = StepLog(host_name, changed=lambda: None)
        for row in record.steps:
            self.steps.rows[row.attempt, row.number] = row
        self.domain: Domain | None = None  # as last seen
        self.error: status_pb2.Status | None = None  # of the last attempt
        self.task: asyncio.Task[None] | None = None
        self.recovery: asyncio.Task[None] | None = None
        self.telling: asyncio.TimerHandle | None = None  # of what has changed since the last report
        self.busy = False  # an attempt is under way
        self.serial = 0  # counts the attempts that have ended
        self.documents: Mapping[str, bytes] | None = None  # made when first asked for

    def state(self) -> State.ValueType:
        """Return what it is doing."""
        if self.record.gone:
            return State.STATE_ABSENT
        return self.domain.state if self.domain else State.STATE_PREPARING

    def observed(self) -> session_pb2.Observed:
        """Return the report of how it is; the session sets the sequence."""
        record, domain = self.record, self.domain
        status = domain_pb2.DomainStatus(
            state=self.state(),
            reason=domain.reason if domain else "",
            instance_id=record.instance_id,
            steps=self.steps.listing(),
            desired_generation=record.generation,
            boot_number=domain.identity.boot_number if domain and domain.identity else 0,
        )
        observed = session_pb2.Observed(
            id=record.domain_id,
            epoch=record.epoch,
            generation=record.reached,
            absent=record.gone,
            error=self.error,
        )
        observed.status.Pack(status)
        return observed
