"""Marks domains whose hosts have to say, after a restore, whether they are there."""

from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"


def up(schema: Schema) -> None:
    """Add the column; where nothing was restored, every domain is proven."""
    schema.run("ALTER TABLE domain ADD COLUMN unproven BOOLEAN NOT NULL DEFAULT FALSE")
