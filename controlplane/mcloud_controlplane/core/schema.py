"""Opens a service's database: its tables are brought to what this release needs, or refused."""

from __future__ import annotations

import secrets

import peewee

from mcloud_base import errors
from mcloud_controlplane.core import database, migrations, processes, tables
from mcloud_controlplane.core.unit import Unit


def open_database(
    name: str,
    url: str,
    proxy: peewee.DatabaseProxy,
    shared: tables.Tables,
    process: processes.Process | None = None,
) -> database.Database:
    """Open a service's database, made where it does not exist.

    Safe to be done by several processes at once.

    Args:
        name: of the database: "compute".
        process: registered there; None: a tool, which nothing waits for.

    Raises:
        errors.WrongState: SCHEMA_UNKNOWN, SCHEMA_BEHIND.
        errors.Unavailable: DATABASE_UNAVAILABLE.
    """
    opened = connect(url, proxy, shared)
    release = process.release if process is not None else migrations.THIS
    migrator = migrations.Migrator(name, opened, shared, release)
    newest = max((each.number for each in migrator.known), default=0)

    def settle() -> None:
        shared.deployment.insert(
            id=1,
            epoch=tables.new_epoch(),
            schema_version=newest,
            request_key=secrets.token_hex(32),
        ).on_conflict_ignore().execute()
        if process is not None:
            process.register(shared, newest)

    try:
        migrator.advance(at_end=settle)
    except errors.Error:
        opened.close()
        raise
    if process is not None:
        process.uses(opened, shared, newest, migrator.check)
    return opened


def connect(url: str, proxy: peewee.DatabaseProxy, shared: tables.Tables) -> database.Database:
    """Open a database as it is, without a look at its tables."""
    opened = database.Database(
        url, proxy, before_commit=lambda unit: _before_commit(opened, shared, unit)
    )
    return opened


def _before_commit(opened: database.Database, shared: tables.Tables, unit: Unit) -> None:
    if unit.changes:
        shared.log_changes(unit, opened.notice(unit.changed()))
