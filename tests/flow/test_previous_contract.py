"""An agent and a client of the last release work with this one's control plane.

Both speak the contract that the last release committed, protos/baseline.binpb: their messages are
made from it, and nothing of this tree's contract is in them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.contract_image import Contract
from fakes.daemon import Daemon
from mcloud_base import errors, ids, rpc
from service.core.cloud import Client

DEADLINE_S = 60


@pytest.fixture
async def client(tmp_path: Path, free_ports: Callable[[int], list[int]]) -> AsyncIterator[Client]:
    daemon = Daemon(tmp_path / "cp", tmp_path / "cp" / "state", free_ports(2), "sqlite")
    try:
        await asyncio.to_thread(daemon.start)
        made = daemon.client()
        yield made
        await made.close()
        await asyncio.to_thread(daemon.stop)
    finally:
        daemon.kill()


class OldClient:
    """A program of the last release, logged in with the first password."""

    def __init__(self, contract: Contract, client: Client) -> None:
        self.contract = contract
        self._channel = client.public
        self._password = (client.plane.state_dir / "admin-password").read_text().strip()
        self._who: dict[bool, rpc.Metadata] = {}

    async def call(self, method: str, *, system: bool = False, **fields: Any) -> Any:
        send, request = self.contract.method(self._channel, method)
        if "request_id" in request.DESCRIPTOR.fields_by_name:
            fields.setdefault("request_id", ids.request_id())
        return await rpc.call(send, request(**fields), metadata=await self.login(system))

    def stream(self, method: str, requests: Any, who: rpc.Metadata) -> Any:
        send, _ = self.contract.method(self._channel, method)
        return send(requests, metadata=who, timeout=DEADLINE_S)

    async def login(self, system: bool = False) -> rpc.Metadata:
        if system not in self._who:
            send, request = self.contract.method(
                self._channel, "identity.v1.TokenService/CreateToken"
            )
            message = request(project="" if system else "default", system=system)
            message.password.user_name, message.password.password = "admin", self._password
            self._who[system] = rpc.bearer((await rpc.call(send, message)).token)
        return self._who[system]

    async def ended(self, operation: Any) -> Any:
        found = await self.call("compute.v1.OperationService/WaitOperation", id=operation.id)
        states = self.contract.message("common.v1.Operation").DESCRIPTOR.enum_types_by_name["State"]
        assert states.values_by_number[found.state].name == "STATE_SUCCEEDED", found.error
        return found


class OldAgent:
    """An agent of the last release, with one guest at most and nothing behind it."""

    def __init__(self, contract: Contract, client: Client) -> None:
        self.id = ids.new("h")
        self._contract = contract
        self._channel = client.as_host(self.id)
        self._out: asyncio.Queue[Any] = asyncio.Queue()
        self._sequence = 0
        self.specs: list[Any] = []
        self.acknowledged = asyncio.Event()
        self.reported = asyncio.Event()

    async def report(self) -> None:
        send, request = self._contract.method(
            self._channel, "scheduler.v1.HostReportService/ReportHost"
        )
        room = self._contract.message(
            "scheduler.v1.Resources", vcpu_count=4, memory_mib=4096, disk_gib=40
        )

        async def reports() -> AsyncIterator[Any]:
            yield request(
                incarnation=1, sequence=1, name="old", cpu_arch="x86_64",
                underlay_ip="127.0.0.1", total=room,
            )  # fmt: skip
            await asyncio.Event().wait()

        async for _ in rpc.received(send(reports())):
            self.reported.set()

    async def serve(self) -> None:
        hello = self._contract.message(
            "common.v1.Hello", incarnation=1, boot_id="b", agent_version="0.0"
        )
        hello.clock.GetCurrentTime()
        self._say(hello=hello)

        async def requests() -> AsyncIterator[Any]:
            while True:
                yield await self._out.get()

        send, _ = self._contract.method(self._channel, "conductor.v1.SessionService/OpenSession")
        async for message in rpc.received(send(requests())):
            match message.WhichOneof("message"):
                case "desired":
                    await self._obey(message.desired)
                case "acknowledgement":
                    self.acknowledged.set()

    async def _obey(self, desired: Any) -> None:
        state = "STATE_ABSENT"
        if not desired.absent:
            wanted = self._contract.message("conductor.v1.DomainDesired")
            assert desired.spec.Unpack(wanted)
            send, request = self._contract.method(
                self._channel, "conductor.v1.DomainService/GetDomainSpec"
            )
            spec = await rpc.call(send, request(domain_id=desired.id, epoch=desired.epoch))
            assert (spec.generation, spec.instance_id) == (desired.generation, wanted.instance_id)
            assert spec.delegated_token
            self.specs.append(spec)
            state = "STATE_RUNNING"
        self._sequence += 1
        observed = self._contract.message(
            "common.v1.Observed", id=desired.id, epoch=desired.epoch,
            generation=desired.generation, sequence=self._sequence, absent=desired.absent,
        )  # fmt: skip
        number = self._contract.value("conductor.v1.DomainStatus.State", state)
        observed.status.Pack(self._contract.message("conductor.v1.DomainStatus", state=number))
        self._say(observed=observed)

    def _say(self, **fields: Any) -> None:
        self._out.put_nowait(self._contract.message("common.v1.SessionRequest", **fields))


async def upload(old: OldClient) -> str:
    """Make an image; return its id."""
    contract, content = old.contract, bytes(1 << 16)
    raw = contract.value("image.v1.DiskFormat", "DISK_FORMAT_RAW")
    spec = contract.message("image.v1.ImageSpec", disk_format=raw)
    made = await old.call("image.v1.ImageService/CreateImage", name="zeros", spec=spec)
    id_ = made.resource.id
    digest = hashlib.sha256(content).hexdigest()

    async def parts() -> AsyncIterator[Any]:
        for part in (
            {"start": contract.message("image.v1.UploadStart", id=id_)},
            {"chunk": content},
            {"end": contract.message("image.v1.UploadEnd", sha256=digest)},
        ):
            yield contract.message("image.v1.UploadImageDataRequest", **part)

    await old.stream("image.v1.ImageService/UploadImageData", parts(), await old.login())
    return str(id_)


async def test_the_last_release_boots_watches_and_deletes(client: Client) -> None:
    contract = Contract()
    old, agent = OldClient(contract, client), OldAgent(contract, client)
    tasks = [asyncio.create_task(agent.report()), asyncio.create_task(agent.serve())]
    async with asyncio.timeout(DEADLINE_S):
        await agent.reported.wait()
    size = contract.message("compute.v1.FlavorSpec", vcpu_count=1, memory_mib=64, disk_gib=1)
    flavor = await old.call(
        "compute.v1.FlavorService/CreateFlavor", system=True, name="tiny", spec=size
    )
    spec = contract.message(
        "compute.v1.InstanceSpec", flavor_id=flavor.resource.id, image_id=await upload(old)
    )
    instances = "compute.v1.InstanceService"
    listed = await old.call(f"{instances}/ListInstances")
    made = await old.call(f"{instances}/CreateInstance", name="vm", spec=spec)
    await old.ended(made)
    (desired,) = agent.specs
    assert desired.name == "vm"
    async with asyncio.timeout(DEADLINE_S):
        await agent.acknowledged.wait()  # on another stream than the operation's end

    id_ = made.resource.id
    seen = await old.call(f"{instances}/GetInstance", id=id_)
    active = contract.value("compute.v1.InstanceStatus.State", "STATE_ACTIVE")
    assert (seen.status.state, seen.status.host_id) == (active, agent.id)
    request = contract.message(
        "compute.v1.WatchInstancesRequest", from_revision=listed.revision, id=id_
    )
    watch = old.stream(f"{instances}/WatchInstances", request, await old.login())
    async for change in rpc.received(watch):
        if change.instance.status.state == active:
            break
    await old.ended(await old.call(f"{instances}/DeleteInstance", id=id_))
    with pytest.raises(errors.NotFound):
        await old.call(f"{instances}/GetInstance", id=id_)
    assert not (await old.call(f"{instances}/ListInstances")).instances
    watch.cancel()
    for task in tasks:
        assert not task.done() or task.exception() is None
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
