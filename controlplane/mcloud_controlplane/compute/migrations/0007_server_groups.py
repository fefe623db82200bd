"""Server groups, and which instances and claims are of one."""

from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"


def up(schema: Schema) -> None:
    """Make the table and the columns; what was there before is of no group."""
    schema.run(
        """
        CREATE TABLE IF NOT EXISTS server_group (
            id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
            labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
            create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
            spec BYTEA NOT NULL, policy TEXT NOT NULL, max_instances_per_host INTEGER NOT NULL
        );
        CREATE INDEX IF NOT EXISTS servergroup_project_id ON server_group (project_id);
        CREATE UNIQUE INDEX IF NOT EXISTS servergroup_project_id_name
            ON server_group (project_id, name);
        ALTER TABLE quota ADD COLUMN server_group_count BIGINT NOT NULL DEFAULT 50;
        ALTER TABLE instance ADD COLUMN server_group_id TEXT;
        CREATE INDEX IF NOT EXISTS instance_server_group_id_id ON instance (server_group_id, id)
            WHERE ((delete_time IS NULL) AND (server_group_id IS NOT NULL));
        ALTER TABLE claim ADD COLUMN server_group_id TEXT;
        CREATE INDEX IF NOT EXISTS claim_server_group_id_host_id
            ON claim (server_group_id, host_id) WHERE (server_group_id IS NOT NULL);
        """
    )
