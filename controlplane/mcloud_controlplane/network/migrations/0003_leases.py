"""Leases of works that one process at a time is to do: sweeping, pruning."""

from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"


def up(schema: Schema) -> None:
    """Make the table."""
    schema.run(
        """
        CREATE TABLE IF NOT EXISTS lease (
            name TEXT NOT NULL PRIMARY KEY, owner TEXT NOT NULL, expire_time BIGINT NOT NULL
        );
        """
    )
