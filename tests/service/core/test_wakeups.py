"""Who waits for changes is woken by those that matter to it, and by other processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peewee
import pytest

from fixtures_postgresql import postgresql_server, postgresql_url  # noqa: F401
from mcloud_controlplane.core import schema, tables, wakeups
from mcloud_controlplane.core.database import Database

_PROXY = peewee.DatabaseProxy()
_SHARED = tables.bind(_PROXY)
_ELSEWHERE = """
import sys, peewee
from mcloud_controlplane.core import schema, tables
proxy = peewee.DatabaseProxy()
opened = schema.open_database("image", sys.argv[1], proxy, tables.bind(proxy))
opened.write_now(tables.changed, sys.argv[2], "x-1", "")
opened.close()
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/wakeups.db"
    return str(request.getfixturevalue("postgresql_url")).replace("{name}", "compute")


@pytest.fixture
def opened(url: str) -> Iterator[Database]:
    database = schema.open_database("image", url, _PROXY, _SHARED)
    yield database
    database.close()


async def test_only_changes_of_the_wanted_types_wake(opened: Database) -> None:
    with opened.listening("host") as host, opened.listening() as everything:
        woken = []
        for number in range(5):
            host.clear()
            everything.clear()
            await opened.write(tables.changed, "operation", f"op-{number}", "")
            async with asyncio.timeout(10):
                await everything.wait()
            try:  # nor does its own commit come back as another's
                async with asyncio.timeout(0.3):
                    await host.wait()
            except TimeoutError:
                pass
            woken.append(host.is_set())
        # Commits of the file's other users, such as who made its tables, may wake anybody once.
        assert not all(woken)
        host.clear()
        await opened.write(tables.changed, "host", "h-1", "")
        async with asyncio.timeout(10):
            await host.wait()


async def test_who_waits_for_one_resource_is_woken_by_that_one(opened: Database) -> None:
    async with asyncio.timeout(30):
        with opened.listening("host", id_="h-1") as one, opened.listening("host") as any_:
            woken = []
            for id_ in ("h-2", "h-3"):
                any_.clear()
                one.clear()
                await opened.write(tables.changed, "host", id_, "")
                await any_.wait()
                woken.append(one.is_set())
            # A commit of the file's other users may wake anybody, but not each time.
            assert not all(woken)
            await opened.write(tables.changed, "host", "h-1", "")
            await one.wait()


async def test_another_processs_commit_wakes(opened: Database, url: str) -> None:
    with opened.listening("host") as host:
        command = [sys.executable, "-c", _ELSEWHERE, url, "host"]
        await asyncio.to_thread(subprocess.run, command, check=True, timeout=60)
        async with asyncio.timeout(10):
            await host.wait()


async def test_what_has_changed_is_gathered_until_it_is_taken(opened: Database) -> None:
    async with asyncio.timeout(30):
        with opened.gathering("host", "desired") as gathered:
            told = set()
            for type_, id_ in (("host", "h-1"), ("operation", "op-1"), ("desired", "h-2")):
                await opened.write(tables.changed, type_, id_, "")
            while not {("host", "h-1"), ("desired", "h-2")} <= told:
                await gathered.event.wait()
                told |= gathered.take()
                assert not gathered.event.is_set()
            assert ("operation", "op-1") not in told


async def test_of_another_processs_commit_as_much_is_told_as_is_known(
    opened: Database, url: str
) -> None:
    with opened.gathering("host") as gathered:
        command = [sys.executable, "-c", _ELSEWHERE, url, "host"]
        await asyncio.to_thread(subprocess.run, command, check=True, timeout=60)
        wanted = ("host", "x-1") if opened.is_postgresql else wakeups.ANYTHING
        told: set[wakeups.Concern] = set()
        async with asyncio.timeout(10):
            while wanted not in told:
                await gathered.event.wait()
                told |= gathered.take()
