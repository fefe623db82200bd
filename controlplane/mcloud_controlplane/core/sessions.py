"""The server's side of a host's session (mcloud/common/v1/session.proto), for each package alike.

A session is a row (host, number, process): opening one takes the next number, and the older
stream, wherever it is, sees that and closes. Nothing is remembered between sessions: what a host
is to do is read from the database again, so any process can serve any host.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Protocol

import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message

from mcloud.common.v1 import session_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, database, tables

log = structlog.get_logger()

LEASE_S = 30
_POLL_S = 5.0  # the net under the wake-ups
_OUTBOX = 1000


class Source(Protocol):
    """What a package desires of hosts, and what it does with what they see. All within units."""

    def desired(self, host_id: str) -> Sequence[session_pb2.Desired]:
        """Return everything that the host does not have yet: not observed at its generation."""

    def everything(self, host_id: str) -> Sequence[session_pb2.Desired]:
        """Return everything that is to be on the host; sent when a session begins."""

    def observed(self, host_id: str, incarnation: int, report: session_pb2.Observed) -> None:
        """Record what the host sees, unless something newer is recorded."""


class Sessions:
    """The open streams of hosts to this process, for one package."""

    def __init__(
        self,
        store: database.Database,
        shared: tables.Tables,
        source: Source,
        *,
        on_hello: Callable[[str, session_pb2.Hello], None] = lambda host, hello: None,
        types: Collection[str] = (),
    ) -> None:
        """Make them.

        Args:
            types: whose changes may change what is desired; none: all.
        """
        self._database = store
        self._tables = shared
        self._source = source
        self._on_hello = on_hello
        self._types = (*types, "host") if types else ()  # a newer session changes the host
        self._process = secrets.token_hex(6)
        self._outboxes: dict[str, asyncio.Queue[session_pb2.SessionResponse]] = {}
        self._listings: dict[str, asyncio.Future[session_pb2.Listing]] = {}

    async def OpenSession(
        self, requests: AsyncIterator[session_pb2.SessionRequest], context: auth.Context
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        """Serve a host's stream; `Sessions` is the servicer of every package's SessionService."""
        host = auth.caller().host_id
        hello = await _hello(requests)
        certificate = auth.caller().certificate
        assert certificate is not None
        number, epoch = await self._database.write(self._take, host, hello, certificate.subject)
        bound = log.bind(host=host, session=number)
        bound.info("host session opened", incarnation=hello.incarnation)
        outbox: asyncio.Queue[session_pb2.SessionResponse] = asyncio.Queue(_OUTBOX)
        self._outboxes[host] = outbox
        ended = asyncio.Event()
        failure: list[BaseException] = []

        async def guard(work: Callable[[], object]) -> None:
            try:
                await work()  # type: ignore[misc]
            except Exception as error:
                failure.append(error)  # the gate says what it is, also of what nobody expected
            finally:
                ended.set()

        tasks = [
            asyncio.create_task(
                guard(lambda: self._receive(host, hello, number, requests, outbox))
            ),
            asyncio.create_task(guard(lambda: self._send(host, hello, number, epoch, outbox))),
        ]
        ending = asyncio.create_task(ended.wait())
        getting: asyncio.Task[session_pb2.SessionResponse] | None = None
        try:
            outbox.put_nowait(_lease(number, epoch))
            while True:
                getting = asyncio.create_task(outbox.get())
                await asyncio.wait({getting, ending}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    break
                yield getting.result()
            if failure:
                raise failure[0]
        finally:
            for task in (*tasks, ending, *([getting] if getting else [])):
                task.cancel()
            if self._outboxes.get(host) is outbox:
                del self._outboxes[host]
            bound.info("host session ended")

    def connected(self) -> list[str]:
        """Return the hosts that have a stream to this process."""
        return list(self._outboxes)

    async def list_artifacts(
        self, host_id: str, timeout_s: float = 10
    ) -> session_pb2.Listing | None:
        """Ask a host for all of mcloud's on it; None if it is not here or does not answer."""
        outbox = self._outboxes.get(host_id)
        if outbox is None:
            return None
        id_ = secrets.token_hex(8)
        future: asyncio.Future[session_pb2.Listing] = asyncio.get_running_loop().create_future()
        self._listings[id_] = future
        try:
            async with asyncio.timeout(timeout_s):
                await outbox.put(
                    session_pb2.SessionResponse(listing_request=session_pb2.ListingRequest(id=id_))
                )
                return await future
        except TimeoutError:
            return None
        finally:
            del self._listings[id_]

    async def _receive(
        self,
        host: str,
        hello: session_pb2.Hello,
        number: int,
        requests: AsyncIterator[session_pb2.SessionRequest],
        outbox: asyncio.Queue[session_pb2.SessionResponse],
    ) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "observed":
                report = request.observed
                await self._database.write(self._source.observed, host, hello.incarnation, report)
                answer = session_pb2.Acknowledgement(sequence=report.sequence)
                await outbox.put(session_pb2.SessionResponse(acknowledgement=answer))
            elif kind == "renewal":
                epoch = await self._database.write(self._renew, host, number)
                await outbox.put(_lease(number, epoch))
            elif kind == "listing":
                future = self._listings.get(request.listing.id)
                if future is not None and not future.done():
                    future.set_result(request.listing)

    async def _send(
        self,
        host: str,
        hello: session_pb2.Hello,
        number: int,
        epoch: str,
        outbox: asyncio.Queue[session_pb2.SessionResponse],
    ) -> None:
        """Send what is desired: all of it first, then whatever is new."""
        sent: dict[str, tuple[int, bool]] = {}
        select = self._source.everything
        with self._database.listening(*self._types) as event:
            while True:
                event.clear()
                current, found = await self._database.read(self._look, host, select)
                if current != number:
                    raise _superseded()
                for desired in found:
                    state = (desired.generation, desired.absent)
                    if sent.get(desired.id) != state:
                        desired.epoch = epoch
                        await outbox.put(session_pb2.SessionResponse(desired=desired))
                        sent[desired.id] = state
                select = self._source.desired
                try:
                    async with asyncio.timeout(_POLL_S):
                        await event.wait()
                except TimeoutError:
                    continue

    def _look(
        self, host: str, select: Callable[[str], Sequence[session_pb2.Desired]]
    ) -> tuple[int, Sequence[session_pb2.Desired]]:
        row = self._tables.host_session.get_or_none(self._tables.host_session.host_id == host)
        return (row.number if row else 0), select(host)

    def _take(self, host: str, hello: session_pb2.Hello, subject: str) -> tuple[int, str]:
        table = self._tables.host_session
        values = {
            "process": self._process,
            "incarnation": hello.incarnation,
            "underlay_ip": hello.underlay_ip,
            "certificate_subject": subject,
            "agent_version": hello.agent_version,
            "lease_expire_time": database.now() + LEASE_S * 1_000_000,
            "storage": "storage" in hello.capabilities,
        }
        table.insert(host_id=host, number=1, **values).on_conflict(
            conflict_target=[table.host_id], update={**values, "number": table.number + 1}
        ).execute()
        self._on_hello(host, hello)
        tables.changed("host", host, "")
        return int(table.get_by_id(host).number), self._tables.epoch()

    def _renew(self, host: str, number: int) -> str:
        table = self._tables.host_session
        renewed = (
            table.update(lease_expire_time=database.now() + LEASE_S * 1_000_000)
            .where((table.host_id == host) & (table.number == number))
            .execute()
        )
        if not renewed:
            raise _superseded()
        return self._tables.epoch()


def desired(id_: str, generation: int, spec: Message | None) -> session_pb2.Desired:
    """Return a Desired; a tombstone without a spec."""
    message = session_pb2.Desired(id=id_, generation=generation, absent=spec is None)
    if spec is not None:
        packed = any_pb2.Any()
        packed.Pack(spec)
        message.spec.CopyFrom(packed)
    return message


async def _hello(requests: AsyncIterator[session_pb2.SessionRequest]) -> session_pb2.Hello:
    try:
        async with asyncio.timeout(10):
            first = await anext(aiter(requests))
    except (TimeoutError, StopAsyncIteration) as error:
        raise errors.InvalidArgument("HELLO_MISSING", "a session begins with hello") from error
    if first.WhichOneof("message") != "hello":
        raise errors.InvalidArgument("HELLO_MISSING", "a session begins with hello")
    return first.hello


def _lease(number: int, epoch: str) -> session_pb2.SessionResponse:
    ttl = duration_pb2.Duration(seconds=LEASE_S)
    return session_pb2.SessionResponse(
        lease=session_pb2.Lease(session_number=number, ttl=ttl, epoch=epoch)
    )


def _superseded() -> errors.Conflict:
    return errors.Conflict("SESSION_SUPERSEDED", "another session of this host is newer")
