"""Tells the scheduler what the host has and what its domains do (HostReportService)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import grpc
import structlog

from mcloud.scheduler.v1 import placement_service_pb2 as pb
from mcloud_agents.backoff import Backoff
from mcloud_agents.link import cancelled_call_told
from mcloud_base import errors, rpc

log = structlog.get_logger()

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
ANSWER_TIMEOUT_S = 20.0

Stream = grpc.aio.StreamStreamCall[pb.ReportHostRequest, pb.ReportHostResponse]


class HostReport:
    """One stream of reports, opened again whenever it ends. Each report is the whole truth.

    Args:
        open_stream: calls ReportHost; asked anew for every connection.
        look: returns a report without sequence and time. If it raises one of `errors`, nothing is
            sent: a host that cannot look at itself should be given nothing.
        interval_s: between reports. Nobody waits for one: of domains their sessions tell at once.
    """

    def __init__(
        self,
        open_stream: Callable[[], Stream],
        look: Callable[[], Awaitable[pb.ReportHostRequest]],
        interval_s: float,
    ) -> None:
        self._open = open_stream
        self._look = look
        self._interval_s = interval_s
        self._stream: Stream | None = None
        self._sequence = 0
        self._left = asyncio.Event()  # the stream is to be opened anew
        self.stored = asyncio.Event()  # once, when the first report is

    def reconnect(self) -> None:
        """Open the stream anew: the host has another certificate."""
        if self._stream is not None:
            self._stream.cancel()
        self._left.set()

    async def run(self) -> None:
        """Report until cancelled."""
        backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while True:
            backoff.begin()
            try:
                await self._connect()
            except errors.Error as error:
                log.warning("host report ended", error=str(error))
            await asyncio.sleep(backoff.pause_s())

    async def _connect(self) -> None:
        stream = self._stream = self._open()
        responses = aiter(stream)
        try:
            with rpc.reraised(), cancelled_call_told():
                while True:
                    self._left.clear()
                    if report := await self._report():
                        async with asyncio.timeout(ANSWER_TIMEOUT_S):
                            with suppress(asyncio.InvalidStateError):  # ended; reading tells how
                                await stream.write(report)
                            await _stored(responses, report.sequence)
                        self.stored.set()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._interval_s):
                            await self._left.wait()
        except TimeoutError as error:
            raise errors.DeadlineExceeded("REPORT_NOT_STORED", "no answer to a report") from error
        finally:
            stream.cancel()

    async def _report(self) -> pb.ReportHostRequest | None:
        try:
            report = await self._look()
        except errors.Error as error:
            log.warning("host cannot be looked at", error=str(error))
            return None
        self._sequence += 1
        report.sequence = self._sequence
        report.time.GetCurrentTime()
        return report


async def _stored(responses: AsyncIterator[pb.ReportHostResponse], sequence: int) -> None:
    """Wait until the scheduler has stored a report."""
    async for response in responses:
        if response.sequence >= sequence:
            return
    raise errors.Unavailable("REPORT_ENDED", "the scheduler has ended the stream")
