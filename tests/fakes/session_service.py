"""A session service that does what a test says: real gRPC, no database."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from google.protobuf.message import Message

from mcloud.common.v1 import session_pb2
from mcloud.volume.v1 import session_service_pb2_grpc


class ServerStream:
    """One stream of a host, as the service sees it."""

    def __init__(self) -> None:
        self.received: list[session_pb2.SessionRequest] = []
        self.ended = asyncio.Event()
        self._out: asyncio.Queue[session_pb2.SessionResponse | None] = asyncio.Queue()
        self._news = asyncio.Condition()

    @property
    def observed(self) -> list[session_pb2.Observed]:
        return [m.observed for m in self.received if m.WhichOneof("message") == "observed"]

    @property
    def kinds(self) -> list[str]:
        return [str(message.WhichOneof("message")) for message in self.received]

    def lease(self, number: int = 1, epoch: str = "e1", ttl_s: float = 30) -> None:
        lease = session_pb2.Lease(session_number=number, epoch=epoch)
        lease.ttl.FromTimedelta(datetime.timedelta(seconds=ttl_s))
        self._out.put_nowait(session_pb2.SessionResponse(lease=lease))

    def desire(
        self,
        id_: str,
        generation: int,
        *,
        epoch: str = "e1",
        absent: bool = False,
        spec: Message | None = None,
    ) -> None:
        desired = session_pb2.Desired(id=id_, epoch=epoch, generation=generation, absent=absent)
        if spec is not None:
            desired.spec.Pack(spec)
        self._out.put_nowait(session_pb2.SessionResponse(desired=desired))

    def acknowledge(self, sequence: int) -> None:
        answer = session_pb2.Acknowledgement(sequence=sequence)
        self._out.put_nowait(session_pb2.SessionResponse(acknowledgement=answer))

    def say(self, message: session_pb2.SessionResponse) -> None:
        self._out.put_nowait(message)

    def ask_for_listing(self, id_: str) -> None:
        request = session_pb2.ListingRequest(id=id_)
        self._out.put_nowait(session_pb2.SessionResponse(listing_request=request))

    def end(self) -> None:
        self._out.put_nowait(None)

    async def until(self, condition: object) -> None:
        """Wait until a condition on what was received holds."""
        assert callable(condition)
        async with asyncio.timeout(20), self._news:
            await self._news.wait_for(condition)

    async def receive(self, requests: AsyncIterator[session_pb2.SessionRequest]) -> None:
        async for request in requests:
            async with self._news:
                self.received.append(request)
                self._news.notify_all()

    async def send(self) -> AsyncIterator[session_pb2.SessionResponse]:
        while (response := await self._out.get()) is not None:
            yield response


class SessionService(session_service_pb2_grpc.SessionServiceServicer):
    """Hands each new stream to the test."""

    def __init__(self) -> None:
        self._streams: asyncio.Queue[ServerStream] = asyncio.Queue()
        self.opened = 0

    async def stream(self) -> ServerStream:
        """Return the next stream, once its first message is here."""
        async with asyncio.timeout(20):
            stream = await self._streams.get()
        await stream.until(lambda: stream.received)
        return stream

    async def OpenSession(  # noqa: N802
        self,
        requests: AsyncIterator[session_pb2.SessionRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        stream = ServerStream()
        self.opened += 1
        self._streams.put_nowait(stream)
        receiving = asyncio.create_task(stream.receive(requests))
        try:
            async for response in stream.send():
                yield response
        finally:
            stream.ended.set()
            receiving.cancel()


@asynccontextmanager
async def serving(service: SessionService, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server()
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(grace=0)
