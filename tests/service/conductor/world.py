"""A cloud with one instance that is in order; and what lets tests break and mend it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from mcloud.common.v1 import operation_pb2, session_pb2
from mcloud.compute.v1 import operation_service_pb2_grpc
from mcloud.conductor.v1 import verify_service_pb2, verify_service_pb2_grpc
from mcloud_base import ids, rpc
from mcloud_controlplane.compute import model as compute
from mcloud_controlplane.core import schema
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.identity import model as identity
from mcloud_controlplane.image import model as image
from mcloud_controlplane.network import model as network
from mcloud_controlplane.settings import Settings
from mcloud_controlplane.volume import model as volume
from service.compute.host import Host
from service.compute.instances import Instances
from service.core.cloud import Client, ControlPlane, unpack, wait
from service.core.keys import new_project

Finding = verify_service_pb2.Finding
Repair = verify_service_pb2.Repair
Report = verify_service_pb2.RepairReport
Operation = operation_pb2.Operation
Key = tuple[str, str]  # kind, subject

_MODELS = {
    "compute": compute, "identity": identity, "image": image, "network": network, "volume": volume,
}  # fmt: skip


class World:
    """Use `async with`."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.client = Client(plane)
        self.instances = Instances(self.client)
        self.host = Host(self.client, new_project(), vcpu_count=64)
        self.host.eager = True
        self._stack = AsyncExitStack()
        self._opened: dict[str, Database] = {}

    async def __aenter__(self) -> World:
        settings = Settings(state_dir=self.plane.state_dir, database=self.plane.database)
        for name, model in _MODELS.items():
            opened = schema.connect(settings.database_url(name), model.database, model.shared)
            self._opened[name] = opened
            self._stack.callback(opened.close)
        self._stack.push_async_callback(self.client.close)
        await self.instances.prepare()
        await self._stack.enter_async_context(self.host)
        ended = await self.create("in-order")
        self.instance_id = ended.resource.id
        self.domain_id = (await self.row("compute", compute.Instance, self.instance_id)).domain_id
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def create(self, name: str) -> Operation:
        ended = await self.instances.wait(await self.instances.create(name))
        assert ended.state == Operation.STATE_SUCCEEDED, ended.error
        return ended

    # --- behind the control plane's back --------------------------------------------------------

    async def write(self, name: str, unit: Any) -> Any:
        """Run a unit that logs no change: nobody hears of what it does."""
        return await self._opened[name].write(unit)

    async def insert(self, name: str, model: Any, /, **values: Any) -> str:
        """Insert a row; return its id."""
        if "create_time" in model._meta.fields and "update_time" in model._meta.fields:
            moment = self._opened[name].now()
            values = {"create_time": moment, "update_time": moment, **values}
        await self.write(name, lambda: model.insert(**values).execute())
        return str(values.get("id", ""))

    async def update(self, name: str, model: Any, condition: Any, **values: Any) -> None:
        await self.write(name, lambda: model.update(**values).where(condition).execute())

    async def delete(self, name: str, model: Any, condition: Any) -> None:
        await self.write(name, lambda: model.delete().where(condition).execute())

    def now(self, name: str) -> int:
        return self._opened[name].now()

    async def row(self, name: str, model: Any, id_: str) -> Any:
        return await self._opened[name].read(model.get_by_id, id_)

    async def count(self, name: str, model: Any, condition: Any) -> int:
        return int(await self._opened[name].read(model.select().where(condition).count))

    # --- asking ---------------------------------------------------------------------------------

    async def verify(self, **what: Any) -> list[Finding]:
        findings, summary = await self.verify_all(**what)
        assert not summary.silent_host_ids, summary
        return findings

    async def verify_all(
        self, client: Client | None = None, **what: Any
    ) -> tuple[list[Finding], verify_service_pb2.VerifySummary]:
        client = client or self.client
        stub = verify_service_pb2_grpc.VerifyServiceStub(client.public)
        request = verify_service_pb2.VerifyRequest(**what)
        who = await client.login()
        findings = []
        async for answer in rpc.received(stub.Verify(request, metadata=tuple(who), timeout=120)):
            if answer.HasField("finding"):
                findings.append(answer.finding)
            else:
                assert answer.summary.finding_count == len(findings)
                return findings, answer.summary
        raise AssertionError("no summary")

    async def plan(self, **what: Any) -> Report:
        """Return what a repair would do."""
        dry = await self._repair(validate_only=True, **what)
        assert not dry.id
        return unpack(dry, Report)

    async def repair(self, **what: Any) -> Report:
        """Repair to the end; the operation says who asked for it and what was done."""
        begun = await self._repair(**what)
        operations = operation_service_pb2_grpc.OperationServiceStub(self.client.public)
        ended = await wait(operations, begun.id, await self.client.login())
        assert ended.state == Operation.STATE_SUCCEEDED, ended.error
        assert ended.caller_id
        assert ended.method == "mcloud.conductor.v1.VerifyService/Repair"
        return unpack(ended, Report)

    async def _repair(self, **what: Any) -> Operation:
        stub = verify_service_pb2_grpc.VerifyServiceStub(self.client.public)
        request = verify_service_pb2.RepairRequest(**{"request_id": ids.request_id(), **what})
        who = await self.client.login()
        begun: Operation = await rpc.call(stub.Repair, request, metadata=who, timeout_s=60)
        return begun


def keys(findings: Any) -> set[Key]:
    """Return what was found; of each only once."""
    found = [(kind(each), each.subject) for each in findings]
    assert len(found) == len(set(found)), found
    return set(found)


def kind(finding: Finding) -> str:
    return Finding.Kind.Name(finding.kind).removeprefix("KIND_")


def states(report: Report) -> dict[Key, str]:
    return {
        (kind(each.finding), each.finding.subject): Repair.State.Name(each.state).removeprefix(
            "STATE_"
        )
        for each in report.repairs
    }


Artifact = session_pb2.Artifact
