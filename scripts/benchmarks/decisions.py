"""The scheduler: one decision with its claim, at 100 to 10,000 hosts, empty and 90 % full.

Through its own contract, as the conductor asks: each decision is a call, a choice among all hosts,
and a transaction that claims and queues the domain. The hosts are rows without agents, since
10,000 agents do not fit a machine; no host that reports costs its report here (hosts_2000 has
that). Alone, and by 64 callers. Then the same among 1,000 hosts for members of four server groups
with anti-affinity, each with a member on every second host already. At last 64 callers ask 20 hosts
for more than there is room: what is given out must be exactly that.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import fixtures, load, report, services, simulated, yardsticks
from benchmarks.cloud import ControlPlane
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure
from benchmarks.simulated import Cloud
from mcloud.scheduler.v1 import (
    placement_pb2,
    placement_service_pb2,
    placement_service_pb2_grpc,
)
from mcloud_base import errors, ids, rpc

CALLERS = 64
_BRIM_HOSTS = 20
_BRIM_ROOM = _BRIM_HOSTS * fixtures.HOST_VCPUS * 4 // 10  # what is left of nine tenths: vCPUs
_LOAD_S = 120.0
_APART_HOSTS = 1_000  # twice as many as a server group has members before, and room for all of them
_APART_GROUPS = 4


@dataclass
class Samples:
    """One a repeat."""

    p50_ms: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    bare_ms: list[float] = field(default_factory=list)
    overcommitted: int = 0
    broken: int = 0


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    figures = []
    overcommitted = _brim(plan)
    for count in plan.size((100, 1_000, 10_000), (100, 1_000)):
        for full in (False, True):
            samples = _decide(plan, count, full=full)
            overcommitted += samples.overcommitted
            figures += _figures("decision", f"{count}_full" if full else f"{count}", samples)
    apart = _decide(plan, _APART_HOSTS, groups=_APART_GROUPS)
    return [
        *figures,
        *_figures("decision_anti_affinity", f"{_APART_HOSTS}", apart),
        report.figure("decision_overcommit", [overcommitted + apart.overcommitted], "hosts"),
        report.figure("decision_anti_affinity_broken", [apart.broken], "hosts"),
    ]


def _figures(prefix: str, suffix: str, samples: Samples) -> list[Figure]:
    bare = samples.bare_ms
    rates = [1000 / each for each in bare]
    return [
        report.figure(f"{prefix}_p50_{suffix}", samples.p50_ms, "ms", yardstick=bare),
        report.figure(f"{prefix}_rate_{suffix}", samples.rate, "/s", yardstick=rates),
    ]


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever more hosts."""
    points = []
    for count in plan.size((100, 1_000, 3_000, 10_000), (50, 100, 200, 400)):
        samples = _decide(Plan(1, plan.quick, plan.database), count)
        points.append((count, samples.p50_ms[0]))
    return [Curve("decision_p50", "ms", "hosts", points)]


def _decide(plan: Plan, count: int, *, full: bool = False, groups: int = 0) -> Samples:
    with simulated.running(plan) as cloud:
        fixtures.add_hosts(cloud.plane, count, full=full)
        group_ids = fixtures.add_server_groups(cloud.plane, groups)
        samples = asyncio.run(_measure(plan, cloud, count, group_ids))
        samples.overcommitted = fixtures.overcommitted(cloud.plane)
        samples.broken = fixtures.misplaced(cloud.plane)
    return samples


async def _measure(plan: Plan, cloud: Cloud, count: int, group_ids: Sequence[str]) -> Samples:
    samples = Samples()
    turns = itertools.cycle(group_ids or [""])
    reporting = fixtures.hosts_reporting(cloud.plane)
    async with reporting, services.channel(cloud.plane) as channel:
        stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
        await _until_all_are_known(stub, count)

        async def decide() -> None:
            await stub.SelectDestinations(_request(group_id=next(turns)), timeout=60)

        await load.calls(decide, 1, plan.size(20, 2))
        for _ in range(plan.repeats):
            found = await load.calls(decide, 1, plan.size(100, 20))
            samples.p50_ms.append(found.median_ms)
            found = await load.calls(decide, CALLERS, plan.size(320, CALLERS))
            samples.rate.append(found.rate)
            bare = await yardsticks.accepted(cloud.plane, cloud.place, plan.size(100, 20))
            samples.bare_ms.append(1000 * report.percentile(bare, 50))
    return samples


async def _until_all_are_known(
    stub: placement_service_pb2_grpc.PlacementServiceAsyncStub, count: int
) -> None:
    """Wait until the scheduler looks at so many hosts."""
    async with asyncio.timeout(_LOAD_S):
        while await _known(stub) < count:
            await asyncio.sleep(0.1)


async def _known(stub: placement_service_pb2_grpc.PlacementServiceAsyncStub) -> int:
    try:
        request = _request(dry_run=True)
        answer = await rpc.call(stub.SelectDestinations, request, timeout_s=_LOAD_S)
    except errors.Exhausted:  # none yet
        return 0
    return int(answer.explanation.considered_count)


def _brim(plan: Plan) -> int:
    """Ask for more than there is; return how much more, or less, than that was given."""
    with simulated.running(plan) as cloud:
        fixtures.add_hosts(cloud.plane, _BRIM_HOSTS, full=True)
        given = asyncio.run(_until_refused(cloud.plane))
        return fixtures.overcommitted(cloud.plane) + abs(given - _BRIM_ROOM)


async def _until_refused(plane: ControlPlane) -> int:
    given = 0
    async with fixtures.hosts_reporting(plane), services.channel(plane) as channel:
        stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
        await _until_all_are_known(stub, _BRIM_HOSTS)

        async def decide() -> None:
            nonlocal given
            try:
                await rpc.call(stub.SelectDestinations, _request(), timeout_s=60)
                given += 1
            except errors.Exhausted as error:
                if error.reason != "NO_VALID_HOST":
                    raise

        await load.calls(decide, CALLERS, _BRIM_ROOM + 2 * CALLERS)
    return given


def _request(
    *, group_id: str = "", dry_run: bool = False
) -> placement_service_pb2.SelectDestinationsRequest:
    return placement_service_pb2.SelectDestinationsRequest(
        domain_id=ids.new("d"),
        instance_id=ids.new("i"),
        project_id="bench",
        resources=placement_pb2.Resources(vcpu_count=1, memory_mib=256, disk_gib=1),
        server_group_id=group_id,
        dry_run=dry_run,
    )
