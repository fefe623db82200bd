"""A whole cloud in this process, with one host, that tests make fail at chosen moments."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from google.protobuf import duration_pb2

from conftest import Cloud
from fakes import inventory
from fakes.light_host import LightHost
from mcloud.common.v1 import operation_pb2
from mcloud.conductor.v1 import verify_service_pb2
from mcloud_base import errors, ids, rpc, tls
from mcloud_controlplane.__main__ import serve
from mcloud_controlplane.compute import model as compute_model
from mcloud_controlplane.core import pki, tables, workflow
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.image import model as image_model
from mcloud_controlplane.network import model as network_model
from mcloud_controlplane.settings import Settings
from mcloud_controlplane.volume import model as volume_model

Operation = operation_pb2.Operation
Place = tuple[str, int, str, str]  # ("create_instance", 1, "undo", "before")
Deed = Callable[[str], Awaitable[None]]  # takes the operation's id; may raise what a step may
DEADLINE_S = 90.0
_MODELS: dict[str, Any] = {
    "compute": compute_model,
    "network": network_model,
    "volume": volume_model,
    "image": image_model,
}


@dataclass
class Saboteur:
    """The probe of every runner: notes each place, and does what was planned for it, once."""

    plan: dict[Place, Deed] = field(default_factory=dict)
    visited: list[Place] = field(default_factory=list)

    async def __call__(self, name: str, index: int, act: str, moment: str) -> None:
        place = (name, index, act, moment)
        self.visited.append(place)
        if deed := self.plan.pop(place, None):
            # The runner binds it for the log; a probe is told only of the table.
            await deed(structlog.contextvars.get_contextvars()["op"])


@dataclass
class AgentSaboteur:
    """The same for the steps of the agent; each deed as often as its number says, or always."""

    plan: dict[tuple[str, str], tuple[errors.Error, int]] = field(default_factory=dict)
    visited: set[tuple[str, str]] = field(default_factory=set)

    async def __call__(self, step: str, moment: str) -> None:
        place = (step, moment)
        self.visited.add(place)
        if place in self.plan:
            error, times = self.plan[place]
            if times:
                self.plan[place] = (error, times - 1)
                raise error


class FaultCloud:
    """Control plane, host, and what a test asks and does to them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.saboteur, self.agent_saboteur = Saboteur(), AgentSaboteur()

    async def start(self) -> None:
        self.runtime = await serve(self.settings, probe=self.saboteur)
        self.tables = self.runtime.workflows()
        self.cloud = Cloud(self.settings.public_listen, self.settings.state_dir)
        self.host = self._make_host()
        await self.host.__aenter__()
        await self.until(self._host_is_up)

    async def stop(self) -> None:
        await self.host.__aexit__()
        await self.cloud.channel.close()
        await self.runtime.stop(0)

    def database(self, name: str) -> Database:
        return self.runtime.database(name, _MODELS[name].open_database)

    def shared(self, name: str) -> tables.Tables:
        found: tables.Tables = _MODELS[name].shared
        return found

    def _make_host(self) -> LightHost:
        return LightHost(
            self.settings.state_dir.parent / "host",
            self.settings.internal_listen,
            *self.host_identity(),
            probe=self.agent_saboteur,
        )

    def host_identity(self, host_id: str = "") -> tuple[tls.Identity, str]:
        """Return the certificate of a host, as enrolling it gives."""
        authority, key = self.runtime.authority, tls.new_key()
        host_id = host_id or ids.new("h")
        signed = authority.issue_host(tls.signing_request(key, host_id), host_id, "127.0.0.1")
        return tls.Identity(key, pki._pem(signed), authority.certificate), host_id

    @asynccontextmanager
    async def another_runner(self, service: str) -> AsyncIterator[None]:
        """Have another runner of a database's operations, as a second control plane has."""
        opened = self.database(service)
        (mine,) = (each for each in self.runtime.runners if each._database is opened)
        other = workflow.Runner(
            opened, self.shared(service), mine.workflows, probe=self.saboteur, host_name="other"
        )
        running = asyncio.create_task(other.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def expire_lease(self, operation_id: str) -> None:
        """Have another runner take an operation at once, as if its runner had fallen silent."""
        service = service_of(operation_id)
        table = self.shared(service).operation

        def expire() -> None:
            table.update(lease_expire_time=0).where(table.id == operation_id).execute()
            tables.wake_runners(operation_id, "")

        await self.database(service).write(expire)

    async def hand_over(self, operation_id: str) -> None:
        """Expire a lease until another runner has taken it: the one that has it may renew it."""
        table = self.shared(service_of(operation_id)).operation
        database = self.database(service_of(operation_id))

        def number() -> int:
            return int(table.get_by_id(operation_id).lease_number)

        before = await database.read(number)
        async with asyncio.timeout(DEADLINE_S):
            while await database.read(number) == before:
                await self.expire_lease(operation_id)
                await asyncio.sleep(0.05)

    async def call(self, method: str, *, system: bool = False, **fields: Any) -> Any:
        """Call "compute.InstanceService/GetInstance" with the request's fields."""
        stub, request = self.method(method, **fields)
        return await self.cloud.call(stub, request, system=system)

    def method(self, method: str, **fields: Any) -> tuple[Any, Any]:
        """Return a method of a stub, and its request."""
        package, _, rest = method.partition(".")
        service, _, name = rest.partition("/")
        file = "".join(f"_{c.lower()}" if c.isupper() else c for c in service).lstrip("_")
        module = f"mcloud.{package}.v1.{file}"
        stub = getattr(importlib.import_module(f"{module}_pb2_grpc"), f"{service}Stub")
        methods = importlib.import_module(f"{module}_pb2").DESCRIPTOR.services_by_name[service]
        request = methods.methods_by_name[name].input_type._concrete_class(**fields)
        return getattr(stub(self.cloud.channel), name), request

    async def mutate(self, method: str, *, system: bool = False, **fields: Any) -> Operation:
        fields["request_id"] = ids.request_id()
        operation: Operation = await self.call(method, system=system, **fields)
        return operation

    async def ended(self, operation: Operation | str) -> Operation:
        """Wait for an operation's end."""
        id_ = operation if isinstance(operation, str) else operation.id
        service = service_of(id_)
        stub, request = self.method(f"{service}.OperationService/WaitOperation", id=id_)
        request.timeout.CopyFrom(duration_pb2.Duration(seconds=int(DEADLINE_S)))
        ended: Operation = await self.cloud.call(
            stub, request, system=True, timeout_s=DEADLINE_S + 10
        )
        assert ended.state not in (Operation.STATE_RUNNING, Operation.STATE_UNDOING), ended
        return ended

    async def operation(self, id_: str) -> Operation:
        method = f"{service_of(id_)}.OperationService/GetOperation"
        found: Operation = await self.call(method, system=True, id=id_)
        return found

    async def last_operation(self, method: str) -> Operation:
        """Return the newest one of a method of instances."""
        answer = await self.call(
            "compute.OperationService/ListOperations",
            filter=f'method="mcloud.compute.v1.InstanceService/{method}"',
            page_size=1,
        )
        found: Operation = answer.operations[0]
        return found

    async def until(self, look: Callable[[], Awaitable[Any]], timeout_s: float = 60) -> Any:
        """Look again after whatever changes in any database, until something is found."""
        async with asyncio.timeout(timeout_s):
            while not (found := await look()):
                await asyncio.sleep(0.02)  # it may depend on several databases and on the host
            return found

    async def until_connected(self) -> None:
        """Wait until the host's sessions, which a test has taken from it, are its own again."""

        async def connected() -> bool:
            for name in ("compute", "network", "volume"):
                query = f"SELECT incarnation FROM host_session WHERE host_id = '{self.host.id}'"
                rows = await self.database(name).read(self._rows, name, query)
                if rows != [(1,)] or not all(each.connected for each in self.host.sessions):
                    return False
            return True

        await self.until(connected)

    async def _host_is_up(self) -> bool:
        hosts = (await self.call("compute.HostService/ListHosts", system=True)).hosts
        return bool(hosts) and all(session.connected for session in self.host.sessions)

    async def inventory(self) -> set[str]:
        """Return everything that instances and volumes leave traces of, a line each."""
        found = set()
        for name, queries in inventory.ROWS.items():
            for what, query in queries.items():
                rows = await self.database(name).read(self._rows, name, query)
                found |= {f"{name} {what} {' '.join(map(str, row))}" for row in rows}
        return found | self.host.inventory(await self.host.driver.list())

    def _rows(self, name: str, query: str) -> list[tuple[Any, ...]]:
        cursor: Any = self.database(name).peewee.execute_sql(query)
        return list(cursor.fetchall())

    async def is_reached(self) -> bool:
        """Tell whether the host has done all that is desired of its domains."""
        query = (
            "SELECT id FROM domain WHERE absent_time IS NULL AND observed_generation < generation"
        )
        return not await self.database("compute").read(self._rows, "compute", query)

    async def deadlocks(self) -> list[str]:
        """Return what PostgreSQL says of those that it has had to resolve, in any database."""
        query = "SELECT pg_read_file('../log')"
        rows = await self.database("compute").read(self._rows, "compute", query)
        _, *found = str(rows[0][0]).split("deadlock detected")
        return ["\n".join(each.splitlines()[:12]) for each in found]

    async def require_verified(self) -> None:
        """VerifyService finds nothing wrong, and the host was asked."""
        stub, request = self.method("conductor.VerifyService/Verify")
        metadata = rpc.bearer(await self.cloud.token(system=True))
        findings, summary = [], verify_service_pb2.VerifySummary()
        async for answer in rpc.received(stub(request, metadata=tuple(metadata), timeout=60)):
            if answer.HasField("finding"):
                findings.append(answer.finding)
            else:
                summary = answer.summary
        assert not findings, findings
        assert not summary.silent_host_ids


def service_of(operation_id: str) -> str:
    """Return whose an operation is."""
    return {"cop": "compute", "vop": "volume"}[operation_id.partition("-")[0]]


def settings(directory: Path, ports: list[int], database: str) -> Settings:
    """Return the settings of a world."""
    return Settings(
        state_dir=directory / "cp",
        public_listen=f"127.0.0.1:{ports[0]}",
        internal_listen=f"127.0.0.1:{ports[1]}",
        database=database,
        verify_confirm_s=0.1,  # nothing is slow here
    )
