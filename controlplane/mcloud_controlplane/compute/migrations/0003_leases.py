"""Leases of works that one process at a time is to do; questions to hosts."""

from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"


def up(schema: Schema) -> None:
    """Make the tables."""
    schema.run(
        """
        CREATE TABLE IF NOT EXISTS lease (
            name TEXT NOT NULL PRIMARY KEY, owner TEXT NOT NULL, expire_time BIGINT NOT NULL
        );
        CREATE TABLE IF NOT EXISTS host_listing (
            request_id TEXT NOT NULL, host_id TEXT NOT NULL, expire_time BIGINT NOT NULL,
            listing BYTEA, PRIMARY KEY (request_id, host_id)
        );
        CREATE INDEX IF NOT EXISTS hostlisting_expire_time ON host_listing (expire_time);
        """
    )
