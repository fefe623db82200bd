"""The first tables: networks, subnets, ports, groups, routers, floating addresses."""

from mcloud_controlplane.core import first_tables
from mcloud_controlplane.core.migrations import Kind, Schema

KIND = Kind.EXPAND
SINCE = "0.1"

TABLES = """
CREATE TABLE IF NOT EXISTS quota (
    project_id TEXT NOT NULL PRIMARY KEY, network_count BIGINT NOT NULL,
    subnet_count BIGINT NOT NULL, port_count BIGINT NOT NULL, security_group_count BIGINT NOT NULL,
    security_group_rule_count BIGINT NOT NULL, router_count BIGINT NOT NULL,
    floating_ip_count BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS network (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, vni INTEGER NOT NULL, mtu INTEGER NOT NULL, shared BOOLEAN NOT NULL,
    external BOOLEAN NOT NULL, physical_network TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS network_project_id ON network (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS network_vni ON network (vni);
CREATE TABLE IF NOT EXISTS subnet (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, network_id TEXT NOT NULL, ip_version INTEGER NOT NULL, cidr TEXT NOT NULL,
    gateway_ip TEXT NOT NULL, service_ip TEXT NOT NULL, dhcp_enabled BOOLEAN NOT NULL
);
CREATE INDEX IF NOT EXISTS subnet_project_id ON subnet (project_id);
CREATE INDEX IF NOT EXISTS subnet_network_id ON subnet (network_id);
CREATE TABLE IF NOT EXISTS allocationpool (
    subnet_id TEXT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL,
    PRIMARY KEY (subnet_id, first)
);
CREATE TABLE IF NOT EXISTS address (
    subnet_id TEXT NOT NULL, position BIGINT NOT NULL, ip_address TEXT NOT NULL,
    prefix_len INTEGER NOT NULL, ip_version INTEGER NOT NULL, port_id TEXT NOT NULL,
    number INTEGER NOT NULL, PRIMARY KEY (subnet_id, position)
);
CREATE INDEX IF NOT EXISTS address_ip_address ON address (ip_address);
CREATE INDEX IF NOT EXISTS address_port_id ON address (port_id);
CREATE TABLE IF NOT EXISTS port (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, network_id TEXT NOT NULL, mac TEXT NOT NULL,
    port_security_enabled BOOLEAN NOT NULL, hostname TEXT NOT NULL, owner_type TEXT NOT NULL,
    owner_id TEXT NOT NULL, delete_with_owner BOOLEAN NOT NULL, state TEXT NOT NULL,
    host_id TEXT NOT NULL, domain_id TEXT NOT NULL, bound_generation BIGINT NOT NULL
);
CREATE INDEX IF NOT EXISTS port_project_id ON port (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS port_mac ON port (mac);
CREATE INDEX IF NOT EXISTS port_owner_id ON port (owner_id);
CREATE INDEX IF NOT EXISTS port_network_id_host_id ON port (network_id, host_id);
CREATE INDEX IF NOT EXISTS port_host_id_state ON port (host_id, state);
CREATE TABLE IF NOT EXISTS port_group (
    port_id TEXT NOT NULL, security_group_id TEXT NOT NULL, PRIMARY KEY (port_id, security_group_id)
);
CREATE INDEX IF NOT EXISTS portgroup_security_group_id ON port_group (security_group_id);
CREATE TABLE IF NOT EXISTS security_group (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL
);
CREATE INDEX IF NOT EXISTS securitygroup_project_id ON security_group (project_id);
CREATE UNIQUE INDEX IF NOT EXISTS securitygroup_project_id_name
    ON security_group (project_id, name);
CREATE TABLE IF NOT EXISTS security_group_rule (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, security_group_id TEXT NOT NULL, direction TEXT NOT NULL,
    ip_version INTEGER NOT NULL, protocol TEXT NOT NULL, port_min INTEGER, port_max INTEGER,
    remote_cidr TEXT NOT NULL, remote_group_id TEXT NOT NULL, digest TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS securitygrouprule_project_id ON security_group_rule (project_id);
CREATE INDEX IF NOT EXISTS securitygrouprule_remote_group_id
    ON security_group_rule (remote_group_id);
CREATE UNIQUE INDEX IF NOT EXISTS securitygrouprule_security_group_id_digest
    ON security_group_rule (security_group_id, digest);
CREATE TABLE IF NOT EXISTS router (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, external_network_id TEXT NOT NULL, gateway_port_id TEXT NOT NULL,
    snat_enabled BOOLEAN NOT NULL, host_id TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS router_project_id ON router (project_id);
CREATE INDEX IF NOT EXISTS router_host_id ON router (host_id);
CREATE TABLE IF NOT EXISTS floating_ip (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, project_id TEXT NOT NULL,
    labels TEXT NOT NULL, version BIGINT NOT NULL, generation BIGINT NOT NULL,
    create_time BIGINT NOT NULL, update_time BIGINT NOT NULL, delete_time BIGINT,
    spec BYTEA NOT NULL, external_network_id TEXT NOT NULL, address_port_id TEXT NOT NULL,
    floating_ip_address TEXT NOT NULL, port_id TEXT NOT NULL, fixed_ip_address TEXT NOT NULL,
    router_id TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS floatingip_project_id ON floating_ip (project_id);
CREATE INDEX IF NOT EXISTS floatingip_router_id ON floating_ip (router_id);
CREATE UNIQUE INDEX IF NOT EXISTS floatingip_port_id ON floating_ip (port_id) WHERE (port_id != '');
CREATE TABLE IF NOT EXISTS host_dataplane (
    host_id TEXT NOT NULL PRIMARY KEY, generation BIGINT NOT NULL,
    observed_generation BIGINT NOT NULL, incarnation BIGINT NOT NULL, sequence BIGINT NOT NULL,
    error BYTEA, underlay_ip TEXT NOT NULL, gateway BOOLEAN NOT NULL
);
"""


def up(schema: Schema) -> None:
    """Make what is not there: older daemons made these tables without a number."""
    schema.run(first_tables.SHARED)
    schema.run(TABLES)
