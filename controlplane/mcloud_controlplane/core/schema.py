"""Creates a database's tables at first start, and refuses a schema that it does not know."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import peewee

from mcloud_base import errors
from mcloud_controlplane.core import database, tables


def open_database(
    url: str,
    proxy: peewee.DatabaseProxy,
    shared: tables.Tables,
    models: Sequence[type[peewee.Model]],
    *,
    version: int,
) -> database.Database:
    """Open a service's database, made where it does not exist.

    Safe to be done by several processes at once.

    Raises:
        errors.WrongState: SCHEMA_UNKNOWN, another release has changed the tables.
    """
    opened = database.Database(
        url, proxy, before_commit=lambda unit: _before_commit(opened, shared, unit)
    )

    def create() -> None:
        if opened.is_postgresql:
            opened.execute("SELECT pg_advisory_xact_lock(7040001)")
        opened.peewee.create_tables([*shared.models(), *models], safe=True)
        shared.deployment.insert(
            id=1,
            epoch=tables.new_epoch(),
            schema_version=version,
            request_key=secrets.token_hex(32),
        ).on_conflict_ignore().execute()
        found = shared.deployment.get_by_id(1).schema_version
        if found != version:
            raise errors.WrongState(
                "SCHEMA_UNKNOWN",
                f"the database has schema {found}, this release knows {version}; "
                "start the release that made it",
            )

    try:
        opened.write_now(create)
    except errors.Error:
        opened.close()
        raise
    return opened


def _before_commit(opened: database.Database, shared: tables.Tables, unit: database.Unit) -> None:
    if unit.changes:
        shared.log_changes(unit)
        opened.notify(database.changed_types(unit))
