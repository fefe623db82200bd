"""mcloud-controlplane restore: a control plane from a backup, where there is none.

The data become another life of the cloud, with an `epoch` of its own. What has happened since the
backup is not known to it, so it begins carefully:

- hosts are asked before anything is asked of them: a domain is `unproven` until its host has said
  whether it is there (conductor/adoption.py). What hosts have and no row names is left alone.
- nobody is logged in: the keys that signed tokens are gone, and with them tokens that were revoked
  since. Join tokens that had not been used do not work any more.
- operations that were running go on, those on unproven domains once these are proven; their time
  begins anew.
- watches begin anew: the change log is empty, and its numbers are higher than any before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcloud_base import errors
from mcloud_controlplane.core import database, migrations, tables
from mcloud_controlplane.maintenance import archive, databases
from mcloud_controlplane.maintenance.backup import copy_statement, image_store
from mcloud_controlplane.settings import Settings

# Further than any deployment gets in the time that a backup is old.
_REVISIONS = 1 << 32
_SHARED = """
UPDATE deployment SET epoch = '{epoch}', revision = revision + {revisions};
DELETE FROM change;
DELETE FROM process;
UPDATE host_session SET lease_expire_time = 0, incarnation = 0;
UPDATE operation SET lease_expire_time = 0, deadline = {deadline}, not_before = 0
    WHERE state IN ('RUNNING', 'UNDOING');
"""
# What hosts have reached means nothing in the new epoch, and their next reports are the newest.
_OWN = {
    "identity": """
        DELETE FROM signing_key;
        UPDATE join_token SET expire_time = 0 WHERE host_id = '';
    """,
    "compute": """
        UPDATE domain SET observed_generation = 0, incarnation = 0, sequence = 0;
        UPDATE domain SET unproven = TRUE WHERE absent = FALSE AND absent_time IS NULL;
        UPDATE operation SET not_before = {held} WHERE state = 'RUNNING' AND
            workflow <> 'delete_instance' AND
            resource_id IN (SELECT instance_id FROM domain WHERE unproven = TRUE);
    """,
    "network": "UPDATE host_dataplane SET observed_generation = 0, incarnation = 0, sequence = 0;",
    "volume": "UPDATE volume SET observed_generation = 0, incarnation = 0, sequence = 0;",
}


def run(settings: Settings, source: Path) -> Iterator[str]:
    """Restore everything; yield a line about each part.

    Nothing is written before all of the backup has been checked, and the target as well.

    Raises:
        errors.DataLoss: BACKUP_DAMAGED.
        errors.NotFound: BACKUP_NOT_FOUND.
        errors.WrongState: BACKUP_UNKNOWN, BACKUP_OF_OTHER_DATABASE, RESTORE_TARGET_NOT_EMPTY,
            SCHEMA_UNKNOWN.
    """
    with archive.reading(source) as backup:
        yield f"backup is whole: release {backup.manifest.release}"
        _check_fits(settings, backup.manifest)
        _check_empty(settings)
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in backup.names("images"):
            backup.extract(name, image_store(settings) / Path(name).name)
        if backup.manifest.images:
            yield f"images: {len(backup.names('images'))}"
        else:
            yield "images: not in the backup; put the image store back yourself"
        for name in migrations.DATABASES:
            if databases.is_sqlite(settings):
                _restore_sqlite(settings, name, backup)
            else:
                _restore_postgresql(settings, name, backup)
            yield f"database {name}: schema {max(backup.manifest.schemas[name])}"
        if backup.has("admin-password"):
            backup.extract("admin-password", settings.state_dir / "admin-password")
        # The authority's key last: without it the daemon makes another.
        for name in sorted(backup.names("pki"), key=lambda name: name.endswith("ca.key")):
            backup.extract(name, settings.state_dir / name)
    os.sync()
    yield "authority"
    yield "restored; start the daemon, then look with: mcloud --system admin verify"


def _check_fits(settings: Settings, manifest: archive.Manifest) -> None:
    kind = "sqlite" if databases.is_sqlite(settings) else "postgresql"
    if manifest.kind != kind:
        raise errors.WrongState(
            "BACKUP_OF_OTHER_DATABASE",
            f"the backup is of {manifest.kind}, the settings name {kind}; set `database` as it was",
        )
    for name in migrations.DATABASES:
        known = {each.number for each in migrations.THIS.migrations(name)}
        unknown = set(manifest.schemas.get(name, [0])) - known
        if unknown:
            raise errors.WrongState(
                "SCHEMA_UNKNOWN",
                f"the backup has schema {max(unknown)} of database {name}, which release "
                f"{migrations.THIS.version} does not know; restore with release {manifest.release}",
            )


def _check_empty(settings: Settings) -> None:
    found = [settings.state_dir / "admin-password", settings.state_dir / "pki" / "ca.key"]
    store = image_store(settings)
    found += [store / entry for entry in (os.listdir(store) if store.is_dir() else ())]
    if databases.is_sqlite(settings):
        found += [databases.file(settings, name) for name in migrations.DATABASES]
    there = [str(path) for path in found if path.exists()]
    if not databases.is_sqlite(settings):
        for name in migrations.DATABASES:
            with databases.opened(settings, name) as each:
                if each.database.read_now(each.migrator.has_tables):
                    there.append(f"tables of database {name}")
    if there:
        raise errors.WrongState(
            "RESTORE_TARGET_NOT_EMPTY",
            f"something is there already: {', '.join(there[:5])}; restore replaces nothing, so "
            "move it away, or name another state_dir",
        )


def _restore_sqlite(settings: Settings, name: str, backup: archive.Reader) -> None:
    final = databases.file(settings, name)
    path = final.with_name(f"{final.name}.restoring")
    path.unlink(missing_ok=True)
    backup.extract(f"databases/{name}.db", path)
    with databases.at(f"sqlite://{path.absolute()}", name) as each:
        each.database.write_now(_begin_anew, settings, each)
    path.rename(final)


def _restore_postgresql(settings: Settings, name: str, backup: archive.Reader) -> None:
    with databases.opened(settings, name) as each:
        each.database.write_now(_load, settings, each, backup)


def _load(settings: Settings, each: databases.Opened, backup: archive.Reader) -> None:
    """Make the tables as they were, and fill them. Within a unit."""
    each.migrator.make_tables(backup.manifest.schemas[each.name])
    store: Any = each.database.peewee
    for table, columns in backup.manifest.tables[each.name].items():
        with store.connection().cursor() as cursor:
            statement = copy_statement(table, columns, into=True)
            with cursor.copy(statement) as copy:
                for chunk in backup.chunks(f"databases/{each.name}/{table}.copy"):
                    copy.write(chunk)
    _begin_anew(settings, each)


def _begin_anew(settings: Settings, each: databases.Opened) -> None:
    """Turn the data into a life of their own. Within a unit."""
    # What the next statements need may be younger than the backup.
    each.migrator.expand()
    values = {
        "epoch": tables.new_epoch(),
        "revisions": _REVISIONS,
        "deadline": database.now() + settings.operation_deadline_s * 1_000_000,
        "held": tables.HELD,
    }
    schema = migrations.Schema(each.database)
    schema.run(_SHARED.format(**values))
    schema.run(_OWN.get(each.name, "").format(**values))
