"""The databases of the settings, as tools open them: without their services."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import peewee

from mcloud_controlplane.core import database, migrations, schema, tables
from mcloud_controlplane.settings import Settings


@dataclass(frozen=True)
class Opened:
    """One database, as it is."""

    name: str
    database: database.Database
    tables: tables.Tables
    migrator: migrations.Migrator


@contextmanager
def opened(
    settings: Settings, name: str, release: migrations.Release = migrations.THIS
) -> Iterator[Opened]:
    """Open a database; its tables are not looked at."""
    with at(settings.database_url(name), name, release) as found:
        yield found


@contextmanager
def at(url: str, name: str, release: migrations.Release = migrations.THIS) -> Iterator[Opened]:
    """Open a database that is elsewhere than the settings say."""
    proxy = peewee.DatabaseProxy()
    shared = tables.bind(proxy)
    store = schema.connect(url, proxy, shared)
    try:
        yield Opened(name, store, shared, migrations.Migrator(name, store, shared, release))
    finally:
        store.close()


def is_sqlite(settings: Settings) -> bool:
    """Whether the databases are files."""
    return urlsplit(settings.database_url("identity")).scheme == "sqlite"


def file(settings: Settings, name: str) -> Path:
    """Return the file of a SQLite database."""
    return Path(urlsplit(settings.database_url(name)).path)
