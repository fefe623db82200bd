"""Watches: nothing lost, nothing twice, resumed from where one was; also a slow one."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any

import psycopg
import pytest

from mcloud.common.v1 import metadata_pb2
from mcloud.compute.v1 import key_pair_service_pb2
from mcloud_base import errors, ids, rpc
from service.core.cloud import Client, ControlPlane, Rule, refused
from service.core.keys import Keys, new_project

ADDED = metadata_pb2.CHANGE_TYPE_ADDED
DELETED = metadata_pb2.CHANGE_TYPE_DELETED
BOOKMARK = metadata_pb2.CHANGE_TYPE_BOOKMARK
Event = key_pair_service_pb2.WatchKeyPairsResponse


@pytest.fixture
async def keys(client: Client) -> Keys:
    project = new_project()
    return Keys(client.public, await client.make_user(project, Rule.ROLE_MEMBER, project))


async def take(stream: Any, count: int) -> list[Event]:
    """Return the next changes; bookmarks are not counted."""
    found: list[Event] = []
    async with asyncio.timeout(60):
        async for event in rpc.received(aiter(stream)):
            if event.type != BOOKMARK:
                found.append(event)
            if len(found) == count:
                return found
    raise AssertionError("the stream ended")


def named(events: list[Event]) -> list[tuple[int, str]]:
    return [(event.type, event.key_pair.metadata.name) for event in events]


async def test_changes_come_in_order_and_only_ones_own(client: Client, keys: Keys) -> None:
    revision = (await keys.list()).revision
    stream = keys.watch(from_revision=revision)
    other = Keys(client.public, await client.make_user(ids.request_id(), Rule.ROLE_MEMBER, "noise"))
    one = await keys.create("one")
    await other.create("not seen")
    await keys.create("two")
    events = await take(stream, 2)  # before it is gone: of what is, a watch says no more than that
    await keys.delete(one.resource.id)
    events += await take(stream, 1)
    assert [event.type for event in events] == [ADDED, ADDED, DELETED]
    assert events[1].key_pair.metadata.name == "two"
    assert events[2].key_pair.metadata.id == one.resource.id
    revisions = [int(event.revision) for event in events]
    assert revisions == sorted(set(revisions))


async def test_a_watch_resumes_from_any_revision(keys: Keys) -> None:
    revision = (await keys.list()).revision
    for number in range(6):
        await keys.create(f"k{number}")
    whole = await take(keys.watch(from_revision=revision), 6)
    assert named(whole) == [(ADDED, f"k{number}") for number in range(6)]
    for seen in range(5):
        rest = await take(keys.watch(from_revision=whole[seen].revision), 5 - seen)
        assert rest == whole[seen + 1 :]


async def test_one_resource_can_be_watched(keys: Keys) -> None:
    one, two = await keys.create("one"), await keys.create("two")
    stream = keys.watch(from_revision="1", id=two.resource.id)
    await keys.delete(one.resource.id)
    await keys.delete(two.resource.id)
    events = await take(stream, 1)
    assert events[0].key_pair.metadata.id == two.resource.id


async def test_an_idle_watch_sends_bookmarks_that_can_be_resumed_from(keys: Keys) -> None:
    stream = keys.watch()
    async with asyncio.timeout(60):
        async for event in rpc.received(aiter(stream)):
            if event.type == BOOKMARK:
                break
    stream.cancel()
    await keys.create("one")
    assert named(await take(keys.watch(from_revision=event.revision), 1)) == [(ADDED, "one")]


async def test_a_slow_watcher_loses_nothing(keys: Keys) -> None:
    """It reads nothing while a thousand changes happen: they wait in the log, not in memory."""
    revision = (await keys.list()).revision
    stream = keys.watch(from_revision=revision)
    expected = []
    for batch in range(0, 600, 20):
        made = await asyncio.gather(*(keys.create(f"k{batch + n}") for n in range(20)))
        await asyncio.gather(*(keys.delete(each.resource.id) for each in made))
        expected += [each.resource.id for each in made]
    events = await take(stream, 1200)
    assert [event.key_pair.metadata.id for event in events if event.type == DELETED]
    seen = [event.key_pair.metadata.id for event in events]
    assert sorted(seen) == sorted(expected * 2)
    revisions = [int(event.revision) for event in events]
    assert revisions == sorted(revisions)


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "9" * 19, "１", " 1"])
async def test_bad_revisions(keys: Keys, text: str) -> None:
    error = await refused(take(keys.watch(from_revision=text), 1))
    assert (type(error), error.reason) == (errors.InvalidArgument, "BAD_REVISION")


async def test_a_revision_that_is_not_yet_is_out_of_range(keys: Keys) -> None:
    head = int((await keys.list()).revision)
    error = await refused(take(keys.watch(from_revision=str(head + 1000)), 1))
    assert (type(error), error.reason) == (errors.OutOfRange, "REVISION_COMPACTED")


async def test_all_projects_are_for_the_system(client: Client, keys: Keys) -> None:
    error = await refused(take(keys.watch(all_projects=True), 1))
    assert error.reason == "ROLE_REQUIRED"
    system = Keys(client.public, await client.login())
    stream = system.watch(from_revision=(await keys.list()).revision, all_projects=True)
    await keys.create("one")
    assert named(await take(stream, 1)) == [(ADDED, "one")]


async def test_what_was_compacted_is_out_of_range(plane: ControlPlane, keys: Keys) -> None:
    """Last: it empties the log that the tests before it use."""
    before = (await keys.list()).revision
    await keys.create("one")
    middle = (await keys.list()).revision
    await keys.create("two")
    head = (await keys.list()).revision
    stream = keys.watch(from_revision=head)
    _forget(plane, int(middle))
    error = await refused(take(keys.watch(from_revision=before), 1))
    assert (type(error), error.reason) == (errors.OutOfRange, "REVISION_COMPACTED")
    assert named(await take(keys.watch(from_revision=middle), 1)) == [(ADDED, "two")]
    _forget(plane, int(head))
    error = await refused(take(keys.watch(from_revision=middle), 1))
    assert error.reason == "REVISION_COMPACTED"
    # Whoever is up to date is not concerned.
    await keys.create("three")
    assert named(await take(stream, 1)) == [(ADDED, "three")]
    assert named(await take(keys.watch(from_revision=head), 1)) == [(ADDED, "three")]


def _forget(plane: ControlPlane, revision: int) -> None:
    """Delete the log up to a revision, as the passing of time does."""
    statement = "DELETE FROM change WHERE revision <= "
    if plane.database == "sqlite":
        with sqlite3.connect(plane.state_dir / "compute.db") as connection:
            connection.execute(statement + "?", (revision,))
        connection.close()
    else:
        with psycopg.connect(plane.database.replace("{name}", "compute")) as connection:
            connection.execute(statement + "%s", (revision,))
