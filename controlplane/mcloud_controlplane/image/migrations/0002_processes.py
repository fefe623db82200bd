"""Where each process that uses the database says so, with its release."""

from mcloud_controlplane.core import first_tables
from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"


def up(schema: Schema) -> None:
    """Make the table; processes from before it are not in it."""
    schema.run(first_tables.PROCESS)
