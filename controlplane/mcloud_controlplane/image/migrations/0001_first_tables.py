"""The first tables: images and who uses them."""

from mcloud_controlplane.core import first_tables
from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"

TABLES = """
CREATE TABLE IF NOT EXISTS quota (
    project_id TEXT NOT NULL PRIMARY KEY, image_count BIGINT NOT NULL, image_bytes BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS image (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, state TEXT NOT NULL, visibility TEXT NOT NULL, disk_format TEXT NOT NULL,
    is_protected BOOLEAN NOT NULL, size_bytes BIGINT NOT NULL, virtual_size_bytes BIGINT NOT NULL,
    sha256 TEXT NOT NULL, fault TEXT NOT NULL, uploaded_bytes BIGINT NOT NULL,
    reserved_bytes BIGINT NOT NULL, upload_number BIGINT NOT NULL,
    upload_expire_time BIGINT NOT NULL
);
CREATE INDEX IF NOT EXISTS image_project_id ON image (project_id);
CREATE INDEX IF NOT EXISTS image_visibility ON image (visibility);
CREATE INDEX IF NOT EXISTS image_delete_time ON image (delete_time);
CREATE TABLE IF NOT EXISTS image_use (
    instance_id TEXT NOT NULL, image_id TEXT NOT NULL, project_id TEXT NOT NULL,
    PRIMARY KEY (instance_id, image_id)
);
CREATE INDEX IF NOT EXISTS imageuse_image_id ON image_use (image_id);
"""


def up(schema: Schema) -> None:
    """Make what is not there: older daemons made these tables without a number."""
    schema.run(first_tables.SHARED)
    schema.run(TABLES)
