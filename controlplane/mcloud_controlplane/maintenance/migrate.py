"""mcloud-controlplane migrate: runs what is pending in every database."""

from __future__ import annotations

from collections.abc import Iterator

from mcloud_base import errors
from mcloud_controlplane.core import migrations, processes
from mcloud_controlplane.maintenance import databases
from mcloud_controlplane.settings import Settings


def run(
    settings: Settings, *, dry_run: bool, release: migrations.Release = migrations.THIS
) -> Iterator[str]:
    """Run, or only tell, what is pending; yield a line about each database and change.

    Raises:
        errors.WrongState: SCHEMA_UNKNOWN, OLDER_RELEASE_ALIVE, DATABASE_MISSING.
    """
    for name in migrations.DATABASES:
        with databases.opened(settings, name, release) as each:
            if each.database.read_now(each.migrator.is_new):
                raise errors.WrongState(
                    "DATABASE_MISSING",
                    f"there is no database {name} yet; the daemon makes it when it first starts",
                )
            each.database.read_now(each.migrator.check)
            pending = each.database.read_now(each.migrator.pending)
            if not pending:
                yield f"{name}: up to date"
            for migration in pending:
                older = each.database.read_now(each.migrator.older, migration)
                yield f"{name}: {migration.name} ({migration.kind}) {migration.summary}"
                if dry_run and migration.kind == migrations.Kind.CONTRACT and older:
                    yield f"  refused while these live: {', '.join(map(processes.text, older))}"
            if pending and not dry_run:
                each.migrator.advance(contract=True)
                yield f"{name}: done"
