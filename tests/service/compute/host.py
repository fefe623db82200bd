"""A host that reports room and answers for its domains when the test says so; it runs nothing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

from mcloud.common.v1 import session_pb2
from mcloud.compute.v1 import host_service_pb2, host_service_pb2_grpc
from mcloud.conductor.v1 import domain_pb2, domain_service_pb2_grpc
from mcloud.scheduler.v1 import placement_pb2, placement_service_pb2, placement_service_pb2_grpc
from mcloud_base import ids, rpc
from service.core.cloud import Client

_State = domain_pb2.DomainStatus
_REPORT_S = 4.0


class Host:
    """Use `async with`. `desired` is what the conductor wants of each domain, at its newest."""

    def __init__(self, client: Client, name: str, **room: int) -> None:
        self._client = client
        self.id = ids.new("h")
        self.name = name
        self.desired: dict[str, session_pb2.Desired] = {}
        self.willing = True  # tombstones are answered at once
        self.eager = False  # so is everything else: domains run
        self.answers = True  # what it has, when it is asked
        self.artifacts: list[session_pb2.Artifact] = []  # what it has, domains that run included
        self._room = {"vcpu_count": 4, "memory_mib": 4096, "disk_gib": 40, **room}
        self._channel = client.as_host(self.id)
        self._out: asyncio.Queue[session_pb2.SessionRequest] = asyncio.Queue()
        self._changed = asyncio.Condition()
        self._reported = asyncio.Event()
        self._sequence = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Host:
        self._tasks = [asyncio.create_task(self._report()), asyncio.create_task(self._serve())]
        async with asyncio.timeout(30):
            await self._reported.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.disable()  # it counts as alive for a while, and the next test has its own

    async def disable(self, disabled: bool = True) -> None:
        request = host_service_pb2.UpdateHostRequest(request_id=ids.request_id(), id=self.id)
        request.spec.disabled = disabled
        request.update_mask.paths.append("spec.disabled")
        hosts = host_service_pb2_grpc.HostServiceStub(self._client.public)
        await rpc.call(hosts.UpdateHost, request, metadata=await self._client.login())

    async def wanted(
        self, instance_id: str = "", *, absent: bool = False, generation: int = 1
    ) -> session_pb2.Desired:
        """Wait until a domain (or any domain's absence) is desired, at this generation or later."""

        def found() -> list[session_pb2.Desired]:
            return [
                each
                for each in self.desired.values()
                if each.absent == absent
                and each.generation >= generation
                and (absent or _instance(each) == instance_id)
            ]

        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(found)
            return found()[0]

    def observe(self, desired: session_pb2.Desired, state: Any, **values: Any) -> None:
        """Say that a domain is as desired, in a state."""
        self._sequence += 1
        observed = session_pb2.Observed(
            id=desired.id, epoch=desired.epoch, generation=desired.generation,
            sequence=self._sequence, absent=desired.absent, **values,
        )  # fmt: skip
        observed.status.Pack(domain_pb2.DomainStatus(state=state))
        kept = [each for each in self.artifacts if each.owner_id != desired.id]
        if not desired.absent:
            kept.append(artifact(session_pb2.Artifact.KIND_DOMAIN, desired.id))
        self.artifacts = kept
        self._out.put_nowait(session_pb2.SessionRequest(observed=observed))

    def run(self, desired: session_pb2.Desired) -> None:
        self.observe(desired, _State.STATE_RUNNING)

    def shut_off(self, desired: session_pb2.Desired) -> None:
        self.observe(desired, _State.STATE_SHUTOFF)

    def remove(self, desired: session_pb2.Desired) -> None:
        self.observe(desired, _State.STATE_ABSENT)

    async def report_once(self) -> None:
        """Begin a stream of reports, and end it after the first."""
        stub = placement_service_pb2_grpc.HostReportServiceStub(self._channel)
        async for _ in rpc.received(stub.ReportHost(iter([self._facts(1)]))):
            pass

    async def reported(self) -> None:
        """Await the end of the stream of reports.

        Raises:
            errors.Error: why it was ended.
        """
        await self._tasks[0]

    def _facts(self, sequence: int) -> placement_service_pb2.ReportHostRequest:
        return placement_service_pb2.ReportHostRequest(
            incarnation=1, sequence=sequence, name=self.name, cpu_arch="x86_64",
            underlay_ip="127.0.0.1", total=placement_pb2.Resources(**self._room),
        )  # fmt: skip

    async def _report(self) -> None:
        stub = placement_service_pb2_grpc.HostReportServiceStub(self._channel)

        async def reports() -> AsyncIterator[placement_service_pb2.ReportHostRequest]:
            for sequence in itertools.count(1):
                yield self._facts(sequence)
                await asyncio.sleep(_REPORT_S)  # as hosts do
                renewal = session_pb2.SessionRequest(renewal=session_pb2.Renewal())
                self._out.put_nowait(renewal)

        async for _ in rpc.received(stub.ReportHost(reports())):
            self._reported.set()

    async def _serve(self) -> None:
        hello = session_pb2.Hello(incarnation=1, boot_id="b", agent_version="test")
        self._out.put_nowait(session_pb2.SessionRequest(hello=hello))

        async def requests() -> AsyncIterator[session_pb2.SessionRequest]:
            while True:
                yield await self._out.get()

        stub = domain_service_pb2_grpc.SessionServiceStub(self._channel)
        async for message in rpc.received(stub.OpenSession(requests())):
            if message.WhichOneof("message") == "listing_request" and self.answers:
                listing = session_pb2.Listing(
                    id=message.listing_request.id, artifacts=self.artifacts
                )
                self._out.put_nowait(session_pb2.SessionRequest(listing=listing))
            if message.WhichOneof("message") != "desired":
                continue
            async with self._changed:
                self.desired[message.desired.id] = message.desired
                self._changed.notify_all()
            if message.desired.absent and self.willing:
                self.remove(message.desired)
            elif self.eager and not message.desired.absent:
                self.run(message.desired)


def _instance(desired: session_pb2.Desired) -> str:
    spec = domain_pb2.DomainDesired()
    desired.spec.Unpack(spec)
    return spec.instance_id


def artifact(kind: Any, owner_id: str, name: str = "", **values: Any) -> session_pb2.Artifact:
    return session_pb2.Artifact(kind=kind, owner_id=owner_id, name=name or owner_id, **values)
