"""The first tables: flavors, key pairs, instances, domains, hosts, claims."""

from mcloud_controlplane.core import first_tables
from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"

TABLES = """
CREATE TABLE IF NOT EXISTS flavor (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL
);
CREATE INDEX IF NOT EXISTS flavor_project_id ON flavor (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS flavor_name ON flavor (name) WHERE (delete_time IS NULL);
CREATE TABLE IF NOT EXISTS keypair (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, fingerprint TEXT NOT NULL, type TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS keypair_project_id ON keypair (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS keypair_project_id_name ON keypair (project_id, name);
CREATE TABLE IF NOT EXISTS quota (
    project_id TEXT NOT NULL PRIMARY KEY, instance_count BIGINT NOT NULL,
    vcpu_count BIGINT NOT NULL, memory_mib BIGINT NOT NULL, key_pair_count BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS instance (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, state TEXT NOT NULL, flavor_id TEXT NOT NULL, flavor_name TEXT NOT NULL,
    image_id TEXT NOT NULL, vcpu_count INTEGER NOT NULL, memory_mib BIGINT NOT NULL,
    disk_gib INTEGER NOT NULL, hostname TEXT NOT NULL, key_pair_name TEXT NOT NULL,
    public_key TEXT NOT NULL, nics TEXT NOT NULL, volumes TEXT NOT NULL, image TEXT NOT NULL,
    host_id TEXT NOT NULL, domain_id TEXT NOT NULL, boot_number BIGINT NOT NULL,
    hard_reboot BOOLEAN NOT NULL, power_state TEXT NOT NULL, power_reason TEXT NOT NULL,
    operation_id TEXT NOT NULL, fault TEXT, reserved BOOLEAN NOT NULL, launch_time BIGINT
);
CREATE INDEX IF NOT EXISTS instance_project_id ON instance (project_id);
CREATE INDEX IF NOT EXISTS instance_host_id ON instance (host_id);
CREATE UNIQUE INDEX IF NOT EXISTS instance_project_id_name
    ON instance (project_id, name) WHERE (delete_time IS NULL);
CREATE TABLE IF NOT EXISTS domain (
    id TEXT NOT NULL PRIMARY KEY, instance_id TEXT NOT NULL, project_id TEXT NOT NULL,
    host_id TEXT NOT NULL, operation_id TEXT NOT NULL, generation BIGINT NOT NULL,
    absent BOOLEAN NOT NULL, observed_generation BIGINT NOT NULL, incarnation BIGINT NOT NULL,
    sequence BIGINT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, error BYTEA,
    create_time BIGINT NOT NULL, absent_time BIGINT
);
CREATE INDEX IF NOT EXISTS domain_instance_id ON domain (instance_id);
CREATE INDEX IF NOT EXISTS domain_host_id ON domain (host_id);
CREATE UNIQUE INDEX IF NOT EXISTS domain_instance_id_host_id
    ON domain (instance_id, host_id) WHERE (absent_time IS NULL);
CREATE INDEX IF NOT EXISTS domain_host_id_generation ON domain (host_id, generation);
CREATE TABLE IF NOT EXISTS host (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, disabled BOOLEAN NOT NULL, availability_zone TEXT NOT NULL,
    cpu_allocation_ratio DOUBLE PRECISION NOT NULL,
    memory_allocation_ratio DOUBLE PRECISION NOT NULL,
    disk_allocation_ratio DOUBLE PRECISION NOT NULL, vcpu_count INTEGER NOT NULL,
    memory_mib BIGINT NOT NULL, disk_gib BIGINT NOT NULL, reserved_vcpu_count INTEGER NOT NULL,
    reserved_memory_mib BIGINT NOT NULL, reserved_disk_gib BIGINT NOT NULL,
    underlay_ip TEXT NOT NULL, agent_version TEXT NOT NULL, hypervisor_type TEXT NOT NULL,
    hypervisor_version TEXT NOT NULL, cpu_arch TEXT NOT NULL, traits TEXT NOT NULL,
    incarnation BIGINT NOT NULL, report_number BIGINT NOT NULL, report_time BIGINT NOT NULL,
    failure_count INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS host_project_id ON host (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS host_name ON host (name) WHERE (delete_time IS NULL);
CREATE TABLE IF NOT EXISTS claim (
    domain_id TEXT NOT NULL PRIMARY KEY, instance_id TEXT NOT NULL, host_id TEXT NOT NULL,
    vcpu_count INTEGER NOT NULL, memory_mib BIGINT NOT NULL, disk_gib BIGINT NOT NULL,
    create_time BIGINT NOT NULL
);
CREATE INDEX IF NOT EXISTS claim_instance_id ON claim (instance_id);
CREATE INDEX IF NOT EXISTS claim_host_id ON claim (host_id);
CREATE TABLE IF NOT EXISTS placement (
    domain_id TEXT NOT NULL, attempt INTEGER NOT NULL, instance_id TEXT NOT NULL,
    explanation BYTEA NOT NULL, time BIGINT NOT NULL, PRIMARY KEY (domain_id, attempt)
);
CREATE INDEX IF NOT EXISTS placement_instance_id ON placement (instance_id);
"""


def up(schema: Schema) -> None:
    """Make what is not there: older daemons made these tables without a number."""
    schema.run(first_tables.SHARED)
    schema.run(TABLES)
