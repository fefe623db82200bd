"""What is asked for while the last was being done is done together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from mcloud_base import errors
from mcloud_controlplane.core.batch import Gathered


class Work:
    """Doubles numbers, when it is let; refuses negative ones."""

    def __init__(self) -> None:
        self.done: list[list[int]] = []
        self.let = asyncio.Event()

    async def __call__(self, keys: list[int]) -> Mapping[int, int]:
        self.done.append(keys)
        await self.let.wait()
        if min(keys) == -100:
            raise errors.Unavailable("DATABASE_UNAVAILABLE", "gone")
        if min(keys) < 0:
            raise ValueError(min(keys))
        return {key: 2 * key for key in keys}


async def test_what_comes_meanwhile_is_done_at_once() -> None:
    work = Work()
    gathered = Gathered(work, limit=3)
    tasks = [asyncio.create_task(gathered.get(number)) for number in (1, 2, 3, 3, 4, 5)]
    while not work.done:
        await asyncio.sleep(0)
    work.let.set()
    assert await asyncio.gather(*tasks) == [2, 4, 6, 6, 8, 10]
    assert work.done == [[1, 2, 3], [4, 5]]


async def test_a_lone_one_is_done_without_a_wait() -> None:
    work = Work()
    work.let.set()
    gathered = Gathered(work)
    assert [await gathered.get(number) for number in (1, 2)] == [2, 4]
    assert work.done == [[1], [2]]


async def test_ones_fault_is_not_that_of_the_others() -> None:
    work = Work()
    work.let.set()
    gathered = Gathered(work)
    found = await asyncio.gather(*map(gathered.get, (1, -1, 2)), return_exceptions=True)
    assert [found[0], found[2]] == [2, 4]
    assert isinstance(found[1], ValueError)
    assert await gathered.get(3) == 6


async def test_an_error_that_is_nobodys_own_is_not_tried_for_each() -> None:
    work = Work()
    work.let.set()
    gathered = Gathered(work)
    found = await asyncio.gather(*map(gathered.get, (1, -100, 2)), return_exceptions=True)
    assert [type(error) for error in found] == [errors.Unavailable] * 3
    assert len(work.done) == 1


async def test_one_that_leaves_does_not_take_the_others_along() -> None:
    work = Work()
    gathered = Gathered(work)
    first, second = (asyncio.create_task(gathered.get(number)) for number in (1, 2))
    await asyncio.sleep(0)
    first.cancel()
    work.let.set()
    assert await second == 4
    with pytest.raises(asyncio.CancelledError):
        await first
