"""2,000 simulated hosts that report every 10 s: the control plane's CPU time and memory.

Nothing happens on them: what is measured is their reports and the leases of their sessions. The
simulator and the database's server are given beside it. The memory's yardstick is that of the same
control plane before they came.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field, replace

from benchmarks import report, simulated
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure

HOSTS = 2000


@dataclass
class Samples:
    """CPU times in per cent of a core, one a repeat; memory in MiB."""

    # Of the control plane ("") and of what is beside it.
    cpu: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory: float = 0.0
    memory_before: float = 0.0
    connected_s: float = 0.0


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    count = plan.size(HOSTS, 50)
    samples = _measure(plan, count)
    figure = report.figure
    return [
        *(figure(f"hosts_2000_cpu{name}", found, "%") for name, found in samples.cpu.items()),
        figure("hosts_2000_memory", [samples.memory], "MiB", yardstick=[samples.memory_before]),
        figure("hosts_2000_connected", [samples.connected_s], "s"),
        figure("hosts_a_core", [100 * count / max(each, 0.1) for each in samples.cpu[""]], "hosts"),
    ]


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever more hosts."""
    cpu, memory = [], []
    for count in plan.size((250, 500, 1000, 2000), (5, 10, 20, 40)):
        samples = _measure(Plan(1, plan.quick, plan.database), count)
        cpu.append((count, samples.cpu[""][0]))
        memory.append((count, samples.memory - samples.memory_before))
    return [
        Curve("hosts_cpu", "%", "hosts", cpu),
        Curve("hosts_memory_more", "MiB", "hosts", memory),
    ]


def _measure(plan: Plan, count: int) -> Samples:
    samples = Samples()
    with simulated.running(plan) as cloud:
        time.sleep(plan.size(5.0, 1.0))
        samples.memory_before = cloud.plane.processes.pss_mib()
        begin = time.monotonic()
        with simulated.simulator(cloud.plane, cloud.place / "simulator", count) as simulator:
            samples.connected_s = time.monotonic() - begin
            time.sleep(plan.size(30.0, 3.0))  # what follows a connection is over
            peopled = replace(cloud, simulator=simulator)
            for _ in range(plan.repeats):
                before, begin = peopled.cpu_s(), time.monotonic()
                time.sleep(plan.size(30.0, 10.0))
                seconds = time.monotonic() - begin
                for name, used in peopled.cpu_since(before).items():
                    samples.cpu[name].append(100 * used / seconds)
            samples.memory = cloud.plane.processes.pss_mib()
    return samples
