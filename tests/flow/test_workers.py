"""A daemon with several processes on the same ports."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fakes import releases
from fakes.daemon import Daemon
from fakes.light_host import Gate, LightHost
from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import flavor_service_pb2, flavor_service_pb2_grpc
from mcloud_base import errors, ids, rpc, tls
from mcloud_controlplane.compute import model
from mcloud_controlplane.core import migrations, pki, processes
from service.compute.instances import Instances

DEADLINE_S = 60


@pytest.fixture
def daemon(tmp_path: Path, free_ports: Callable[[int], list[int]]) -> Iterator[Daemon]:
    made = Daemon(tmp_path, tmp_path / "state", free_ports(2), "sqlite")
    made.config.write_text(made.config.read_text() + "workers = 2\n")
    made.start()
    yield made
    made.kill()


@pytest.fixture
async def calls(daemon: Daemon) -> AsyncIterator[list[str]]:
    """What calls that follow each other without a pause have answered: "" or a reason."""
    client = daemon.client()
    stub = flavor_service_pb2_grpc.FlavorServiceStub(client.public)
    who = await client.login()
    answers: list[str] = []

    async def call() -> None:
        while True:
            try:
                await rpc.call(
                    stub.ListFlavors, flavor_service_pb2.ListFlavorsRequest(), metadata=who
                )
                answers.append("")
            except errors.Error as error:
                answers.append(error.reason)

    calling = asyncio.create_task(call())
    yield answers
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    await client.close()


async def until(look: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not look():
            await asyncio.sleep(0.01)


async def test_a_killed_worker_is_there_again_and_callers_see_nothing(
    daemon: Daemon, calls: list[str]
) -> None:
    await until(lambda: len(workers(daemon)) == 2)
    for _ in range(3):
        before = workers(daemon)
        answered = len(calls)
        os.kill(min(before), signal.SIGKILL)
        await until(lambda: len(workers(daemon) - before) == 1)  # noqa: B023 (awaited here)
        await until(lambda: len(calls) > answered + 10)  # noqa: B023
    assert set(calls) == {""}
    assert daemon.log().count("worker ended") == 3


async def test_workers_end_with_the_daemon(daemon: Daemon) -> None:
    known = workers(daemon)
    daemon.stop()
    assert not any(map(lives, known))


async def test_workers_do_not_outlive_the_first_process(daemon: Daemon) -> None:
    known = workers(daemon)
    daemon.kill()
    await until(lambda: not any(map(lives, known)))
    daemon.start()  # the ports are free


async def test_a_second_daemon_is_refused(daemon: Daemon) -> None:
    done = await asyncio.to_thread(daemon.run)
    assert done.returncode == 1
    assert "PORT_IN_USE" in done.stderr


async def test_what_no_worker_can_mend_ends_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    daemon.stop()
    newer = processes.Process(releases.to_0_2(tmp_path), ("compute",))
    with closing(model.open_database(f"sqlite://{tmp_path}/state/compute.db", newer)) as opened:
        migrations.Migrator("compute", opened, model.shared, newer.release).advance(contract=True)
    done = await asyncio.to_thread(daemon.run)
    assert done.returncode == 1
    assert "SCHEMA_UNKNOWN" in done.stderr


async def test_a_worker_goes_on_at_once_with_what_its_predecessor_held(
    daemon: Daemon, tmp_path: Path
) -> None:
    daemon.stop()
    # By itself a lease would run out after the test's deadline.
    daemon.config.write_text(daemon.config.read_text() + "operation_lease_s = 3600\n")
    await asyncio.to_thread(daemon.start)
    authority, key, id_ = daemon.plane.authority(), tls.new_key(), ids.new("h")
    certificate = authority.issue_host(tls.signing_request(key, id_), id_, "127.0.0.1")
    identity = tls.Identity(key, pki._pem(certificate), authority.certificate)
    gate = Gate()
    async with LightHost(tmp_path / "host", daemon.plane.internal, identity, id_, probe=gate):
        instances = await Instances(daemon.client()).prepare()
        gate.shut = True
        creating = await instances.create("held")
        async with asyncio.timeout(DEADLINE_S):
            await gate.reached.wait()
        known = workers(daemon)
        for pid in known:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: len(workers(daemon) - known) == 2)
        gate.open.set()
        ended = await instances.wait(creating)
        assert ended.state == operation_pb2.Operation.STATE_SUCCEEDED, ended.error
        await instances.client.close()


def workers(daemon: Daemon) -> set[int]:
    assert daemon._process is not None
    pid = daemon._process.pid
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
