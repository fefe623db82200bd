"""Hashes and checks passwords, off the event loop and the database's threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import argon2
from argon2 import exceptions

from mcloud_base import errors

T = TypeVar("T")

# Source: https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html
_argon2 = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)

_THREADS = 2  # each holds 19 MiB while it works
_QUEUE_LIMIT = 128


def hash_now(password: str) -> str:
    """Return a password's hash, made in this thread."""
    return _argon2.hash(password)


class Hasher:
    """The threads that hash. Close it at the end."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="password")
        self._queued = 0
        # Checked for users that do not exist, so that they cost the same time.
        self._nobody = hash_now("")

    async def hash(self, password: str) -> str:
        """Return a password's hash.

        Raises:
            errors.Exhausted: TOO_MANY_ATTEMPTS.
        """
        return await self._run(lambda: hash_now(password))

    async def matches(self, known: str, password: str) -> bool:
        """Tell whether a password is the one of a hash; of the empty hash none is.

        Raises:
            errors.Exhausted: TOO_MANY_ATTEMPTS.
        """
        right = await self._run(lambda: _matches(known or self._nobody, password))
        return right and bool(known)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._queued >= _QUEUE_LIMIT:
            raise too_many_attempts(1)
        self._queued += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._queued -= 1

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def too_many_attempts(wait_s: float) -> errors.Exhausted:
    """Return the error for whoever must wait before the next attempt."""
    return errors.Exhausted(
        "TOO_MANY_ATTEMPTS",
        f"too many attempts to log in; try again in {wait_s:.0f} s",
        details=(errors.retry_after(wait_s),),
    )


def _matches(known: str, password: str) -> bool:
    try:
        return _argon2.verify(known, password)
    except exceptions.VerifyMismatchError:
        return False
