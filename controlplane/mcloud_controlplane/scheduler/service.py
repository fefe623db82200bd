"""Serves mcloud.scheduler.v1: PlacementService and HostReportService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.scheduler.v1 import (
    invariant_service_pb2_grpc,
    placement_service_pb2,
    placement_service_pb2_grpc,
)
from mcloud_base import errors
from mcloud_controlplane.compute import model
from mcloud_controlplane.core import auth
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.batch import Batch
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.scheduler import choose, claims, store
from mcloud_controlplane.scheduler.decisions import Decisions
from mcloud_controlplane.scheduler.hosts import Need
from mcloud_controlplane.scheduler.invariants import InvariantServicer
from mcloud_controlplane.scheduler.view import View


class PlacementServicer(placement_service_pb2_grpc.PlacementServiceServicer):
    """Finds room."""

    def __init__(self, opened: Database, view: View, decisions: Decisions) -> None:
        self._database = opened
        self._view = view
        self._decisions = decisions

    async def SelectDestinations(
        self, request: placement_service_pb2.SelectDestinationsRequest, context: Context
    ) -> placement_service_pb2.SelectDestinationsResponse:
        """Queue the request (step 6 takes it from there) and return what was decided."""
        if not self._view.loaded.is_set():
            raise errors.Unavailable(
                "HOST_VIEW_LOADING", "the scheduler is still reading the hosts",
                details=(errors.retry_after(0.2),),
            )  # fmt: skip
        return await self._decisions.decide(request)

    async def GetCapacity(
        self, request: placement_service_pb2.GetCapacityRequest, context: Context
    ) -> placement_service_pb2.GetCapacityResponse:
        """Count what would fit."""
        moment = self._database.now()
        need = Need(claims.resources(request.resources), zone=request.availability_zone, now=moment)
        count, host_count = choose.capacity(self._view.hosts, need)
        explanation = choose.choose(self._view.hosts, need).explanation
        return placement_service_pb2.GetCapacityResponse(
            count=count, host_count=host_count, filters=explanation.filters
        )


class HostReportServicer(placement_service_pb2_grpc.HostReportServiceServicer):
    """Listens to hosts."""

    def __init__(self, opened: Database, view: View) -> None:
        self._database = opened
        self._view = view
        self._alive = Batch[tuple[str, int]](self._write_alive)

    async def _write_alive(self, streams: list[tuple[str, int]]) -> set[tuple[str, int]]:
        current, moment = await self._database.write_at_once(
            store.keep_alive, self._database, streams
        )
        self._view.hosts.heard({host_id: moment for host_id, _ in current})
        return current

    async def ReportHost(
        self,
        requests: AsyncIterator[placement_service_pb2.ReportHostRequest],
        context: Context,
    ) -> AsyncIterator[placement_service_pb2.ReportHostResponse]:
        """Record each report; the whole of it only when something changed."""
        host_id = auth.caller().host_id
        number, seen = 0, b""
        async for report in requests:
            if number == 0:
                number = await self._database.write(store.take_report_stream, host_id, report)
            facts = _facts(report)
            if facts == seen:
                current = await self._alive.add((host_id, number))
            else:
                current = await self._database.write(store.apply_report, host_id, number, report)
            if not current:
                raise errors.Conflict("SESSION_SUPERSEDED", "another stream of this host is newer")
            seen = facts
            yield placement_service_pb2.ReportHostResponse(sequence=report.sequence)


def _facts(report: placement_service_pb2.ReportHostRequest) -> bytes:
    """Return what of a report is worth writing, to compare with the last."""
    copy = placement_service_pb2.ReportHostRequest()
    copy.CopyFrom(report)
    for field in ("sequence", "time", "domains"):
        copy.ClearField(field)
    return copy.SerializeToString(deterministic=True)


def register(runtime: Runtime) -> None:
    """Offer the scheduler's services."""
    opened = runtime.database("compute", model.open_database)
    view = View(opened, runtime.settings)
    decisions = Decisions(opened, runtime.settings, view)
    placement = PlacementServicer(opened, view, decisions)
    runtime.add(placement_service_pb2_grpc.add_PlacementServiceServicer_to_server, placement)
    runtime.add(
        invariant_service_pb2_grpc.add_InvariantServiceServicer_to_server,
        InvariantServicer(opened, view),
    )
    runtime.add(
        placement_service_pb2_grpc.add_HostReportServiceServicer_to_server,
        HostReportServicer(opened, view),
    )
    runtime.background(view.follow(), "host view")
    runtime.background(decisions.work(), "scheduler")
