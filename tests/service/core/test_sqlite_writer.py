"""Units that wait run together: each for itself, in the order of their coming, once committed."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import peewee
import pytest

from mcloud_base import errors
from mcloud_controlplane.core import database, schema, sqlite_writer, tables
from mcloud_controlplane.core.database import Database

_PROXY = peewee.DatabaseProxy()
_SHARED = tables.bind(_PROXY)
_CHANGE = _SHARED.change


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "writer.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Database]:
    found = schema.open_database("image", f"sqlite://{path}", _PROXY, _SHARED)
    yield found
    found.close()


def note(id_: str, *, then: Exception | None = None) -> str:
    """Log a change of a thing; raise, if told so."""
    _SHARED.lease.create(name=id_, owner="", expire_time=0)
    tables.changed("thing", id_, "")
    if then is not None:
        raise then
    return id_


def things() -> list[tuple[int, str]]:
    query: Any = _CHANGE.select(_CHANGE.revision, _CHANGE.resource_id)
    return list(query.where(_CHANGE.type == "thing").order_by(_CHANGE.revision).tuples())


def noted() -> list[str]:
    return sorted(row.name for row in _SHARED.lease.select())


async def test_units_that_come_together_are_committed_together(opened: Database) -> None:
    before = await opened.read(_SHARED.revision)
    done: list[str] = []

    def unit(id_: str) -> str:
        database.unit().after_commit.append(lambda: done.append(id_))
        return note(id_)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(opened.write(unit, f"t-{n}")) for n in range(20)]
    assert [task.result() for task in tasks] == [f"t-{n}" for n in range(20)]
    assert done == [f"t-{n}" for n in range(20)]
    # Each change has a revision of its own, in the order of the units, without a gap.
    expected = [(before + 1 + n, f"t-{n}") for n in range(20)]
    assert await opened.read(things) == expected


async def test_what_fails_takes_nobody_else_with_it(opened: Database) -> None:
    def unwanted(id_: str) -> str:
        database.unit().rollback = True
        return note(id_)

    results = await asyncio.gather(
        opened.write(note, "a"),
        opened.write(note, "b", then=errors.NotFound("GONE", "it is gone")),
        opened.write(unwanted, "c"),
        opened.write(note, "a"),  # twice: the second cannot be
        opened.write(note, "d"),
        opened.write(note, "e", then=RuntimeError("a fault")),
        return_exceptions=True,
    )
    kinds = [result if isinstance(result, str) else type(result) for result in results]
    assert kinds == ["a", errors.NotFound, "c", peewee.IntegrityError, "d", RuntimeError]
    assert await opened.read(noted) == ["a", "d"]
    assert [id_ for _, id_ in await opened.read(things)] == ["a", "d"]


async def test_what_fails_after_the_commit_is_told_to_its_own_only(opened: Database) -> None:
    def unit(id_: str) -> str:
        def fail() -> None:
            raise RuntimeError("a fault")

        database.unit().after_commit.append(fail)
        return note(id_)

    results = await asyncio.gather(
        opened.write(unit, "a"), opened.write(note, "b"), return_exceptions=True
    )
    assert [type(result) for result in results] == [RuntimeError, str]
    assert await opened.read(noted) == ["a", "b"]


async def test_a_fault_in_the_log_of_changes_holds_nobody_up(opened: Database) -> None:
    first, *results = await asyncio.gather(
        opened.write(note, "0"),  # at once; the others wait, and have one transaction
        opened.write(tables.changed, "thing", object(), ""),  # type: ignore[arg-type]
        opened.write(note, "a"),
        return_exceptions=True,
    )
    assert first == "0"
    assert all(isinstance(result, Exception) for result in results)
    assert await opened.write(note, "b") == "b"
    assert await opened.read(noted) == ["0", "b"]


async def test_a_unit_that_comes_after_a_rest_needs_no_turn_of_the_loop(opened: Database) -> None:
    turns: list[str] = []
    asyncio.get_running_loop().call_soon(turns.append, "a turn")
    assert await opened.write(note, "a") == "a"
    assert not turns
    assert await opened.read(noted) == ["a"]


async def test_atomic_within_a_unit_is_taken_back_alone(opened: Database) -> None:
    def unit() -> None:
        note("kept")
        with pytest.raises(errors.NotFound), opened.peewee.atomic():
            note("not kept", then=errors.NotFound("GONE", "it is gone"))

    await asyncio.gather(opened.write(note, "other"), opened.write(unit))
    assert await opened.read(noted) == ["kept", "other"]


async def test_what_nobody_waits_for_any_more_is_not_begun(opened: Database) -> None:
    first = asyncio.create_task(opened.write(note, "first"))
    dropped = asyncio.create_task(opened.write(note, "dropped"))
    await asyncio.sleep(0)
    dropped.cancel()
    await first
    token = database.deadline.set(0.0)
    with pytest.raises(errors.DeadlineExceeded):
        await opened.write(note, "late")
    database.deadline.reset(token)
    assert await opened.read(noted) == ["first"]


async def test_the_urgent_goes_first(opened: Database) -> None:
    order: list[str] = []
    await asyncio.gather(
        opened.write(order.append, "at once"),
        opened.write(order.append, "a"),
        opened.write(order.append, "b"),
        opened.write_at_once(order.append, "urgent"),
    )
    assert order == ["at once", "urgent", "a", "b"]


async def test_another_program_that_writes_is_waited_for(opened: Database, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(opened.write(note, "a"))
    # The loop goes on meanwhile, and reads.
    for _ in range(10):
        assert await opened.read(noted) == []
    assert not writing.done()
    other.execute("COMMIT")
    other.close()
    async with asyncio.timeout(30):
        assert await writing == "a"


async def test_a_program_that_does_not_let_go_is_told_of(opened: Database, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    results = await asyncio.gather(
        opened.write(note, "a"), opened.write(note, "b"), return_exceptions=True
    )
    other.execute("COMMIT")
    other.close()
    reasons = [getattr(result, "reason", "") for result in results]
    assert reasons == ["DATABASE_UNAVAILABLE"] * 2
    assert await opened.write(note, "c") == "c"
    assert await opened.read(noted) == ["c"]


async def test_a_commit_that_fails_fails_for_all_of_it(tmp_path: Path) -> None:
    """The disk is full: nothing of the transaction is there, and the next one succeeds."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount one")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]
    subprocess.run(mount, check=True)
    try:
        opened = schema.open_database("image", f"sqlite://{disk}/writer.db", _PROXY, _SHARED)
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
        results = await asyncio.gather(
            *(opened.write(note, f"{n}-{'x' * 20_000}") for n in range(20)), return_exceptions=True
        )
        failed = [result for result in results if isinstance(result, errors.Unavailable)]
        assert failed
        assert {error.reason for error in failed} == {"DATABASE_FULL"}
        filler.unlink()
        there = [result for result in results if isinstance(result, str)]
        assert await opened.read(noted) == sorted(there)
        assert await opened.write(note, "after") == "after"
        opened.close()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_each_loop_has_a_writer(opened: Database) -> None:
    for number in range(3):
        assert asyncio.run(opened.write(note, f"t-{number}")) == f"t-{number}"
    assert opened.read_now(noted) == ["t-0", "t-1", "t-2"]


def test_a_thread_that_closes_it_does_not_cross_the_loop(path: Path) -> None:
    """In a process of its own: SQLite ends one in which a connection is closed while it is used."""
    ended = subprocess.run([sys.executable, "-c", _CLOSING, path], check=False, timeout=120)
    assert ended.returncode == 0


_CLOSING = """
import asyncio, sys, peewee
from mcloud_controlplane.core import schema, sqlite_writer, tables
sqlite_writer._LOOK_S = 0  # the loop uses the connection all the time
proxy = peewee.DatabaseProxy()
shared = tables.bind(proxy)
async def main():
    for number in range(30):
        opened = schema.open_database("image", f"sqlite://{sys.argv[1]}", proxy, shared)
        await opened.write(lambda: shared.lease.create(name=f"{number}", owner="", expire_time=0))
        await asyncio.to_thread(opened.close)
asyncio.run(main())
"""


async def test_what_waits_when_it_closes_is_told(opened: Database) -> None:
    done = asyncio.create_task(opened.write(note, "done"))
    waiting = asyncio.create_task(opened.write(note, "a"))
    await asyncio.sleep(0)
    opened.close()
    assert await done == "done"
    with pytest.raises(errors.Unavailable):
        await waiting
    with pytest.raises(errors.Unavailable):
        await opened.write(note, "b")


@pytest.mark.parametrize("quick_s", [60.0, 0.0])
async def test_where_commits_are_slow_a_thread_does_them(
    opened: Database, monkeypatch: pytest.MonkeyPatch, quick_s: float
) -> None:
    """Alike for those who wait: what is taken back, alone or beside others, is not there."""
    monkeypatch.setattr(sqlite_writer, "_QUICK_S", quick_s)

    def unwanted(id_: str) -> str:
        database.unit().rollback = True
        return note(id_)

    for number in range(8):
        assert await opened.write(note, f"k-{number}") == f"k-{number}"
        assert await opened.write(unwanted, f"u-{number}") == f"u-{number}"
        with pytest.raises(errors.NotFound):
            await opened.write(note, f"f-{number}", then=errors.NotFound("GONE", "it is gone"))
        await asyncio.gather(opened.write(unwanted, "u"), opened.write(note, f"l-{number}"))
    expected = [f"{kind}-{number}" for kind in "kl" for number in range(8)]
    assert await opened.read(noted) == expected
