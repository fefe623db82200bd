"""mcloud-controlplane backup: the whole control plane in one file, while it runs."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from mcloud_controlplane.core import database, migrations
from mcloud_controlplane.maintenance import archive, databases
from mcloud_controlplane.maintenance.moment import Connection, frozen
from mcloud_controlplane.settings import Settings


def run(settings: Settings, to: Path, *, images: bool) -> Iterator[str]:
    """Write a backup; yield a line about each part.

    Args:
        images: whether the image store is to be in it.

    Raises:
        errors.AlreadyExists: BACKUP_EXISTS.
        errors.WrongState: DATABASE_MISSING.
        errors.Unavailable: DATABASE_UNAVAILABLE.
    """
    kind = "sqlite" if databases.is_sqlite(settings) else "postgresql"
    manifest = archive.Manifest(migrations.THIS.version, kind, database.now(), {}, {}, images)
    with (
        archive.writing(to, manifest) as writer,
        _linked_images(settings, images) as (link, linked),
        frozen(settings, link) as connections,
        tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.absolute().parent) as scratch,
    ):
        for name, connection in connections.items():
            manifest.schemas[name] = [
                row[0] for row in _rows(connection, "SELECT number FROM schema_migration")
            ]
            for member, path in _copies(connection, name, Path(scratch), manifest):
                writer.add(member, path)
                path.unlink()
            yield f"database {name}: schema {max(manifest.schemas[name])}"
        for path in sorted((settings.state_dir / "pki").iterdir()):
            if path.is_file() and not path.name.startswith("."):
                writer.add(f"pki/{path.name}", path)
        if (password := settings.state_dir / "admin-password").exists():
            writer.add("admin-password", password)
        yield "authority"
        expected = dict(
            _rows(connections["image"], "SELECT id, sha256 FROM image WHERE sha256 <> ''")
        )
        count = 0
        for path in sorted(linked.iterdir()):
            count += 1
            digest = writer.add(f"images/{path.name}", path)
            if expected.get(path.name, digest) != digest:
                yield f"image {path.name}: its bytes have changed since it was uploaded"
        yield f"images: {count}" if images else "images: left out"
    yield f"{to}: {to.stat().st_size} bytes, made by release {manifest.release}"


def image_store(settings: Settings) -> Path:
    """Return where the bytes of images are."""
    return settings.image_store or settings.state_dir / "images"


@contextmanager
def _linked_images(settings: Settings, wanted: bool) -> Iterator[tuple[Any, Path]]:
    """Give a function that keeps every whole image from vanishing, and where it keeps them.

    An image's file is there before its row says so, and goes after its row does: those that are
    there at the moment of the databases are all that their rows need.
    """
    store = image_store(settings)
    where = store if wanted and store.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=where) as directory:
        linked = Path(directory)

        def link() -> None:
            for entry in os.scandir(store) if where else ():
                if entry.is_file() and not entry.name.endswith(".partial"):
                    os.link(entry.path, linked / entry.name)

        yield link, linked


def _rows(connection: Connection, statement: str) -> list[tuple[Any, ...]]:
    if isinstance(connection, sqlite3.Connection):
        return connection.execute(statement).fetchall()
    return connection.execute(statement.encode()).fetchall()


def _copies(
    connection: Connection, name: str, scratch: Path, manifest: archive.Manifest
) -> Iterator[tuple[str, Path]]:
    """Yield a database's members and their files, which may go when the next is asked for."""
    if isinstance(connection, sqlite3.Connection):
        path = scratch / f"{name}.db"
        with closing(sqlite3.connect(path)) as copy:
            # Reads what the connection's transaction sees, whatever is committed meanwhile.
            connection.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        yield f"databases/{name}.db", path
        return
    columns = _columns(connection)
    manifest.tables[name] = dict(columns)
    for table, names in columns.items():
        path = scratch / f"{table}.copy"
        with path.open("wb") as file, connection.cursor().copy(copy_statement(table, names)) as out:
            for chunk in out:
                file.write(chunk)
        yield f"databases/{name}/{table}.copy", path


def _columns(connection: psycopg.Connection[Any]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for table, column in connection.execute(
        "SELECT table_name, column_name FROM information_schema.columns JOIN "
        "information_schema.tables USING (table_schema, table_name) WHERE "
        "table_schema = current_schema() AND table_type = 'BASE TABLE' "
        "ORDER BY table_name, ordinal_position"
    ):
        found.setdefault(table, []).append(column)
    return found


def copy_statement(table: str, columns: list[str], *, into: bool = False) -> sql.Composed:
    """Return the COPY of a table's columns."""
    return sql.SQL("COPY {} ({}) {}").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL("FROM STDIN" if into else "TO STDOUT"),
    )
