"""Finds the domains whose hosts are behind without a look at all that live."""

from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"


def up(schema: Schema) -> None:
    """Make the index, in the order in which hosts are told."""
    schema.run(
        """
        CREATE INDEX IF NOT EXISTS domain_host_id_create_time
            ON domain (host_id, create_time) WHERE (observed_generation < generation);
        """
    )
