"""Threads with deadlines: what is left behind keeps its object closed."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mcloud_agents.compute.threads import Threads
from mcloud_base.errors import Unavailable


@pytest.fixture
async def threads() -> Threads:
    return Threads("library", 2, "LIBRARY_SILENT")


async def test_a_late_call_is_left_and_its_object_stays_closed(threads: Threads) -> None:
    hang = threading.Event()
    async with threads.exclusive("a", 1):
        with pytest.raises(Unavailable, match="LIBRARY_SILENT"):
            await threads.run(0.05, "a", hang.wait, 30)
    with pytest.raises(Unavailable, match="LIBRARY_SILENT"):
        async with threads.exclusive("a", 0.05):
            pytest.fail("entered while a call was still going on")
    async with threads.exclusive("b", 1):
        assert await threads.run(1, "b", lambda: "others go on") == "others go on"
    hang.set()
    async with threads.exclusive("a", 5):
        pass
    threads.close()


async def test_a_cancelled_caller_leaves_its_object_closed(threads: Threads) -> None:
    hang, began = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        hang.wait(30)

    async def caller() -> None:
        async with threads.exclusive("a", 1):
            await threads.run(30, "a", work)

    task = asyncio.create_task(caller())
    await asyncio.to_thread(began.wait, 5)
    task.cancel()
    await asyncio.wait({task})
    with pytest.raises(Unavailable):
        async with threads.exclusive("a", 0.05):
            pytest.fail("entered while a call was still going on")
    hang.set()
    async with threads.exclusive("a", 5):
        pass
    threads.close()


async def test_calls_that_never_began_are_dropped(threads: Threads) -> None:
    hang, both = threading.Event(), threading.Barrier(3)
    ran: list[int] = []

    def work() -> None:
        both.wait(30)
        hang.wait(30)

    busy = [asyncio.create_task(threads.run(60, "", work)) for _ in range(2)]
    await asyncio.to_thread(both.wait, 30)
    for number in range(5):
        with pytest.raises(Unavailable):
            await threads.run(0.02, "", ran.append, number)
    hang.set()
    await asyncio.gather(*busy)
    await threads.run(5, "", ran.append, 99)
    assert ran == [99]
    threads.close()
