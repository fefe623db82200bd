"""A host as the network service sees it: a session over mTLS, without bridges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.rpc import status_pb2

from mcloud.common.v1 import session_pb2
from mcloud.network.v1 import dataplane_pb2
from mcloud_base import errors, ids, rpc, tls


class DataplaneHost:
    """Opens a session, keeps the newest document, reports generations when told to."""

    def __init__(
        self,
        id_: str,
        identity: tls.Identity,
        session: Any,
        ports: Any,
        underlay_ip: str,
        capabilities: tuple[str, ...] = (),
    ) -> None:
        self.id = id_
        self.identity = identity
        self.ports = ports
        self.underlay_ip = underlay_ip
        self.generation = 0
        self.epoch = ""
        self.document = dataplane_pb2.HostDataplane()
        self.acknowledged = 0
        self.incarnation = 1
        self.ended: errors.Error | None = None
        self._capabilities = capabilities
        self._session = session
        self._sequence = 0
        self._out: asyncio.Queue[session_pb2.SessionRequest] = asyncio.Queue()
        self._news = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> DataplaneHost:
        self._out = asyncio.Queue()
        self._task = asyncio.create_task(self._follow())
        await self.until(lambda: self.generation > 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _requests(self) -> AsyncIterator[session_pb2.SessionRequest]:
        hello = session_pb2.Hello(
            incarnation=self.incarnation,
            underlay_ip=self.underlay_ip,
            capabilities=self._capabilities,
        )
        yield session_pb2.SessionRequest(hello=hello)
        while True:
            yield await self._out.get()

    async def _follow(self) -> None:
        try:
            async for message in self._session.OpenSession(self._requests()):
                kind = message.WhichOneof("message")
                if kind == "desired":
                    assert message.desired.id == self.id
                    assert not message.desired.absent
                    assert message.desired.generation > self.generation or self.generation == 0
                    self.document = dataplane_pb2.HostDataplane()
                    assert message.desired.spec.Unpack(self.document)
                    self.generation = message.desired.generation
                    self.epoch = message.desired.epoch
                elif kind == "acknowledgement":
                    self.acknowledged = message.acknowledgement.sequence
                async with self._news:
                    self._news.notify_all()
        except grpc.aio.AioRpcError as error:
            self.ended = rpc.from_rpc_error(error)
            async with self._news:
                self._news.notify_all()

    async def until(self, condition: Callable[[], Any], timeout_s: float = 30) -> Any:
        """Wait for what a message brings."""
        async with asyncio.timeout(timeout_s), self._news:
            while not (found := condition()):
                if self.ended is not None:
                    raise self.ended
                await self._news.wait()
            return found

    async def report(
        self,
        generation: int | None = None,
        *,
        sequence: int = 0,
        epoch: str | None = None,
        error: str = "",
    ) -> None:
        """Say which generation is in place, and wait until that is stored."""
        self._sequence = sequence or self._sequence + 1
        observed = session_pb2.Observed(
            id=self.id,
            epoch=self.epoch if epoch is None else epoch,
            generation=self.generation if generation is None else generation,
            sequence=self._sequence,
        )
        if error:
            observed.error.CopyFrom(status_pb2.Status(code=13, message=error))
        self.acknowledged = 0
        await self._out.put(session_pb2.SessionRequest(observed=observed))
        await self.until(lambda: self.acknowledged == self._sequence)

    def port(self, port_id: str) -> dataplane_pb2.PortBinding | None:
        return next((p for p in self.document.ports if p.port_id == port_id), None)

    def segment(self, network_id: str) -> dataplane_pb2.NetworkSegment | None:
        return next((n for n in self.document.networks if n.network_id == network_id), None)


def new_domain() -> str:
    return ids.new("d")
