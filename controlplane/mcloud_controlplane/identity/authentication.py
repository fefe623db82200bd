"""Proves that somebody is a user by password: limited by name, the same for names of nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mcloud_controlplane.core.database import Database
from mcloud_controlplane.identity import login_store
from mcloud_controlplane.identity.model import User
from mcloud_controlplane.identity.passwords import Hasher, too_many_attempts

# Attempts under one name that this process checks at once. The count of failures is looked at when
# an attempt's turn comes, so parallel guesses do not get past the limit.
_AT_ONCE = 2
_WAITING_LIMIT = 32


@dataclass
class _Turns:
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    count: int = 0


class Authenticator:
    """Checks passwords of users by name."""

    def __init__(self, database: Database, hasher: Hasher) -> None:
        self._database = database
        self._hasher = hasher
        self._names: dict[str, _Turns] = {}

    async def find(self, name: str, password: str) -> User | None:
        """Return the user with its epoch if the password is right, otherwise None.

        Raises:
            errors.Exhausted: TOO_MANY_ATTEMPTS.
        """
        async with self._turn(name):
            user = await self._database.read_few(login_store.find_user, name)
            if await self._hasher.matches(user.password_hash if user else "", password):
                if await self._database.read_few(login_store.has_failures, name):
                    await self._database.write(login_store.forget_failures, name)
                return user
            await self._database.write(login_store.record_failure, self._database, name)
            return None

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        entry = self._names.setdefault(name, _Turns())
        if entry.count >= _WAITING_LIMIT:
            raise too_many_attempts(1)
        entry.count += 1
        try:
            async with entry.turns:
                yield
        finally:
            entry.count -= 1
            if not entry.count:
                self._names.pop(name, None)
