"""Steps wait while many ask, and no longer."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from mcloud_controlplane.core import precedence
from mcloud_controlplane.core.precedence import Precedence


def ask(requests: Precedence, stack: ExitStack, count: int) -> None:
    for _ in range(count):
        stack.enter_context(requests.accepting())


async def step(requests: Precedence, begun: list[int], number: int) -> None:
    await requests.turn()
    begun.append(number)


async def test_a_step_begins_at_once_while_few_ask() -> None:
    requests = Precedence()
    with ExitStack() as few:
        ask(requests, few, precedence._MANY - 1)
        async with asyncio.timeout(0):
            await requests.turn()


async def test_a_step_waits_for_those_who_come_right_after_the_first() -> None:
    requests = Precedence()
    with requests.accepting():
        pass
    step = asyncio.create_task(requests.turn())
    await asyncio.sleep(0)
    assert not step.done()
    with requests.accepting():
        async with asyncio.timeout(30):
            await step  # its turn has come, not the end of the moment: one asks still
    async with asyncio.timeout(30):
        await requests.turn()


async def test_a_step_waits_until_nobody_of_many_asks() -> None:
    requests = Precedence()
    with ExitStack() as last:
        with ExitStack() as many:
            ask(requests, last, 1)
            ask(requests, many, precedence._MANY - 1)
            step = asyncio.create_task(requests.turn())
        # One is left, and others come and go.
        for _ in range(5):
            with requests.accepting():
                await asyncio.sleep(0)
        assert not step.done()
    async with asyncio.timeout(30):
        await step
        await requests.turn()


async def test_many_may_come_one_by_one() -> None:
    requests = Precedence()
    for _ in range(precedence._MANY):
        with requests.accepting():
            await asyncio.sleep(0)
    step = asyncio.create_task(requests.turn())
    await asyncio.sleep(0)
    assert not step.done()
    async with asyncio.timeout(30):
        await step


async def test_who_comes_in_between_is_one_of_them() -> None:
    """gRPC hands over a call a turn of the loop: for a moment there may be nobody."""
    requests = Precedence()
    with ExitStack() as many:
        ask(requests, many, precedence._MANY)
    steps = [asyncio.create_task(requests.turn()) for _ in range(2)]
    async with asyncio.timeout(30):
        with requests.accepting():
            await steps[0]  # its turn has come, and not because nobody asks
            assert not steps[1].done()
        await steps[1]


async def test_steps_go_on_one_by_one_however_long_many_ask() -> None:
    requests = Precedence()
    begun: list[int] = []

    with ExitStack() as many:
        ask(requests, many, precedence._MANY)
        steps = [asyncio.create_task(step(requests, begun, each)) for each in range(4)]
        await asyncio.sleep(0)
        steps[1].cancel()
        async with asyncio.timeout(30):
            await asyncio.wait(steps[:3])
        assert begun == [0, 2]
        assert not steps[3].done()
    async with asyncio.timeout(30):
        await steps[3]


async def test_rushes_follow_each_other() -> None:
    requests = Precedence()
    for _ in range(3):
        with ExitStack() as many:
            ask(requests, many, precedence._MANY)
            step = asyncio.create_task(requests.turn())
            await asyncio.sleep(0)
            assert not step.done()
        async with asyncio.timeout(30):
            await step


async def test_what_waits_begins_bite_by_bite_until_somebody_asks() -> None:
    """All at once they would keep the loop from those who ask meanwhile."""
    requests = Precedence()
    begun: list[int] = []
    numbers = range(10 * precedence._BITE)
    with ExitStack() as many:
        ask(requests, many, precedence._MANY)
        steps = [asyncio.create_task(step(requests, begun, each)) for each in numbers]
        await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
    with requests.accepting():
        for _ in numbers:  # turns of the loop, more than all would take if none asked
            await asyncio.sleep(0)
        assert len(begun) < len(steps)
    async with asyncio.timeout(30):
        await asyncio.wait(steps)
    assert begun == [*numbers]


async def test_those_whom_a_busy_loop_did_not_hear_are_heard_first() -> None:
    requests = Precedence()
    loop = asyncio.get_running_loop()
    with ExitStack() as many:
        ask(requests, many, precedence._MANY)
        step = asyncio.create_task(requests.turn())
    heard: list[bool] = []

    def ask_late(turns: int) -> None:
        """Ask as gRPC hands over a call that came while the loop was busy."""
        if turns:
            loop.call_soon(ask_late, turns - 1)
            return
        with requests.accepting():
            heard.append(not step.done())

    loop.call_soon(ask_late, precedence._CALM_TURNS - 1)
    end = loop.time() + 2 * precedence._CALM_S
    while loop.time() < end:  # busy for longer than a calm takes
        pass
    async with asyncio.timeout(30):
        await step
    assert heard == [True]
