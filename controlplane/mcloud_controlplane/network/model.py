"""The tables of the network database."""

from __future__ import annotations

from typing import Any, TypeVar

import peewee

from mcloud_controlplane.core import processes, schema, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.model import Model
from mcloud_controlplane.core.tables import Resource

QueryT = TypeVar("QueryT")

database = peewee.DatabaseProxy()
shared = tables.bind(database)


class Quota(Model):
    """What a project may have; its row is the lock under which usage is counted."""

    project_id = peewee.TextField(primary_key=True)
    network_count = peewee.BigIntegerField(default=100)
    subnet_count = peewee.BigIntegerField(default=100)
    port_count = peewee.BigIntegerField(default=500)
    security_group_count = peewee.BigIntegerField(default=100)
    security_group_rule_count = peewee.BigIntegerField(default=1000)
    router_count = peewee.BigIntegerField(default=10)
    floating_ip_count = peewee.BigIntegerField(default=50)

    class Meta:
        database = database


class Network(Resource):
    """A network: of the overlay, or (with a physical_network) of the outside world."""

    vni = peewee.IntegerField(unique=True)  # also names what hosts make for the network
    mtu = peewee.IntegerField()
    shared = peewee.BooleanField(default=False)
    external = peewee.BooleanField(default=False)
    physical_network = peewee.TextField(default="")

    class Meta:
        database = database


class Subnet(Resource):
    """A range of addresses on a network."""

    network_id = peewee.TextField(index=True)
    ip_version = peewee.IntegerField()
    cidr = peewee.TextField()
    gateway_ip = peewee.TextField(default="")
    service_ip = peewee.TextField(default="")  # of DHCP and metadata; empty in the outside world
    dhcp_enabled = peewee.BooleanField(default=True)

    class Meta:
        database = database


class AllocationPool(Model):
    """Positions (address_store.py) from which a subnet's addresses are handed out."""

    subnet_id = peewee.TextField()
    first = peewee.BigIntegerField()
    last = peewee.BigIntegerField()  # included

    class Meta:
        database = database
        primary_key = peewee.CompositeKey("subnet_id", "first")


class Address(Model):
    """An address that a port has. The key makes it impossible to have one twice."""

    subnet_id = peewee.TextField()
    position = peewee.BigIntegerField()  # in the subnet
    ip_address = peewee.TextField(index=True)
    prefix_len = peewee.IntegerField()
    ip_version = peewee.IntegerField()
    port_id = peewee.TextField(index=True)
    number = peewee.IntegerField()  # among the port's

    class Meta:
        database = database
        primary_key = peewee.CompositeKey("subnet_id", "position")


class Port(Resource):
    """A plug on a network."""

    network_id = peewee.TextField()
    mac = peewee.TextField(unique=True)
    port_security_enabled = peewee.BooleanField(default=True)
    hostname = peewee.TextField(default="")
    owner_type = peewee.TextField(default="")  # "instance", "router", "floating_ip"
    owner_id = peewee.TextField(default="", index=True)
    delete_with_owner = peewee.BooleanField(default=False)
    state = peewee.TextField(default="DOWN")  # names of mcloud.network.v1.PortStatus.State
    host_id = peewee.TextField(default="")
    domain_id = peewee.TextField(default="")
    bound_generation = peewee.BigIntegerField(default=0)  # of the host's dataplane that has it

    class Meta:
        database = database
        indexes = ((("network_id", "host_id"), False), (("host_id", "state"), False))


class PortGroup(Model):
    """A port's membership in a security group."""

    port_id = peewee.TextField()
    security_group_id = peewee.TextField(index=True)

    class Meta:
        database = database
        table_name = "port_group"
        primary_key = peewee.CompositeKey("port_id", "security_group_id")


class SecurityGroup(Resource):
    """A named set of rules."""

    class Meta:
        database = database
        table_name = "security_group"


SecurityGroup.add_index(SecurityGroup.project_id, SecurityGroup.name, unique=True)


class SecurityGroupRule(Resource):
    """Allows what matches all of it."""

    security_group_id = peewee.TextField()
    direction = peewee.TextField()  # INGRESS, EGRESS
    ip_version = peewee.IntegerField()
    protocol = peewee.TextField(default="")
    port_min = peewee.IntegerField(null=True)
    port_max = peewee.IntegerField(null=True)
    remote_cidr = peewee.TextField(default="")
    remote_group_id = peewee.TextField(default="", index=True)
    digest = peewee.TextField()  # of what it matches: two alike are one too many

    class Meta:
        database = database
        table_name = "security_group_rule"
        indexes = ((("security_group_id", "digest"), True),)


class Router(Resource):
    """Joins subnets. Its legs are ports whose owner it is."""

    external_network_id = peewee.TextField(default="")
    gateway_port_id = peewee.TextField(default="")
    snat_enabled = peewee.BooleanField(default=True)
    host_id = peewee.TextField(default="", index=True)  # empty: no host was there yet

    class Meta:
        database = database


class FloatingIp(Resource):
    """An address of an external network that leads to a port; it is held by a port of its own."""

    external_network_id = peewee.TextField()
    address_port_id = peewee.TextField()
    floating_ip_address = peewee.TextField()
    port_id = peewee.TextField(default="")
    fixed_ip_address = peewee.TextField(default="")
    router_id = peewee.TextField(default="", index=True)

    class Meta:
        database = database
        table_name = "floating_ip"


FloatingIp.add_index(FloatingIp.port_id, unique=True, where=FloatingIp.port_id != "")


class HostDataplane(Model):
    """How far a host's dataplane is: which generation it is to have, and which it has."""

    host_id = peewee.TextField(primary_key=True)
    generation = peewee.BigIntegerField(default=1)
    observed_generation = peewee.BigIntegerField(default=0)
    incarnation = peewee.BigIntegerField(default=0)  # agent process that reported last
    sequence = peewee.BigIntegerField(default=0)  # of its last report applied
    error = peewee.BlobField(null=True)  # google.rpc.Status: why the generation is not reached
    underlay_ip = peewee.TextField(default="")
    gateway = peewee.BooleanField(default=False)  # says that it reaches the outside world

    class Meta:
        database = database
        table_name = "host_dataplane"


MODELS = (
    Quota,
    Network,
    Subnet,
    AllocationPool,
    Address,
    Port,
    PortGroup,
    SecurityGroup,
    SecurityGroupRule,
    Router,
    FloatingIp,
    HostDataplane,
)


def locked(query: QueryT) -> QueryT:
    """Return a select that locks its rows; SQLite's transaction has locked them already."""
    return query.for_update() if database.for_update else query  # type: ignore[attr-defined]


def lock(query: Any) -> None:
    """Lock the rows of a select until the commit; no statement where they are locked already."""
    if database.for_update:
        list(locked(query))


def open_database(url: str, process: processes.Process | None = None) -> Database:
    """Open the network database; its tables are made where they are missing."""
    return schema.open_database("network", url, database, shared, process)
