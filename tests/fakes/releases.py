"""Releases that this one may be upgraded to: it, with further changes of the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mcloud_controlplane.core import migrations

EXPAND = '''"""Notes the memory of instances in bytes."""

KIND = "EXPAND"
SINCE = "0.2"


def up(schema):
    schema.run("ALTER TABLE instance ADD COLUMN memory_bytes BIGINT")


def fill(schema):
    return schema.run(
        "UPDATE instance SET memory_bytes = memory_mib * 1048576 WHERE id IN "
        "(SELECT id FROM instance WHERE memory_bytes IS NULL LIMIT 100)"
    )
'''
CONTRACT = '''"""Every instance's memory is noted in bytes, and nobody forgets it."""

KIND = "CONTRACT"
SINCE = "0.2"


def up(schema):
    schema.run("UPDATE instance SET memory_bytes = memory_mib * 1048576 WHERE memory_bytes IS NULL")
    schema.run("CREATE INDEX instance_memory_bytes ON instance (memory_bytes)")
'''
EMPTY = '''"""Changes nothing."""

KIND = "{kind}"
SINCE = "{since}"


def up(schema):
    pass
'''


def newer(
    directory: Path, files: Mapping[str, str], *, version: str = "0.2.0", name: str = "compute"
) -> migrations.Release:
    """Return a release whose database `name` has further changes, by the names of their files."""
    folder = directory / version / name
    folder.mkdir(parents=True, exist_ok=True)  # another process may have the same
    for file, text in files.items():
        (folder / f"{file}.py").write_text(text)

    def folders(each: str) -> Sequence[Path]:
        return (*migrations.shipped(each), *((folder,) if each == name else ()))

    return migrations.Release(version, folders)


def to_0_2(directory: Path) -> migrations.Release:
    """Return a release that adds a column, fills it, and then relies on it."""
    return newer(directory, {"0901_memory_bytes": EXPAND, "0902_memory_bytes_only": CONTRACT})
