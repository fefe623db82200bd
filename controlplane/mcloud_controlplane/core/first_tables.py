"""SQL of the tables that every database has, as they were at first; models: tables.py.

What has been released is not changed here: a change is a migration in each folder.
"""

SHARED = """
CREATE TABLE IF NOT EXISTS deployment (
    id INTEGER NOT NULL PRIMARY KEY, epoch TEXT NOT NULL, revision BIGINT NOT NULL,
    schema_version INTEGER NOT NULL, request_key TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS change (
    revision BIGINT NOT NULL, number INTEGER NOT NULL, type TEXT NOT NULL,
    resource_id TEXT NOT NULL, project_id TEXT NOT NULL, change TEXT NOT NULL, time BIGINT NOT NULL,
    PRIMARY KEY (revision, number)
);
CREATE INDEX IF NOT EXISTS change_type_revision ON change (type, revision);
CREATE TABLE IF NOT EXISTS request (
    project_id TEXT NOT NULL, principal_id TEXT NOT NULL, method TEXT NOT NULL,
    request_id TEXT NOT NULL, hash TEXT NOT NULL, operation_id TEXT NOT NULL, time BIGINT NOT NULL,
    PRIMARY KEY (project_id, principal_id, method, request_id)
);
CREATE INDEX IF NOT EXISTS request_time ON request (time);
CREATE TABLE IF NOT EXISTS operation (
    id TEXT NOT NULL PRIMARY KEY, project_id TEXT NOT NULL, method TEXT NOT NULL,
    resource_type TEXT NOT NULL, resource_id TEXT NOT NULL, resource_name TEXT NOT NULL,
    principal_id TEXT NOT NULL, request_id TEXT NOT NULL, state TEXT NOT NULL,
    cancel_requested BOOLEAN NOT NULL, error BYTEA, request BYTEA, response BYTEA,
    workflow TEXT NOT NULL, job TEXT NOT NULL, position INTEGER NOT NULL, attempt INTEGER NOT NULL,
    trace_id TEXT NOT NULL, create_time BIGINT NOT NULL, end_time BIGINT, deadline BIGINT,
    not_before BIGINT NOT NULL, lease_owner TEXT NOT NULL, lease_number BIGINT NOT NULL,
    lease_expire_time BIGINT NOT NULL
);
CREATE INDEX IF NOT EXISTS operation_project_id ON operation (project_id);
CREATE INDEX IF NOT EXISTS operation_resource_id ON operation (resource_id);
CREATE INDEX IF NOT EXISTS operation_state_lease_expire_time
    ON operation (state, lease_expire_time);
CREATE TABLE IF NOT EXISTS operation_step (
    operation_id TEXT NOT NULL, number INTEGER NOT NULL, attempt INTEGER NOT NULL,
    name TEXT NOT NULL, service TEXT NOT NULL, host TEXT NOT NULL, state TEXT NOT NULL,
    start_time BIGINT NOT NULL, end_time BIGINT, detail TEXT NOT NULL,
    PRIMARY KEY (operation_id, number, attempt)
);
CREATE TABLE IF NOT EXISTS effect (
    id TEXT NOT NULL PRIMARY KEY, lease_number BIGINT NOT NULL, retired BOOLEAN NOT NULL,
    time BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS host_session (
    host_id TEXT NOT NULL PRIMARY KEY, number BIGINT NOT NULL, process TEXT NOT NULL,
    incarnation BIGINT NOT NULL, underlay_ip TEXT NOT NULL, certificate_subject TEXT NOT NULL,
    agent_version TEXT NOT NULL, lease_expire_time BIGINT NOT NULL, storage BOOLEAN NOT NULL
);
"""

PARENTS = """
ALTER TABLE operation ADD COLUMN parent_id TEXT;
CREATE INDEX IF NOT EXISTS operation_parent_id_state
    ON operation (parent_id, state) WHERE (parent_id IS NOT NULL);
"""

PROCESS = """
CREATE TABLE IF NOT EXISTS process (
    id TEXT NOT NULL PRIMARY KEY, release TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
    services TEXT NOT NULL, schema_number INTEGER NOT NULL, start_time BIGINT NOT NULL,
    heartbeat_time BIGINT NOT NULL
);
"""
