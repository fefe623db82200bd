"""The server's side of a host's session (mcloud/common/v1/session.proto), for each package alike.

A session is a row (host, number, process): opening one takes the next number, and the older
stream, wherever it is, sees that and closes. Nothing is remembered between sessions: what a host
is to do is read from the database again, so any process can serve any host.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message

from mcloud.common.v1 import session_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, database, statements, tables
from mcloud_controlplane.core.batch import Batch, Gathered
from mcloud_controlplane.core.session_follower import Follower, Pending, Stream

log = structlog.get_logger()

_OUTBOX = 1000
_FIRST_LOOKS_AT_ONCE = 2  # so that many hosts that connect leave room for others' reads
_HOSTS_AT_ONCE = 50  # that are looked at in one unit
_REPORTS_AT_ONCE = 50  # that are written in one
_REST = 2.0  # between looks that nobody waits for: a third of the time is theirs


# What a stream is to send; None at its end.
Outbox = asyncio.Queue[session_pb2.SessionResponse | None]


class HostReport(NamedTuple):
    """What a host has told of one thing."""

    host_id: str
    incarnation: int
    observed: session_pb2.Observed


class Source(Protocol):
    """What a package desires of hosts, and what it does with what they see. All within units."""

    def desired(self, host_ids: Sequence[str]) -> Mapping[str, Sequence[session_pb2.Desired]]:
        """Return what hosts do not have yet: not observed at its generation.

        In a constant number of statements; hosts that have everything may be left out.
        """

    def pending(self, *, urgent: bool) -> Sequence[Pending]:
        """Return what any host does not have yet, in a constant number of statements.

        Args:
            urgent: what somebody waits for is enough.
        """

    def everything(self, host_id: str) -> Sequence[session_pb2.Desired]:
        """Return everything that is to be on the host; sent when a session begins."""

    def observed(self, reports: Sequence[HostReport], epoch: str) -> None:
        """Record what hosts see, unless something newer is recorded.

        Args:
            epoch: the database's.
            reports: by host, and of each in the order in which it told.
        """


class _Report(NamedTuple):
    """What a host has told, as a key: its sequence says which it is."""

    host_id: str
    incarnation: int
    number: int  # of the session
    sequence: int


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
        self._follower = Follower(store, shared, source.pending, types)
        self._first_looks = asyncio.Semaphore(_FIRST_LOOKS_AT_ONCE)
        self._looks = Gathered(self._look_all, limit=_HOSTS_AT_ONCE)
        self._leisurely_looks = Gathered(self._look_all, limit=_HOSTS_AT_ONCE, rest=_REST)
        self._reports: dict[_Report, session_pb2.Observed] = {}
        self._written = Gathered(self._write_all, limit=_REPORTS_AT_ONCE)
        self._process = secrets.token_hex(6)
        self._outboxes: dict[str, Outbox] = {}
        self._listings: dict[str, asyncio.Future[session_pb2.Listing]] = {}
        self._epoch = ""  # as of the last renewals
        self._renewals = Batch[tuple[str, int]](self._renew_all)

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
        outbox: Outbox = asyncio.Queue(_OUTBOX)
        self._outboxes[host] = outbox
        failure: list[BaseException] = []

        async def guard(work: Callable[[], object]) -> None:
            try:
                await work()  # type: ignore[misc]
            except Exception as error:
                failure.append(error)  # the gate says what it is, also of what nobody expected
            finally:
                if outbox.full():
                    outbox.get_nowait()  # nobody reads it any more
                outbox.put_nowait(None)

        tasks = [
            asyncio.create_task(
                guard(lambda: self._receive(host, hello, number, requests, outbox))
            ),
            asyncio.create_task(guard(lambda: self._send(host, hello, number, epoch, outbox))),
        ]
        try:
            outbox.put_nowait(_lease(number, epoch))
            while (response := await outbox.get()) is not None:
                yield response
            if failure:
                raise failure[0]
        finally:
            for task in tasks:
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
        outbox: Outbox,
    ) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "observed":
                report = request.observed
                key = _Report(host, hello.incarnation, number, report.sequence)
                self._reports[key] = report
                try:
                    await self._written.get(key)
                finally:
                    self._reports.pop(key, None)
                answer = session_pb2.Acknowledgement(sequence=report.sequence)
                await outbox.put(session_pb2.SessionResponse(acknowledgement=answer))
            elif kind == "renewal":
                if not await self._renewals.add((host, number)):
                    raise _superseded()
                await outbox.put(_lease(number, self._epoch))
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
        outbox: Outbox,
    ) -> None:
        """Send what is desired: all of it first, then whatever is new."""
        stream = Stream(host, number)
        with self._follower.following(stream):
            async with self._first_looks:
                current, found = await self._database.read(self._look_first, host)
            while True:
                if current != number:
                    raise _superseded()
                for desired in found:
                    state = (desired.generation, desired.absent)
                    if stream.sent.get(desired.id) != state:
                        desired.epoch = epoch
                        await outbox.put(session_pb2.SessionResponse(desired=desired))
                        stream.sent[desired.id] = state
                        stream.sent_time = time.monotonic()
                await stream.wake.wait()
                stream.wake.clear()
                urgent, stream.urgent = stream.urgent, False
                looks = self._looks if urgent else self._leisurely_looks
                current, found = await looks.get(host)

    def _look_first(self, host: str) -> tuple[int, Sequence[session_pb2.Desired]]:
        return self._numbers([host]).get(host, 0), self._source.everything(host)

    async def _look_all(
        self, hosts: list[str]
    ) -> Mapping[str, tuple[int, Sequence[session_pb2.Desired]]]:
        """Look what hosts do not have yet, for all that are to be looked at in one unit."""
        return await self._database.read(self._look, hosts)

    def _look(self, hosts: list[str]) -> Mapping[str, tuple[int, Sequence[session_pb2.Desired]]]:
        numbers, desired = self._numbers(hosts), self._source.desired(hosts)
        return {host: (numbers.get(host, 0), desired.get(host, ())) for host in hosts}

    def _numbers(self, hosts: list[str]) -> dict[str, int]:
        table: Any = self._tables.host_session
        here = table.host_id.in_(statements.padded(hosts))
        query = table.select(table.host_id, table.number).where(here)
        return dict(query.tuples())

    async def _write_all(self, keys: list[_Report]) -> Mapping[_Report, None]:
        """Write what hosts have told, all of it in one transaction."""
        reports = [(key, self._reports[key]) for key in keys if key in self._reports]
        await self._database.write(self._observe, reports)
        return dict.fromkeys(keys)

    def _observe(self, reports: list[tuple[_Report, session_pb2.Observed]]) -> None:
        # By host, as all units lock their rows in one order.
        self._source.observed(
            [
                HostReport(key.host_id, key.incarnation, report)
                for key, report in sorted(reports, key=lambda pair: pair[0])
            ],
            self._tables.epoch(),
        )

    def _take(self, host: str, hello: session_pb2.Hello, subject: str) -> tuple[int, str]:
        table = self._tables.host_session
        values = {
            "process": self._process,
            "incarnation": hello.incarnation,
            "underlay_ip": hello.underlay_ip,
            "certificate_subject": subject,
            "agent_version": hello.agent_version,
            "lease_expire_time": _expiry(),
            "storage": "storage" in hello.capabilities,
        }
        table.insert(host_id=host, number=1, **values).on_conflict(
            conflict_target=[table.host_id], update={**values, "number": table.number + 1}
        ).execute()
        self._on_hello(host, hello)
        tables.changed("host", host, "")
        return int(table.get_by_id(host).number), self._tables.epoch()

    async def _renew_all(self, sessions: list[tuple[str, int]]) -> set[tuple[str, int]]:
        renewed, self._epoch = await self._database.write_at_once(self._renew, sessions)
        return renewed

    def _renew(self, sessions: list[tuple[str, int]]) -> tuple[set[tuple[str, int]], str]:
        """Renew the leases of those (host, number) that are still the newest."""
        table = self._tables.host_session
        hosts = statements.padded([host for host, _ in sessions])
        rows = table.select(table.host_id, table.number).where(table.host_id.in_(hosts))
        in_order = rows.order_by(table.host_id)
        newest = {(row.host_id, row.number) for row in self._database.locked(in_order)}
        kept = newest & set(sessions)
        table.update(lease_expire_time=_expiry()).where(
            table.host_id.in_(statements.padded([host for host, _ in kept]))
        ).execute()
        return kept, self._tables.epoch()


def _expiry() -> int:
    return database.now() + tables.SESSION_LEASE_S * 1_000_000


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
    ttl = duration_pb2.Duration(seconds=tables.SESSION_LEASE_S)
    return session_pb2.SessionResponse(
        lease=session_pb2.Lease(session_number=number, ttl=ttl, epoch=epoch)
    )


def _superseded() -> errors.Conflict:
    return errors.Conflict("SESSION_SUPERSEDED", "another session of this host is newer")
