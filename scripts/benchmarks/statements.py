"""What a boot with a NIC costs the databases: SQL statements, transactions, fsyncs.

Counted where the control plane gives statements to its driver (counted.py), so alike for both
databases; BEGIN and the like are no statements, a COMMIT is a transaction. What the same control
plane does at rest in that time is taken off. fsyncs are the kernel's count for SQLite (`perf`; left
out where there is none), and PostgreSQL's own for its log.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg

from benchmarks import report, simulated
from benchmarks.client import Client
from benchmarks.cloud import ControlPlane
from benchmarks.plan import Plan
from benchmarks.report import Figure
from benchmarks.simulated import Cloud
from benchmarks.storm import Storm

CLIENTS = 8
_NO_STATEMENTS = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SET ")
_SHOWN = 15
_WIDTH = 100


@dataclass
class Samples:
    """Of a boot each; one a repeat."""

    statements: list[float] = field(default_factory=list)
    transactions: list[float] = field(default_factory=list)
    fsyncs: list[float] = field(default_factory=list)
    texts: Counter[str] = field(default_factory=Counter)  # of the last repeat


def run(plan: Plan) -> list[Figure]:
    """Measure; print the statements that are run most."""
    with simulated.running(plan, plan.size(100, 10), counted=True) as cloud:
        samples = asyncio.run(_measure(plan, cloud, plan.size(200, 20)))
    print(_most(samples.texts))
    figures = [
        report.figure("boot_statements", samples.statements, "statements"),
        report.figure("boot_transactions", samples.transactions, "transactions"),
    ]
    if samples.fsyncs:
        figures.append(report.figure("boot_fsyncs", samples.fsyncs, "fsyncs"))
    return figures


async def _measure(plan: Plan, cloud: Cloud, count: int) -> Samples:
    samples = Samples()
    async with Client(cloud.plane) as client:
        storm = Storm(client)
        await storm.prepare()
        await storm.create(CLIENTS, clients=CLIENTS, listed=False)
        for number in range(plan.repeats):
            resting_s = plan.size(10.0, 2.0)
            with _counting(cloud) as resting:
                await asyncio.sleep(resting_s)
            first = CLIENTS + number * count
            with _counting(cloud) as booting, _fsyncs(cloud) as fsyncs:
                created = await storm.create(count, clients=CLIENTS, first=first, listed=False)
            assert not created.failed, created.failed
            share = created.seconds / resting_s  # of what happens in any case
            samples.texts = Counter(
                {text: (times - resting[text] * share) / count for text, times in booting.items()}  # type: ignore[arg-type]
            )
            statements, transactions = _sums(samples.texts)
            samples.statements.append(statements)
            samples.transactions.append(transactions)
            samples.fsyncs += [each / count for each in fsyncs]
    return samples


def _sums(texts: Counter[str]) -> tuple[float, float]:
    """Return how many statements and how many transactions there are."""
    real = sum(times for text, times in texts.items() if not text.startswith(_NO_STATEMENTS))
    return real, texts["COMMIT"]


def run_by(plane: ControlPlane) -> int:
    """Return how many statements a control plane that counts them has run."""
    texts = simulated.statements(plane)
    return sum(times for text, times in texts.items() if not text.startswith(_NO_STATEMENTS))


@contextmanager
def _counting(cloud: Cloud) -> Iterator[Counter[str]]:
    """Give how often each statement was run within the block, once it has ended."""
    found: Counter[str] = Counter()
    before = simulated.statements(cloud.plane)
    yield found
    for text, times in simulated.statements(cloud.plane).items():
        found[text] = times - before.get(text, 0)


@contextmanager
def _fsyncs(cloud: Cloud) -> Iterator[list[int]]:
    """Give how many there were within the block, once it has ended; nothing if unknown."""
    found: list[int] = []
    if cloud.server is None:
        if not shutil.which("perf"):
            yield found
            return
        with _perf(cloud.plane.pid) as finish:
            yield found
            found += finish()
        return
    before = _wal_syncs(cloud)
    yield found
    found.append(_wal_syncs(cloud) - before)


@contextmanager
def _perf(pid: int) -> Iterator[Callable[[], list[int]]]:
    """Count the fsyncs of a process; gives what ends that and returns their number."""
    events = "syscalls:sys_enter_fsync,syscalls:sys_enter_fdatasync"
    process = subprocess.Popen(
        ["perf", "stat", "-x", ",", "-e", events, "-p", str(pid)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def finish() -> list[int]:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        counts = [line.split(",")[0] for line in said.splitlines() if "sys_enter" in line]
        return [sum(map(int, counts))] if counts and all(map(str.isdigit, counts)) else []

    try:
        yield finish
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wal_syncs(cloud: Cloud) -> int:
    with psycopg.connect(cloud.plane.database.replace("{name}", "postgres")) as server:
        row = server.execute("SELECT wal_sync FROM pg_stat_wal").fetchone()
    assert row is not None
    return int(row[0])


def _most(texts: Counter[str]) -> str:
    """Return the statements that a boot runs most often."""
    rows = [
        (f"{times:.1f}", " ".join(text.split())[:_WIDTH])
        for text, times in texts.most_common()
        if not text.startswith(_NO_STATEMENTS)
    ][:_SHOWN]
    return report.aligned([("A BOOT", "STATEMENT"), *rows])
