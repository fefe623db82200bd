"""2,000 simulated hosts that report every 10 s: the control plane's CPU time and memory.

Nothing happens on them: what is measured is their reports and the leases of their sessions. The
database's server counts as control plane, the simulator is given beside it; the memory's yardstick
is the same control plane before they came.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from benchmarks import processes, report, simulated
from benchmarks.plan import Plan
from benchmarks.report import Curve, Figure
from benchmarks.simulated import Cloud

HOSTS = 2000


@dataclass
class Samples:
    """CPU times in per cent of a core, one a repeat; memory in MiB."""

    cpu: list[float] = field(default_factory=list)
    cpu_simulator: list[float] = field(default_factory=list)
    memory: float = 0.0
    memory_before: float = 0.0
    connected_s: float = 0.0


def run(plan: Plan) -> list[Figure]:
    """Measure."""
    count = plan.size(HOSTS, 50)
    samples = _measure(plan, count)
    figure = report.figure
    return [
        figure("hosts_2000_cpu", samples.cpu, "%"),
        figure("hosts_2000_cpu_simulator", samples.cpu_simulator, "%"),
        figure("hosts_2000_memory", [samples.memory], "MiB", yardstick=[samples.memory_before]),
        figure("hosts_2000_connected", [samples.connected_s], "s"),
        figure("hosts_a_core", [100 * count / max(each, 0.1) for each in samples.cpu], "hosts"),
    ]


def growth(plan: Plan) -> list[Curve]:
    """Measure with ever more hosts."""
    cpu, memory = [], []
    for count in plan.size((250, 500, 1000, 2000), (5, 10, 20, 40)):
        samples = _measure(Plan(1, plan.quick, plan.database), count)
        cpu.append((count, samples.cpu[0]))
        memory.append((count, samples.memory - samples.memory_before))
    return [
        Curve("hosts_cpu", "%", "hosts", cpu),
        Curve("hosts_memory_more", "MiB", "hosts", memory),
    ]


def _measure(plan: Plan, count: int) -> Samples:
    samples = Samples()
    with simulated.running(plan) as cloud:
        time.sleep(plan.size(5.0, 1.0))
        samples.memory_before = _memory(cloud)
        begin = time.monotonic()
        with simulated.simulator(cloud.plane, cloud.place / "simulator", count) as simulator:
            samples.connected_s = time.monotonic() - begin
            time.sleep(plan.size(30.0, 3.0))  # what follows a connection is over
            families = (cloud.controlling, [simulator])
            for _ in range(plan.repeats):
                before = [processes.cpu_s(each) for each in families]
                begin = time.monotonic()
                time.sleep(plan.size(30.0, 10.0))
                seconds = time.monotonic() - begin
                for family, former, found in zip(
                    families, before, (samples.cpu, samples.cpu_simulator), strict=True
                ):
                    found.append(100 * (processes.cpu_s(family) - former) / seconds)
            samples.memory = _memory(cloud)
    return samples


def _memory(cloud: Cloud) -> float:
    return sum(family.pss_mib() for family in cloud.controlling)
