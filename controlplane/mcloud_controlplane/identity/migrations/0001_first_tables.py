"""The first tables: users, projects, roles, credentials, keys, certificates."""

from mcloud_controlplane.core import first_tables
from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"

TABLES = """
CREATE TABLE IF NOT EXISTS identity_user (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, disabled BOOLEAN NOT NULL, password_hash TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS user_project_id ON identity_user (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS user_name ON identity_user (name);
CREATE TABLE IF NOT EXISTS project (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, disabled BOOLEAN NOT NULL
);
CREATE INDEX IF NOT EXISTS project_project_id ON project (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS project_name ON project (name);
CREATE TABLE IF NOT EXISTS role_assignment (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, user_id TEXT NOT NULL, role INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS roleassignment_project_id ON role_assignment (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS roleassignment_user_id_project_id_role
    ON role_assignment (user_id, project_id, role);
CREATE TABLE IF NOT EXISTS application_credential (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, user_id TEXT NOT NULL, role INTEGER NOT NULL, secret_hash TEXT NOT NULL,
    expire_time BIGINT
);
CREATE INDEX IF NOT EXISTS applicationcredential_project_id ON application_credential (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS applicationcredential_user_id_project_id_name
    ON application_credential (user_id, project_id, name);
CREATE TABLE IF NOT EXISTS epoch (
    principal_id TEXT NOT NULL PRIMARY KEY, value BIGINT NOT NULL, time BIGINT NOT NULL
);
CREATE INDEX IF NOT EXISTS epoch_time ON epoch (time);
CREATE TABLE IF NOT EXISTS signing_key (
    id TEXT NOT NULL PRIMARY KEY, private_key BYTEA NOT NULL, public_key BYTEA NOT NULL,
    create_time BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS login_attempt (
    name_hash TEXT NOT NULL PRIMARY KEY, failure_count INTEGER NOT NULL, time BIGINT NOT NULL,
    not_before BIGINT NOT NULL
);
CREATE INDEX IF NOT EXISTS attempt_time ON login_attempt (time);
CREATE TABLE IF NOT EXISTS join_token (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, secret_hash TEXT NOT NULL, expire_time BIGINT NOT NULL,
    host_id TEXT NOT NULL, key_hash TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jointoken_project_id ON join_token (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS jointoken_secret_hash ON join_token (secret_hash);
CREATE INDEX IF NOT EXISTS jointoken_host_id ON join_token (host_id);
CREATE TABLE IF NOT EXISTS certificate (
    serial TEXT NOT NULL PRIMARY KEY, host_id TEXT NOT NULL, fingerprint TEXT NOT NULL,
    create_time BIGINT NOT NULL, expire_time BIGINT NOT NULL, revoke_time BIGINT
);
CREATE INDEX IF NOT EXISTS certificate_host_id ON certificate (host_id);
CREATE INDEX IF NOT EXISTS certificate_revoke_time ON certificate (revoke_time);
"""


def up(schema: Schema) -> None:
    """Make what is not there: older daemons made these tables without a number."""
    schema.run(first_tables.SHARED)
    schema.run(TABLES)
