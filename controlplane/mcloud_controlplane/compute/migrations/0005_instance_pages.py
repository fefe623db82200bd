"""Finds a page of a project's instances without sorting all of them."""

from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"


def up(schema: Schema) -> None:
    """Make the index, in the order of the pages."""
    schema.run(
        """
        CREATE INDEX IF NOT EXISTS instance_project_id_create_time_id
            ON instance (project_id, create_time, id) WHERE (delete_time IS NULL);
        """
    )
