"""Ends the streams of clients that do not read: what they are sent must not pile up here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from mcloud_base import errors

_ending: set[asyncio.Task[None]] = set()  # a loop keeps no strong reference to its tasks


async def disconnected(
    answers: AsyncIterator[Any], end: Callable[[errors.Error], Awaitable[None]], limit_s: float
) -> AsyncIterator[Any]:
    """Yield the answers, as long as each is taken in time.

    gRPC takes an answer once the client's window has room for it. The status goes behind what has
    been sent, so whoever reads on at last learns why the stream ended and where to resume.

    Args:
        end: ends the call with a status, from outside of its handler.
    """
    loop = asyncio.get_running_loop()

    def expire(answer: Any) -> None:
        task = loop.create_task(_end(end, answer))
        _ending.add(task)
        task.add_done_callback(_ending.discard)

    async for answer in answers:
        timer = loop.call_later(limit_s, expire, answer)
        try:
            yield answer
        finally:
            timer.cancel()


async def _end(end: Callable[[errors.Error], Awaitable[None]], answer: Any) -> None:
    try:
        await end(_slow(answer))
    except grpc.aio.BaseError:
        return  # that is how gRPC ends it; or the connection has gone


def _slow(answer: Any) -> errors.Exhausted:
    revision = getattr(answer, "revision", "")
    if revision:
        return errors.Exhausted(
            "SLOW_WATCHER",
            f"changes were not read in time; watch again from revision {revision}",
            details=(errors.retry_after(1),),
            revision=revision,
        )
    return errors.Exhausted(
        "SLOW_READER",
        "what was sent was not read in time; call again",
        details=(errors.retry_after(1),),
    )
