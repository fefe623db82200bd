"""Numbered changes of a database's tables: which there are, which have run, which may run now.

Each database has a folder with a file for each change, NNNN_name.py: a docstring that says what
it does in a line, `KIND`, `SINCE` (the release that brings it) and `up(schema)`. Expand, then
contract:

EXPAND    An older daemon goes on serving over it: new tables, columns that are null or have a
          DEFAULT, indexes. A daemon does it by itself when it starts. `fill(schema)`, if there is
          one, is repeated in short transactions until it returns 0; meanwhile and afterwards older
          daemons write rows without the new values, so readers take those for not filled.
CONTRACT  What older daemons would not survive: columns and tables that go, rules that they do not
          keep. Done by `mcloud-controlplane migrate`, and only once every process that uses the
          database knows of it.

They run in the order of their numbers, each with its row in `schema_migration` in one transaction,
one process at a time. A released file is never changed.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psycopg
import structlog

from mcloud_base import errors
from mcloud_controlplane.core import database, processes, tables

log = structlog.get_logger()

# Databases, by their folders; compute, scheduler and conductor share one.
DATABASES = ("identity", "compute", "image", "network", "volume")

HISTORY = """
CREATE TABLE IF NOT EXISTS schema_migration (
    number INTEGER NOT NULL PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL,
    since TEXT NOT NULL, release TEXT NOT NULL, time BIGINT NOT NULL, filled BOOLEAN NOT NULL
);
"""
_ROOT = Path(__file__).parents[1]
_WORDS = {"BIGINT": "INTEGER", "BOOLEAN": "INTEGER", "BYTEA": "BLOB", "DOUBLE PRECISION": "REAL"}
_LOCK = 7040001  # PostgreSQL's advisory lock
_LOCK_TIMEOUT_S = 3  # on a table; behind one that waits longer everybody else would wait, too
_PATIENCE = 20  # such timeouts in a row


class Kind(enum.StrEnum):
    """When a change may run."""

    EXPAND = "EXPAND"
    CONTRACT = "CONTRACT"


class Schema:
    """What a change is written with: SQL that both databases understand."""

    def __init__(self, opened: database.Database) -> None:
        self._database = opened

    def run(self, sql: str) -> int:
        """Run statements that end with ";" (none within them, and no "%").

        The types are PostgreSQL's; SQLite's are put in their place.

        Returns:
            How many rows the last statement has changed.
        """
        if not self._database.is_postgresql:
            sql = re.sub("|".join(_WORDS), lambda found: _WORDS[found[0]], sql)
        count = 0
        for statement in filter(str.strip, sql.split(";")):
            count = self._database.peewee.execute_sql(statement).rowcount  # type: ignore[no-untyped-call]
        return count


@dataclass(frozen=True)
class Migration:
    """A change of the tables."""

    number: int
    name: str  # of its file
    kind: Kind
    since: str
    summary: str
    up: Callable[[Schema], None]
    fill: Callable[[Schema], int] | None


@dataclass(frozen=True)
class Release:
    """The control plane at one version: which changes it knows."""

    version: str
    folders: Callable[[str], Sequence[Path]]  # by database

    def migrations(self, name: str) -> tuple[Migration, ...]:
        """Return a database's, in order."""
        return _load(tuple(self.folders(name)))


def shipped(name: str) -> Sequence[Path]:
    """Return the folder of a database's migrations."""
    return (_ROOT / name / "migrations",)


THIS = Release(metadata.version("mcloud"), shipped)


@functools.cache
def _load(folders: tuple[Path, ...]) -> tuple[Migration, ...]:
    files = sorted(
        (path for folder in folders for path in folder.glob("[0-9]*_*.py")),
        key=lambda path: path.name,
    )
    found = tuple(map(_read, files))
    numbers = [each.number for each in found]
    assert len(set(numbers)) == len(numbers), f"{folders}: a number is there twice"
    return found


def _read(path: Path) -> Migration:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Migration(
        number=int(path.name.partition("_")[0]),
        name=path.stem,
        kind=Kind(module.KIND),
        since=module.SINCE,
        summary=module.__doc__.partition("\n")[0],
        up=module.up,
        fill=getattr(module, "fill", None),
    )


class Migrator:
    """Moves one database on, for one release."""

    def __init__(
        self, name: str, opened: database.Database, shared: tables.Tables, release: Release
    ) -> None:
        self._name = name
        self._database = opened
        self._tables = shared
        self._release = release
        self.known = release.migrations(name)

    def history(self) -> list[Any]:
        """Return the rows of what has run, in order; none of a database without tables."""
        if not self._has_table("schema_migration"):
            return []
        table = self._tables.schema_migration
        return list(table.select().order_by(table.number))

    def pending(self) -> list[Migration]:
        """Return what has not run, in order."""
        done = {row.number for row in self.history()}
        return [each for each in self.known if each.number not in done]

    def is_new(self) -> bool:
        """Whether nobody has used the database yet."""
        return (
            not self._has_table("deployment")
            or self._tables.deployment.get_or_none(self._tables.deployment.id == 1) is None
        )

    def advance(self, *, contract: bool = False, at_end: Callable[[], None] | None = None) -> None:
        """Run what may run now; safe to be done by several processes at once.

        Args:
            contract: also CONTRACT changes. A new database gets them in any case.
            at_end: run in the transaction that finds nothing left to do.

        Raises:
            errors.WrongState: SCHEMA_UNKNOWN, SCHEMA_BEHIND, OLDER_RELEASE_ALIVE.
            errors.Unavailable: DATABASE_UNAVAILABLE, MIGRATION_BLOCKED.
        """
        patience = _PATIENCE
        while True:
            try:
                done = self._database.write_now(self._step, contract, at_end)
            except errors.Unavailable as error:
                patience -= 1
                if not _waited_for_a_lock(error):
                    raise
                if not patience:
                    raise errors.Unavailable(
                        "MIGRATION_BLOCKED",
                        f"somebody keeps the tables of database {self._name} locked (a backup?); "
                        "start again when that has ended",
                    ) from error
                continue
            if done is None:
                return
            if done:
                log.info("schema changed", database=self._name, migration=done)

    def make_tables(self, numbers: Collection[int]) -> None:
        """Make the tables as these, all known, have left them; nothing is noted. Within a unit."""
        self._lock()
        schema = Schema(self._database)
        schema.run(HISTORY)
        for each in self.known:
            if each.number in numbers:
                each.up(schema)

    def expand(self) -> None:
        """Run what a daemon would run by itself, in the running unit."""
        while self._step(False, None) is not None:
            pass

    def has_tables(self) -> bool:
        """Whether anything is there."""
        return self._has_table("deployment") or self._has_table("schema_migration")

    def check(self) -> None:
        """Refuse tables that this release does not know. Within a unit.

        A release works over what the next one has added; not over what the one after that has,
        nor over anything that was taken away.

        Raises:
            errors.WrongState: SCHEMA_UNKNOWN.
        """
        known = {each.number for each in self.known}
        unknown = [row for row in self.history() if row.number not in known]
        contracted = [row for row in unknown if row.kind == Kind.CONTRACT]
        if contracted or len({row.since for row in unknown}) > 1:
            raise self._unknown((contracted or unknown)[-1].number, unknown[-1].since)

    def _step(self, contract: bool, at_end: Callable[[], None] | None) -> str | None:
        """Run one change, or a part of filling; return its name, "" for a part, None at the end."""
        self._lock()
        schema = Schema(self._database)
        schema.run(HISTORY)
        self.check()
        by_number = {each.number: each for each in self.known}
        table = self._tables.schema_migration
        for row in table.select().where(~table.filled).order_by(table.number):
            if (each := by_number.get(row.number)) is not None and each.fill is not None:
                if not each.fill(schema):
                    table.update(filled=True).where(table.number == row.number).execute()
                return ""
        pending = self.pending()
        new = self.is_new()
        if not pending or (pending[0].kind == Kind.CONTRACT and not (contract or new)):
            self._refuse_expansion_behind(pending)
            if at_end is not None:
                at_end()
            return None
        first = pending[0]
        if first.kind == Kind.CONTRACT and not new:
            self._refuse_while_older_live(first)
        if self._database.is_postgresql:
            schema.run(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'")
        first.up(schema)
        table.create(
            number=first.number, name=first.name, kind=first.kind, since=first.since,
            release=self._release.version, time=database.now(), filled=first.fill is None,
        )  # fmt: skip
        deployment = self._tables.deployment
        deployment.update(schema_version=first.number).execute()
        return first.name

    def older(self, migration: Migration) -> list[Any]:
        """Return the living processes that do not know a change. Within a unit."""
        if not self._has_table("process"):
            return []
        return [
            row for row in processes.living(self._tables) if row.schema_number < migration.number
        ]

    def _refuse_while_older_live(self, migration: Migration) -> None:
        older = self.older(migration)
        if older:
            raise errors.WrongState(
                "OLDER_RELEASE_ALIVE",
                f"{migration.name} of database {self._name} would break processes that do not "
                f"know it: {', '.join(map(processes.text, older))}; upgrade or stop them, then "
                "run: mcloud-controlplane migrate",
            )

    def _refuse_expansion_behind(self, pending: Sequence[Migration]) -> None:
        waiting = next((each for each in pending if each.kind == Kind.EXPAND), None)
        if waiting is not None:
            raise errors.WrongState(
                "SCHEMA_BEHIND",
                f"{waiting.name} of database {self._name} cannot run before {pending[0].name}; "
                "once no process of an older release is left, run: mcloud-controlplane migrate",
            )

    def _unknown(self, number: int, since: str = "") -> errors.WrongState:
        own = self.known[-1].number if self.known else 0
        newer = f" of release {since}" if since else ""
        return errors.WrongState(
            "SCHEMA_UNKNOWN",
            f"database {self._name} has schema {number}{newer}; release {self._release.version} "
            f"knows up to {own}: install and start the newer release, or restore a backup that "
            "is older",
        )

    def _lock(self) -> None:
        """Keep other processes from changing the schema or registering until the commit."""
        if self._database.is_postgresql:
            self._database.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")

    def _has_table(self, table: str) -> bool:
        sql = (
            f"SELECT to_regclass('{table}')::text"
            if self._database.is_postgresql
            else f"SELECT max(name) FROM sqlite_master WHERE name = '{table}'"  # noqa: S608 (ours)
        )
        cursor: Any = self._database.peewee.execute_sql(sql)  # type: ignore[no-untyped-call]
        return cursor.fetchone()[0] is not None


def _waited_for_a_lock(error: errors.Unavailable) -> bool:
    cause = error.__cause__
    return cause is not None and any(
        isinstance(each, psycopg.errors.LockNotAvailable) for each in (cause, *cause.args)
    )
