"""Host reports against a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from mcloud.scheduler.v1 import placement_service_pb2 as pb
from mcloud.scheduler.v1 import placement_service_pb2_grpc
from mcloud_agents.report import HostReport
from mcloud_base import errors


class Scheduler(placement_service_pb2_grpc.HostReportServiceServicer):
    def __init__(self) -> None:
        self.reports: asyncio.Queue[pb.ReportHostRequest] = asyncio.Queue()
        self.refuse = False

    async def ReportHost(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.ReportHostRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.ReportHostResponse]:
        async for report in request_iterator:
            self.reports.put_nowait(report)
            if self.refuse:
                self.refuse = False
                await context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
            yield pb.ReportHostResponse(sequence=report.sequence)

    async def next(self) -> pb.ReportHostRequest:
        async with asyncio.timeout(20):
            return await self.reports.get()


class Looker:
    def __init__(self) -> None:
        self.names = ["first"]
        self.failures = 0

    async def look(self) -> pb.ReportHostRequest:
        if self.failures:
            self.failures -= 1
            raise errors.Unavailable("HYPERVISOR_UNAVAILABLE", "libvirtd is away")
        return pb.ReportHostRequest(name=self.names[-1], incarnation=4)


@asynccontextmanager
async def reporting(
    looker: Looker, interval_s: float
) -> AsyncIterator[tuple[Scheduler, HostReport]]:
    scheduler = Scheduler()
    server = grpc.aio.server()
    placement_service_pb2_grpc.add_HostReportServiceServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = placement_service_pb2_grpc.HostReportServiceStub(channel)
        report = HostReport(lambda: stub.ReportHost(), looker.look, interval_s)
        task = asyncio.create_task(report.run())
        try:
            yield scheduler, report
        finally:
            task.cancel()
            await asyncio.wait({task})
            await server.stop(grace=0)


async def test_the_whole_truth_comes_at_once_and_again() -> None:
    async with reporting(Looker(), 0.05) as (scheduler, _):
        first, second = await scheduler.next(), await scheduler.next()
        assert (first.name, first.incarnation, first.sequence) == ("first", 4, 1)
        assert (second.sequence, second.HasField("time")) == (2, True)


async def test_each_report_is_of_its_moment() -> None:
    looker = Looker()
    async with reporting(looker, 0.05) as (scheduler, _):
        assert (await scheduler.next()).name == "first"
        looker.names.append("second")
        await scheduler.next()  # looked at before, maybe
        assert (await scheduler.next()).name == "second"


async def test_a_refused_report_is_followed_by_a_fresh_one() -> None:
    async with reporting(Looker(), 3600) as (scheduler, report):
        assert (await scheduler.next()).sequence == 1
        scheduler.refuse = True
        report.reconnect()
        assert (await scheduler.next()).sequence == 2
        assert (await scheduler.next()).sequence == 3


async def test_a_reconnection_reports_again() -> None:
    async with reporting(Looker(), 3600) as (scheduler, report):
        assert (await scheduler.next()).sequence == 1
        report.reconnect()
        assert (await scheduler.next()).sequence == 2


async def test_a_host_that_cannot_look_says_nothing() -> None:
    looker = Looker()
    looker.failures = 3
    async with reporting(looker, 0.05) as (scheduler, _):
        assert (await scheduler.next()).sequence == 1
        assert looker.failures == 0
