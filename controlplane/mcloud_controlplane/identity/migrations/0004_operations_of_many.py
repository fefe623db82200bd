"""Operations that are parts of another one, as a request for many has them."""

from mcloud_controlplane.core import first_tables
from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"


def up(schema: Schema) -> None:
    """Add the column; what was there before was asked for by itself."""
    schema.run(first_tables.PARENTS)
