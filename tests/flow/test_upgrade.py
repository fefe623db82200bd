"""The next release comes while this one serves: nobody is refused, nothing is taken too early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import releases
from fakes.daemon import NEWER, Daemon
from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from mcloud.common.v1 import schema_pb2
from mcloud.compute.v1 import (
    instance_service_pb2,
    schema_service_pb2_grpc,
)
from mcloud_base import errors, rpc
from mcloud_controlplane import settings
from mcloud_controlplane.core import migrations
from mcloud_controlplane.maintenance import databases, migrate
from service.compute.instances import Instances
from service.core.cloud import Client
from service.core.keys import Keys

INSTANCES = 3
Kind = schema_pb2.SchemaMigration


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def daemons(
    request: pytest.FixtureRequest, tmp_path: Path, free_ports: Callable[[int], list[int]]
) -> Iterator[tuple[Daemon, Daemon]]:
    database = "sqlite"
    if request.param == "postgresql":
        database = str(request.getfixturevalue("postgresql_url"))
    ports, state = free_ports(4), tmp_path / "state"
    older = Daemon(tmp_path / "older", state, ports[:2], database)
    newer = Daemon(tmp_path / "newer", state, ports[2:], database)
    yield older, newer
    older.kill()
    newer.kill()


class Writer:
    """Somebody who goes on using the older daemon all the while."""

    def __init__(self, instances: Instances) -> None:
        self._keys = Keys(instances.client.public, instances.who)
        self._stop = asyncio.Event()
        self.rounds = 0
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stop.is_set():
            made = await self._keys.create(f"k{self.rounds}")
            assert await self._keys.names() == [f"k{self.rounds}"]
            await self._keys.delete(made.resource.id)
            self.rounds += 1

    async def stop(self) -> None:
        self._stop.set()
        await self.task  # whatever was refused, it raises


async def fail_to_boot(instances: Instances, name: str) -> str:
    """Make an instance that stays: there is no host, and it says so."""
    ended = await instances.wait(await instances.create(name))
    assert errors.from_status(ended.error).reason == "NO_VALID_HOST"
    return ended.resource.id


async def schema_of(client: Client) -> schema_pb2.Schema:
    stub = schema_service_pb2_grpc.SchemaServiceStub(client.public)
    found: schema_pb2.Schema = await rpc.call(
        stub.GetSchema, schema_pb2.GetSchemaRequest(), metadata=await client.login()
    )
    return found


def run_migrate(daemon: Daemon, release: migrations.Release, *, dry_run: bool = False) -> list[str]:
    return list(migrate.run(settings.load(daemon.config), dry_run=dry_run, release=release))


def memory_bytes(daemon: Daemon) -> dict[str, Any]:
    """Return the new column, by instance."""
    sql = "SELECT id, memory_bytes FROM instance"
    with databases.opened(settings.load(daemon.config), "compute") as opened:
        store: Any = opened.database
        return dict(store.read_now(lambda: store.peewee.execute_sql(sql).fetchall()))


async def test_the_next_release_takes_over_without_a_gap(
    daemons: tuple[Daemon, Daemon], tmp_path: Path
) -> None:
    older, newer = daemons
    await asyncio.to_thread(older.start)
    client = older.client()
    instances = await Instances(client).prepare()
    before = [await fail_to_boot(instances, f"vm-{n}") for n in range(INSTANCES)]
    writer = Writer(instances)

    await asyncio.to_thread(newer.start, NEWER)

    release = releases.to_0_2(newer.config.parent)
    assert {memory_bytes(older)[id_] for id_ in before} == {64 << 20}
    late = await fail_to_boot(instances, "late")  # by the older, which does not know the column
    newer_client = newer.client()
    seen = await rpc.call(
        Instances(newer_client).stub.GetInstance,
        instance_service_pb2.GetInstanceRequest(id=late),
        metadata=instances.who,
    )
    assert seen.metadata.name == "late"

    told = await schema_of(newer_client)
    assert {each.release for each in told.processes} == {migrations.THIS.version, "0.2.0"}
    assert [each.kind for each in told.migrations[-2:]] == [Kind.KIND_EXPAND, Kind.KIND_CONTRACT]
    assert told.migrations[-2].run_release == "0.2.0"
    assert not told.migrations[-1].HasField("run_time")
    assert not told.upgrade_ready
    assert not told.contract_ready
    assert "upgrade or stop release 0.1" in told.next_step
    assert (await schema_of(client)).number == 901  # the older sees what it does not know

    plan = run_migrate(newer, release, dry_run=True)
    assert any("0902_memory_bytes_only (CONTRACT)" in line for line in plan), plan
    assert any("refused while these live: release 0.1" in line for line in plan), plan
    with pytest.raises(errors.WrongState) as refused:
        run_migrate(newer, release)
    assert refused.value.reason == "OLDER_RELEASE_ALIVE"

    done = writer.rounds
    while writer.rounds < done + 5 and not writer.task.done():
        await asyncio.sleep(0.01)
    await writer.stop()
    assert memory_bytes(older)[late] is None
    await client.close()
    await asyncio.to_thread(older.stop)

    assert (await schema_of(newer_client)).contract_ready
    assert "compute: done" in run_migrate(newer, release)
    told = await schema_of(newer_client)
    assert (told.number, told.upgrade_ready) == (902, True)
    assert memory_bytes(newer)[late] == 64 << 20
    await newer_client.close()
    again = await asyncio.to_thread(older.run)
    assert again.returncode == 1
    assert "SCHEMA_UNKNOWN" in again.stderr
    await asyncio.to_thread(newer.stop)
