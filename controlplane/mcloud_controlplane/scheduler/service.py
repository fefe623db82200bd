"""Serves mcloud.scheduler.v1: PlacementService and HostReportService."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

import structlog

from mcloud.common.v1 import operation_pb2
from mcloud.scheduler.v1 import (
    invariant_service_pb2_grpc,
    placement_pb2,
    placement_service_pb2,
    placement_service_pb2_grpc,
)
from mcloud_base import errors
from mcloud_controlplane.compute import model
from mcloud_controlplane.core import auth, convert, database
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.batch import Batch
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.scheduler import choose, filters, store
from mcloud_controlplane.scheduler.hosts import Hosts, Need
from mcloud_controlplane.scheduler.invariants import InvariantServicer
from mcloud_controlplane.settings import Settings

log = structlog.get_logger()

_QUEUE_LIMIT = 1000
_FOLLOW_S = 5.0  # the net under the wake-ups
_HEARD_S = 2.0  # how old the times of the last reports may be
_ROUNDS = 4  # in which every candidate was lost to others, before the request is refused


class View:
    """The hosts in memory, following the database's change log.

    That a host lives is no change: when each has reported last, whichever process it reports to,
    is read again at intervals.
    """

    def __init__(self, opened: Database, settings: Settings) -> None:
        self._database = opened
        self._settings = settings
        self.hosts = Hosts()
        self.loaded = asyncio.Event()
        self.revision = 0  # up to which the view is complete
        self._refreshing = asyncio.Lock()

    async def follow(self) -> None:
        """Load all hosts, then what changes, for ever."""
        revision: int | None = None
        heard = 0.0
        with self._database.listening("host") as event:
            while True:
                event.clear()
                try:
                    head, changed = await self._database.read(store.changed_hosts, revision)
                    if changed is None or changed:
                        await self.refresh(changed)
                    revision = self.revision = head  # not before: a refresh may fail
                    if time.monotonic() - heard > _HEARD_S:
                        self.hosts.heard(await self._database.read(store.report_times))
                        heard = time.monotonic()
                    self.loaded.set()
                except errors.Error as error:
                    log.warning("view of hosts is not refreshed", reason=error.reason)
                try:
                    async with asyncio.timeout(_FOLLOW_S):
                        await event.wait()
                except TimeoutError:
                    continue

    async def refresh(self, host_ids: Collection[str] | None) -> None:
        """Read hosts again; None: all. One after the other: what was read later stays."""
        async with self._refreshing:
            records = await self._database.read(store.load_hosts, self._settings, host_ids)
            self.hosts = self.hosts.update(records)

    async def compare(self) -> tuple[int, list[str]]:
        """Return how many hosts are known, and of which it is not known what is recorded.

        Those that changed after the view's revision are on their way here.
        """
        async with self._refreshing:
            records, changed = await self._database.read(
                store.load_and_changed, self._settings, self.revision
            )
            return len(records), [
                id_
                for id_ in {**records, **self.hosts.index}
                if changed is not None
                and id_ not in changed
                and not self.hosts.shows(id_, records.get(id_))
            ]


@dataclass
class _Request:
    """A request in the queue."""

    message: placement_service_pb2.SelectDestinationsRequest
    queue_time: int
    answer: asyncio.Future[placement_service_pb2.SelectDestinationsResponse]


class PlacementServicer(placement_service_pb2_grpc.PlacementServiceServicer):
    """Finds room."""

    def __init__(self, opened: Database, settings: Settings, view: View) -> None:
        self._database = opened
        self._settings = settings
        self._view = view
        self._queue: asyncio.Queue[_Request] = asyncio.Queue(_QUEUE_LIMIT)
        self._turn = 0

    async def SelectDestinations(
        self, request: placement_service_pb2.SelectDestinationsRequest, context: Context
    ) -> placement_service_pb2.SelectDestinationsResponse:
        """Queue the request (step 6 takes it from there) and return what was decided."""
        if not self._view.loaded.is_set():
            raise errors.Unavailable(
                "HOST_VIEW_LOADING", "the scheduler is still reading the hosts",
                details=(errors.retry_after(0.2),),
            )  # fmt: skip
        queued = _Request(request, database.now(), asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(queued)
        except asyncio.QueueFull as error:
            raise errors.Exhausted(
                "QUEUE_FULL", f"{_QUEUE_LIMIT} requests wait for the scheduler",
                details=(errors.retry_after(1),),
            ) from error  # fmt: skip
        return await queued.answer

    async def GetCapacity(
        self, request: placement_service_pb2.GetCapacityRequest, context: Context
    ) -> placement_service_pb2.GetCapacityResponse:
        """Count what would fit."""
        moment = self._database.now()
        need = _need(request.resources, moment, zone=request.availability_zone)
        count, host_count = choose.capacity(self._view.hosts, need)
        explanation = choose.choose(self._view.hosts, need).explanation
        return placement_service_pb2.GetCapacityResponse(
            count=count, host_count=host_count, filters=explanation.filters
        )

    async def work(self) -> None:
        """Decide on one request after the other, for ever."""
        while True:
            queued = await self._queue.get()
            if queued.answer.cancelled():
                continue
            try:
                answer = await self._decide(queued)
            except Exception as error:
                # Whatever it is, it is this request's; the next one is decided all the same.
                if not queued.answer.done():
                    queued.answer.set_exception(error)
            else:
                if not queued.answer.done():
                    queued.answer.set_result(answer)

    async def _decide(self, queued: _Request) -> placement_service_pb2.SelectDestinationsResponse:
        """Take the request (6), filter, weigh and claim (7)."""
        taken, request = database.now(), queued.message
        need = _need(
            request.resources,
            self._database.now(),
            host_id=request.host_id,
            zone=request.availability_zone,
            arch=request.cpu_arch,
            excluded=frozenset(request.excluded_host_ids),
        )
        self._turn += 1
        for number in range(_ROUNDS):
            choice = choose.choose(self._view.hosts, need, turn=self._turn)
            choice.explanation.duration_us = database.now() - queued.queue_time
            if not choice.candidates:
                break
            if request.dry_run:
                return placement_service_pb2.SelectDestinationsResponse(
                    explanation=choice.explanation
                )
            claim = await self._claim_one(request, choice, wait=number > 0)
            if claim is not None:
                await self._view.refresh([claim.host_id])  # for the next decision
                log.info("host claimed", step=7, instance=request.instance_id, host=claim.host_name)
                return placement_service_pb2.SelectDestinationsResponse(
                    claim=claim,
                    explanation=choice.explanation,
                    steps=_steps(queued.queue_time, taken, claim.host_name),
                )
            # Others were quicker, or the view is old: look what is left.
            await self._view.refresh(choice.candidates)
        if not request.dry_run:
            # A repeat, after its first time has taken what room there was.
            earlier = await self._database.read(store.find_claim, request.domain_id)
            if earlier is not None:
                return placement_service_pb2.SelectDestinationsResponse(
                    claim=earlier, steps=_steps(queued.queue_time, taken, earlier.host_name)
                )
            if filters.all_just_fell_silent(self._view.hosts, need):
                raise errors.Unavailable(
                    "HOSTS_SILENT",
                    "no host answers just now; try again in a moment",
                    details=(errors.retry_after(2),),
                )
            await self._database.write(store.record_placement, request, choice.explanation)
        raise _no_valid_host(choice.explanation)

    async def _claim_one(
        self,
        request: placement_service_pb2.SelectDestinationsRequest,
        choice: choose.Choice,
        *,
        wait: bool,
    ) -> placement_pb2.Claim | None:
        """Claim the best candidate that can be had; None: none can.

        Args:
            wait: for those on which others are claiming; otherwise the next one is tried.
        """
        for place, host_id in enumerate(choice.candidates):
            claim = await self._database.write(
                store.claim,
                self._database,
                self._settings,
                request,
                host_id,
                choice.explanation,
                wait=wait,
            )
            if claim is not None:
                return claim
            if place < len(choice.explanation.top_hosts):
                rejected = choice.explanation.top_hosts[place]
                rejected.rejected = "taken by another claim, or just disabled"
        return None


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


def _need(
    resources: placement_pb2.Resources,
    now: int,
    *,
    host_id: str = "",
    zone: str = "",
    arch: str = "",
    excluded: frozenset[str] = frozenset(),
) -> Need:
    return Need(
        resources=(
            float(resources.vcpu_count),
            float(resources.memory_mib),
            float(resources.disk_gib),
        ),
        host_id=host_id,
        zone=zone,
        arch=arch,
        excluded=excluded,
        now=now,
    )


def _steps(queued: int, taken: int, host_name: str) -> list[operation_pb2.OperationStep]:
    here = socket.gethostname()
    done = operation_pb2.OperationStep.STATE_DONE
    return [
        operation_pb2.OperationStep(
            number=6, name="take the request", service="scheduler", host=here, state=done,
            start_time=convert.timestamp(queued), end_time=convert.timestamp(taken),
        ),
        operation_pb2.OperationStep(
            number=7, name="filter, weigh, claim", service="scheduler", host=here, state=done,
            start_time=convert.timestamp(taken), end_time=convert.timestamp(database.now()),
            detail=f"{host_name} claimed",
        ),
    ]  # fmt: skip


def _no_valid_host(explanation: placement_pb2.PlacementExplanation) -> errors.Exhausted:
    removed = [item for item in explanation.filters if item.removed_count]
    last = next((item.reason for item in reversed(removed) if item.reason), "")
    why = last or ("there are no hosts" if not explanation.considered_count else "all were taken")
    return errors.Exhausted(
        "NO_VALID_HOST",
        f"no host can take the instance: {why}",
        details=(explanation,),
        considered=explanation.considered_count,
    )


def register(runtime: Runtime) -> None:
    """Offer the scheduler's services."""
    opened = runtime.database("compute", model.open_database)
    view = View(opened, runtime.settings)
    placement = PlacementServicer(opened, runtime.settings, view)
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
    runtime.background(placement.work(), "scheduler")
