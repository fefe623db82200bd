"""A world whose control plane is a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import ports
from conftest import Cloud
from fakes.acts import ACTS
from fakes.daemon import THIS, Daemon
from flow import fault_cloud
from flow.fault_cloud import Operation
from flow.fault_world import World
from mcloud.compute.v1 import host_pb2
from mcloud_base import errors, ids, tls
from mcloud_controlplane.core import pki

SOON_S = 75.0  # the longest lease, and a look for what is free


class ProcessWorld(World):
    """What looks into databases or the runtime is not for it.

    Args:
        program: what runs the control plane.
    """

    def __init__(self, directory: Path, database: str, program: Sequence[str] = THIS) -> None:
        settings = fault_cloud.settings(directory, [ports.free(), ports.free()], database)
        super().__init__(settings)
        addresses = (settings.public_listen, settings.internal_listen)
        numbers = [int(address.rpartition(":")[2]) for address in addresses]
        self.daemon = Daemon(directory / "daemon", settings.state_dir, numbers, database)
        self.program = program

    async def start(self) -> None:
        self.daemon.start(self.program)
        self.cloud = Cloud(self.settings.public_listen, self.settings.state_dir)
        self.host = self._make_host()
        await self.host.__aenter__()
        await self.until(self._host_is_up)
        await self._furnish()

    async def stop(self) -> None:
        await self.host.__aexit__()
        await self.cloud.channel.close()
        self.daemon.stop()

    def host_identity(self, host_id: str = "") -> tuple[tls.Identity, str]:
        authority, key = self.daemon.plane.authority(), tls.new_key()
        host_id = host_id or ids.new("h")
        signed = authority.issue_host(tls.signing_request(key, host_id), host_id, "127.0.0.1")
        return tls.Identity(key, pki._pem(signed), authority.certificate), host_id

    @asynccontextmanager
    async def creating(self) -> AsyncIterator[Operation]:
        """An instance whose host cannot start it until the end of the block."""
        await self.prepare("create_instance")
        await self.until(lambda: self.host_is(host_pb2.HostStatus.STATE_UP), SOON_S)
        self.agent_saboteur.visited.clear()
        self.agent_saboteur.plan["16", "before"] = (errors.Unavailable("NOT_YET", "not yet"), -1)
        try:
            operation = await self.begin("create_instance")
            await self.until(self._is_waiting)
            yield operation
        finally:
            self.agent_saboteur.plan.clear()

    async def _is_waiting(self) -> bool:
        return ("16", "before") in self.agent_saboteur.visited

    async def host_is(self, state: host_pb2.HostStatus.State.ValueType) -> bool:
        (found,) = (await self.call("compute.HostService/ListHosts", system=True)).hosts
        return bool(found.status.state == state)

    async def has_come_to(self, name: str) -> bool:
        return await self.state(ACTS[name]) in ACTS[name].ends

    def boots(self) -> list[int]:
        return [guest.boot_count for guest in self.host.driver.guests.values()]

    async def ends_well(self, operation: Operation) -> None:
        """A creation ends, its guest was started once, and whatever comes next is not held up."""
        ended = await self.ended(operation)
        assert ended.state == Operation.STATE_SUCCEEDED, ended
        assert self.boots() == [1]
        numbers = [(step.number, step.attempt) for step in ended.steps]
        assert len(set(numbers)) == len(numbers)
        await self.until(lambda: self.host_is(host_pb2.HostStatus.STATE_UP), SOON_S)
        for name in ("stop_instance", "start_instance", "delete_instance"):
            ended = await self.ended(await self.begin(name))
            assert ended.state == Operation.STATE_SUCCEEDED, ended
            # UNKNOWN until the host has renewed its lease.
            await self.until(lambda name=name: self.has_come_to(name), SOON_S)  # type: ignore[misc]
        await self.require_verified()
