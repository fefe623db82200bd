"""The first tables: volumes and attachments."""

from mcloud_controlplane.core import first_tables
from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"

TABLES = """
CREATE TABLE IF NOT EXISTS quota (
    project_id TEXT NOT NULL PRIMARY KEY, volume_count BIGINT NOT NULL, volume_gib BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS storage_host (
    host_id TEXT NOT NULL PRIMARY KEY, capacity_gib BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS volume (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, size_gib INTEGER NOT NULL, state TEXT NOT NULL, fault TEXT NOT NULL,
    attachment_id TEXT NOT NULL, instance_id TEXT NOT NULL, host_id TEXT NOT NULL,
    desired_generation BIGINT NOT NULL, absent BOOLEAN NOT NULL,
    observed_generation BIGINT NOT NULL, incarnation BIGINT NOT NULL, sequence BIGINT NOT NULL,
    error BYTEA, allocated_bytes BIGINT NOT NULL, endpoints TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS volume_project_id ON volume (project_id);
CREATE INDEX IF NOT EXISTS volume_instance_id ON volume (instance_id);
CREATE INDEX IF NOT EXISTS volume_host_id_desired_generation
    ON volume (host_id, desired_generation);
CREATE TABLE IF NOT EXISTS attachment (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, volume_id TEXT NOT NULL, instance_id TEXT NOT NULL,
    delete_with_instance BOOLEAN NOT NULL, state TEXT NOT NULL, host_id TEXT NOT NULL,
    domain_id TEXT NOT NULL, certificate_subject TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS attachment_project_id ON attachment (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS attachment_volume_id ON attachment (volume_id);
CREATE INDEX IF NOT EXISTS attachment_instance_id ON attachment (instance_id);
"""


def up(schema: Schema) -> None:
    """Make what is not there: older daemons made these tables without a number."""
    schema.run(first_tables.SHARED)
    schema.run(TABLES)
