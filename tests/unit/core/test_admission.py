"""Places: by turns of owners, bounded, and given back however a call ends."""

from __future__ import annotations

import asyncio

import pytest

from mcloud_base import errors
from mcloud_controlplane.core.admission import Lane, Streams, address


class Calls:
    """Calls that hold their place until they are let go; `began` has their order."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.began: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}

    def start(self, owner: str, name: str) -> asyncio.Task[None]:
        self.ends[name] = asyncio.Event()
        return asyncio.create_task(self._run(owner, name))

    async def _run(self, owner: str, name: str) -> None:
        async with self.lane.place(owner):
            self.began.append(name)
            await self.ends[name].wait()


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_owners_take_turns_and_none_has_all() -> None:
    calls = Calls(Lane(4, 3))
    flood = [calls.start("a", f"a{n}") for n in range(6)]
    await settle()
    assert calls.began == ["a0", "a1", "a2"]  # its share
    others = [calls.start("b", f"b{n}") for n in range(3)]
    await settle()
    assert calls.began[3:] == ["b0"]
    for name in ("a0", "a1", "a2", "b0"):
        calls.ends[name].set()
        await settle()
    assert sorted(calls.began[4:]) == ["a3", "a4", "b1", "b2"]
    for end in calls.ends.values():
        end.set()
    await asyncio.gather(*flood, *others)
    assert len(calls.began) == 9


async def test_a_place_is_given_back_by_whoever_gives_up() -> None:
    calls = Calls(Lane(1, 1))
    first, second, third = (calls.start("a", name) for name in ("1", "2", "3"))
    await settle()
    second.cancel()  # while it waits
    await settle()
    calls.ends["1"].set()
    await settle()
    assert calls.began == ["1", "3"]
    third.cancel()  # while it holds it
    await settle()
    last = calls.start("b", "4")
    await settle()
    assert calls.began == ["1", "3", "4"]
    calls.ends["4"].set()
    await asyncio.gather(first, last)
    assert second.cancelled()
    assert calls.lane._owners == {}
    assert (calls.lane._active, calls.lane._waiting, len(calls.lane._turns)) == (0, 0, 0)


async def test_whoever_gives_up_as_its_turn_comes_passes_it_on() -> None:
    calls = Calls(Lane(1, 1))
    first, second, third = (calls.start("a", name) for name in ("1", "2", "3"))
    await settle()
    calls.ends["1"].set()
    await first  # the second has been called, and has not run yet
    second.cancel()
    calls.ends["3"].set()
    await third
    assert (calls.lane._active, calls.lane._waiting) == (0, 0)


async def test_too_many_of_one_and_too_many_of_all() -> None:
    calls = Calls(Lane(1, 1, owner_waiting=2, lane_waiting=3))
    running = [calls.start("a", str(n)) for n in range(3)]
    await settle()
    with pytest.raises(errors.Exhausted, match="TOO_MANY_REQUESTS"):
        await calls.start("a", "x")
    running.append(calls.start("b", "y"))
    await settle()
    with pytest.raises(errors.Unavailable, match="OVERLOADED"):
        await calls.start("c", "z")
    assert "c" not in calls.lane._owners
    for end in calls.ends.values():
        end.set()
    await asyncio.gather(*running)


def test_streams_are_counted_by_owner_and_in_all() -> None:
    streams = Streams(3, 2)
    with streams.place("a"), streams.place("a"):
        with pytest.raises(errors.Exhausted, match="TOO_MANY_STREAMS"), streams.place("a"):
            pass
        with (
            streams.place("b"),
            pytest.raises(errors.Unavailable, match="OVERLOADED"),
            streams.place("c"),
        ):
            pass
        with streams.place("c"):
            pass
    assert not streams._open


@pytest.mark.parametrize(
    ("peer", "expected"),
    [("ipv4:192.0.2.1:40000", "ipv4:192.0.2.1"), ("ipv6:%5B::1%5D:7", "ipv6:%5B::1%5D")],
)
def test_an_address_is_that_of_all_connections_from_it(peer: str, expected: str) -> None:
    assert address(peer) == expected
