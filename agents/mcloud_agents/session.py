"""The host's side of a session (mcloud/common/v1/session.proto), the same for every package.

What a service desires is handed to the part of the agent that can do it; what the part sees goes
back, and is kept until the service has stored it. The parts work on while nobody is connected.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import grpc
import structlog

from mcloud.common.v1 import session_pb2
from mcloud_agents.backoff import Backoff
from mcloud_agents.link import cancelled_call_told
from mcloud_base import errors, rpc

log = structlog.get_logger()

LISTINGS_AT_ONCE = 4
REMEMBERED_IDS = 65_536


@dataclass(frozen=True)
class Limits:
    """Times in seconds; each second one of a pair is the longest that the first may grow to."""

    answer_timeout_s: float = 20.0  # from hello to the first lease
    first_pause_s: float = 0.2  # between connections
    longest_pause_s: float = 10.0
    first_retry_s: float = 1.0  # of what could not be done
    longest_retry_s: float = 60.0
    concurrent_objects: int = 64
    kept_reports: int = 16_384


Stream = grpc.aio.StreamStreamCall[session_pb2.SessionRequest, session_pb2.SessionResponse]


class Handler(Protocol):
    """The part of the agent that looks after one kind of object."""

    async def apply(self, desired: session_pb2.Desired) -> session_pb2.Observed | None:
        """Bring the object to the desired state; return what is there then.

        Repeatable. Never called twice at a time for one id. Cancelled when something newer is
        desired of the id: it must not return before what it has begun can do no more harm.

        Returns:
            None: it will be told with `HostSession.report`.

        Raises:
            errors.Error: it is reported, and tried again until something newer is desired.
        """

    async def observe_all(self) -> Sequence[session_pb2.Observed]:
        """Return what is there of every object that was desired once."""
        ...

    async def artifacts(self) -> Sequence[session_pb2.Artifact]:
        """Return everything of this kind that is on the host, known or not."""
        ...


class HostSession:
    """One service's session, opened again whenever it ends.

    Args:
        name: for the log: "conductor".
        open_stream: calls OpenSession; asked anew for every connection.
        handler: does the work.
        hello: first message of each stream; epoch and clock are filled in.
        remember_epoch: keeps the epoch for the next start.
        limits: of time and number.
    """

    def __init__(
        self,
        name: str,
        open_stream: Callable[[], Stream],
        handler: Handler,
        hello: session_pb2.Hello,
        remember_epoch: Callable[[str], None] = lambda epoch: None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        self._limits = limits
        self._log = log.bind(session=name)
        self._open = open_stream
        self._handler = handler
        self._hello = hello
        self._remember_epoch = remember_epoch
        self._stream: Stream | None = None
        self._epoch = ""  # of the last lease; empty until the first
        self._number = 0
        self._lease_end = 0.0
        self.opened = asyncio.Event()  # once, by the first lease
        self._sequence = 0
        # Highest generation seen of each id, within the epoch.
        self._generations: OrderedDict[str, int] = OrderedDict()
        self._reached: dict[str, int] = {}  # generation of each id, as last reported
        self._unstored: OrderedDict[str, session_pb2.Observed] = OrderedDict()  # by sequence
        self._dropped = False  # a report that was not stored; everything is told again
        self._room = asyncio.Event()
        self._wake = asyncio.Event()  # there is something to send
        self._renewal_due = False
        # Hosts that came together, after an outage, do not renew together.
        self._phase = zlib.crc32(hello.underlay_ip.encode()) / (1 << 32)
        self._listings: list[session_pb2.Listing] = []
        self._work: dict[str, tuple[session_pb2.Desired, asyncio.Task[None]]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slots = asyncio.Semaphore(limits.concurrent_objects)
        self._listers: set[asyncio.Task[None]] = set()
        self._reporter: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the service counts on this host now."""
        return time.monotonic() < self._lease_end

    def reconnect(self) -> None:
        """Open the stream anew: the host has another certificate."""
        if self._stream is not None:
            self._stream.cancel()

    async def run(self) -> None:
        """Keep the session until cancelled; then leave off working, not what was made."""
        backoff = Backoff(self._limits.first_pause_s, self._limits.longest_pause_s)
        try:
            while True:
                backoff.begin()
                try:
                    await self._connect()
                except errors.Error as error:
                    self._log.warning("session ended", error=str(error))
                self._lease_end = 0
                await asyncio.sleep(backoff.pause_s())
        finally:
            tasks = [task for _, task in self._work.values()]
            tasks += [*self._listers, *([self._reporter] if self._reporter else [])]
            await _end(tasks)

    def report(self, observed: session_pb2.Observed) -> None:
        """Tell the service what is there; the newest of each id is kept until it is stored."""
        report = session_pb2.Observed()
        report.CopyFrom(observed)
        if report.epoch != self._epoch and report.epoch:
            report.generation = 0  # of another database; it means nothing in this one
        report.epoch = self._epoch
        self._reached[report.id] = report.generation
        self._sequence += 1
        report.sequence = self._sequence
        self._unstored.pop(report.id, None)
        self._unstored[report.id] = report
        if len(self._unstored) > self._limits.kept_reports:
            self._unstored.popitem(last=False)
            self._dropped = True
        self._wake.set()

    async def _connect(self) -> None:
        """Open one stream and serve it to its end.

        Raises:
            errors.Error: how it ended.
        """
        stream = self._stream = self._open()
        responses = aiter(stream)
        writer: asyncio.Task[None] | None = None
        try:
            with rpc.reraised(), cancelled_call_told():
                async with asyncio.timeout(self._limits.answer_timeout_s):
                    self._hello.epoch = self._epoch or self._hello.epoch
                    self._hello.clock.GetCurrentTime()
                    with suppress(asyncio.InvalidStateError):  # ended; reading tells how
                        await stream.write(session_pb2.SessionRequest(hello=self._hello))
                    first = await _next(responses)
                if first.WhichOneof("message") != "lease":
                    raise errors.Internal("NO_LEASE", "the session does not begin with a lease")
                ttl_s = await self._take_lease(first.lease)
                self._log.info("session opened", number=self._number, epoch=self._epoch)
                writer = asyncio.create_task(self._write(stream, ttl_s))
                # Renewals are answered: silence means that nobody is there any more.
                async with asyncio.timeout(ttl_s) as patience:
                    while True:
                        await self._receive(await _next(responses))
                        _extend(patience, ttl_s)
        except TimeoutError as error:
            raise errors.DeadlineExceeded(
                "SESSION_SILENT", "the service does not answer"
            ) from error
        finally:
            stream.cancel()
            await _end([writer] if writer else [])

    async def _receive(self, response: session_pb2.SessionResponse) -> None:
        match response.WhichOneof("message"):
            case "lease":
                await self._take_lease(response.lease)
            case "desired":
                self._desire(response.desired)
            case "acknowledgement":
                self._acknowledge(response.acknowledgement.sequence)
            case "listing_request":
                if len(self._listers) < LISTINGS_AT_ONCE:
                    lister = asyncio.create_task(self._list(response.listing_request.id))
                    self._listers.add(lister)
                    lister.add_done_callback(self._listers.discard)
            case other:
                self._log.warning("unknown message ignored", message=other)

    async def _take_lease(self, lease: session_pb2.Lease) -> float:
        """Note the lease; return its life in seconds."""
        ttl_s = lease.ttl.ToTimedelta().total_seconds()
        if ttl_s <= 0:
            raise errors.Internal("BAD_LEASE", f"the lease lives {ttl_s} s")
        if lease.epoch != self._epoch:
            self._log.info("new epoch", before=self._epoch, epoch=lease.epoch)
            await _end([task for _, task in self._work.values()])
            self._work.clear()
            self._generations.clear()
            self._reached.clear()
            self._unstored.clear()
            self._dropped = False
            self._epoch = lease.epoch
            await asyncio.to_thread(self._remember_epoch, lease.epoch)
            self._tell_everything()
        elif lease.session_number < self._number:
            raise errors.Conflict(
                "SESSION_SUPERSEDED", f"a session {self._number} of this host was opened before"
            )
        self._number = lease.session_number
        self._lease_end = time.monotonic() + ttl_s
        self.opened.set()
        return ttl_s

    async def _write(self, stream: Stream, ttl_s: float) -> None:
        """Send reports, listings and renewals as they fall due."""
        sent = 0
        self._listings.clear()
        alarm = self._remind(ttl_s / 3)
        # Reading tells how the stream ended.
        ended = (grpc.RpcError, asyncio.InvalidStateError, errors.Cancelled)
        try:
            with suppress(*ended), cancelled_call_told():
                while True:
                    self._wake.clear()
                    message: session_pb2.SessionRequest | None = None
                    if self._renewal_due:
                        alarm = self._remind(ttl_s / 3)
                        message = session_pb2.SessionRequest(renewal=session_pb2.Renewal())
                    elif self._listings:
                        message = session_pb2.SessionRequest(listing=self._listings.pop(0))
                    elif report := self._next_report(sent):
                        sent = report.sequence
                        message = session_pb2.SessionRequest(observed=report)
                    if message is not None:
                        await stream.write(message)
                    else:
                        await self._wake.wait()  # for the alarm at the latest
        finally:
            alarm.cancel()

    def _remind(self, period_s: float) -> asyncio.TimerHandle:
        """Have the lease renewed within a period, at the next moment that is the host's own.

        It is the same for all of its sessions: what they send at once goes in one piece.
        """

        def tell() -> None:
            self._renewal_due = True
            self._wake.set()

        self._renewal_due = False
        loop = asyncio.get_running_loop()
        since = (loop.time() + self._phase * period_s) % period_s
        return loop.call_later(period_s - since, tell)

    def _next_report(self, sent: int) -> session_pb2.Observed | None:
        """Return the oldest report that was not sent on this stream."""
        if not self._unstored or next(reversed(self._unstored.values())).sequence <= sent:
            return None
        return next(report for report in self._unstored.values() if report.sequence > sent)

    def _acknowledge(self, sequence: int) -> None:
        while self._unstored:
            id_, oldest = next(iter(self._unstored.items()))
            if oldest.sequence > sequence:
                break
            del self._unstored[id_]
        self._room.set()
        if self._dropped and not self._unstored:
            self._dropped = False
            self._tell_everything()

    def _desire(self, desired: session_pb2.Desired) -> None:
        """Begin to bring an object to what is desired, unless something newer is known."""
        newest = self._generations.get(desired.id, 0)
        if desired.epoch != self._epoch or desired.generation < newest:
            self._log.debug("old desire ignored", id=desired.id, generation=desired.generation)
            return
        self._generations[desired.id] = desired.generation
        self._generations.move_to_end(desired.id)
        if len(self._generations) > REMEMBERED_IDS:
            oldest, _ = self._generations.popitem(last=False)
            self._reached.pop(oldest, None)
        if known := self._work.get(desired.id):
            before, task = known
            if before == desired:
                return  # it is in hand
            task.cancel()
        task = asyncio.create_task(self._bring(desired))
        self._work[desired.id] = desired, task
        task.add_done_callback(lambda done: self._forget(desired.id, done))

    def _forget(self, id_: str, done: asyncio.Task[None]) -> None:
        if self._work.get(id_, (None, None))[1] is done:
            del self._work[id_]

    async def _bring(self, desired: session_pb2.Desired) -> None:
        """Work on one object until it is as desired, or something newer is."""
        lock = self._locks.setdefault(desired.id, asyncio.Lock())
        backoff = Backoff(self._limits.first_retry_s, self._limits.longest_retry_s)
        async with lock:  # until the work on something older has left off
            while not await self._try(desired):
                await asyncio.sleep(backoff.pause_s())

    async def _try(self, desired: session_pb2.Desired) -> bool:
        try:
            async with self._slots:
                observed = await self._handler.apply(desired)
        except errors.Error as error:
            failure = error
            self._log.warning("not done yet", id=desired.id, error=str(error))
        except Exception:  # the outermost loop of the work: a fault in it must not end the session
            failure = errors.Internal("AGENT_FAULT", "internal error; see the agent's log")
            self._log.exception("fault in the agent", id=desired.id)
        else:
            if observed is not None:
                self.report(observed)
            return True
        self.report(
            session_pb2.Observed(
                id=desired.id,
                epoch=desired.epoch,
                generation=self._reached.get(desired.id, 0),
                error=errors.to_status(failure),
            )
        )
        return False

    def _tell_everything(self) -> None:
        if self._reporter is not None:
            self._reporter.cancel()
        self._reporter = asyncio.create_task(self._report_everything())

    async def _report_everything(self) -> None:
        backoff = Backoff(self._limits.first_retry_s, self._limits.longest_retry_s)
        while True:
            try:
                everything = await self._handler.observe_all()
                break
            except errors.Error as error:
                self._log.warning("nothing can be seen", error=str(error))
                await asyncio.sleep(backoff.pause_s())
        for observed in everything:
            while len(self._unstored) >= self._limits.kept_reports:
                self._room.clear()
                await self._room.wait()
            if observed.id not in self._unstored:  # what was told meanwhile is newer
                self.report(observed)

    async def _list(self, id_: str) -> None:
        try:
            artifacts = await self._handler.artifacts()
        except errors.Error as error:  # no answer is better than half of one
            self._log.warning("nothing can be listed", error=str(error))
            return
        self._listings.append(session_pb2.Listing(id=id_, artifacts=artifacts))
        self._wake.set()


async def _next(
    responses: AsyncIterator[session_pb2.SessionResponse],
) -> session_pb2.SessionResponse:
    try:
        return await anext(responses)
    except StopAsyncIteration as error:
        raise errors.Unavailable("SESSION_ENDED", "the service has ended the session") from error


def _extend(patience: asyncio.Timeout, limit_s: float) -> None:
    """Wait for so long from now on; to the tenth: a timer is not set anew for each message."""
    end, now = patience.when(), asyncio.get_running_loop().time()
    if end is None or end < now + 0.9 * limit_s:
        patience.reschedule(now + limit_s)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
