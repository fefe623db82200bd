"""The tables of the compute database, which scheduler and conductor share."""

from __future__ import annotations

from typing import TypeVar

import peewee

from mcloud_controlplane.core import processes, schema, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.model import Model
from mcloud_controlplane.core.tables import JsonField, Resource

QueryT = TypeVar("QueryT")

database = peewee.DatabaseProxy()
shared = tables.bind(database)


class Flavor(Resource):
    """A size of instances."""

    class Meta:
        database = database


Flavor.add_index(Flavor.name, unique=True, where=Flavor.delete_time.is_null())


class KeyPair(Resource):
    """An SSH public key."""

    fingerprint = peewee.TextField()
    type = peewee.TextField()

    class Meta:
        database = database


KeyPair.add_index(KeyPair.project_id, KeyPair.name, unique=True)


class ServerGroup(Resource):
    """Instances that are to run on one host, or on different ones."""

    policy = peewee.TextField()  # names of mcloud.compute.v1.ServerGroupSpec.Policy
    max_instances_per_host = peewee.IntegerField()  # at least 1

    class Meta:
        database = database
        table_name = "server_group"


ServerGroup.add_index(ServerGroup.project_id, ServerGroup.name, unique=True)


class Quota(Model):
    """What a project may have; its row is the lock under which usage is counted."""

    project_id = peewee.TextField(primary_key=True)
    instance_count = peewee.BigIntegerField(default=50)
    vcpu_count = peewee.BigIntegerField(default=200)
    memory_mib = peewee.BigIntegerField(default=524_288)
    key_pair_count = peewee.BigIntegerField(default=100)
    server_group_count = peewee.BigIntegerField(default=50)

    class Meta:
        database = database


class Instance(Resource):
    """What an owner wants. Deleted ones keep their row, with delete_time."""

    state = peewee.TextField()  # names of mcloud.compute.v1.InstanceStatus.State
    flavor_id = peewee.TextField()
    flavor_name = peewee.TextField()
    image_id = peewee.TextField()
    vcpu_count = peewee.IntegerField()
    memory_mib = peewee.BigIntegerField()
    disk_gib = peewee.IntegerField()
    hostname = peewee.TextField()
    key_pair_name = peewee.TextField(default="")
    public_key = peewee.TextField(default="")
    nics = JsonField(default=list)  # [{"port_id", "network_id", "existing", "ip", "mac", …}]
    volumes = JsonField(default=list)  # [{"attachment_id", "volume_id", "device"}]
    image = JsonField(default=dict)  # {"sha256", "format", "size_bytes"}; known once reserved
    host_id = peewee.TextField(default="", index=True)
    domain_id = peewee.TextField(default="")
    boot_number = peewee.BigIntegerField(default=1)
    hard_reboot = peewee.BooleanField(default=False)
    power_state = peewee.TextField(default="RUNNING")  # of mcloud.conductor.v1.PowerState
    power_reason = peewee.TextField(default="")
    operation_id = peewee.TextField(default="")  # the one that works on it; exclusive
    fault = JsonField(null=True)  # {"reason", "message", "time"}
    # Ports, attachments, the image may be held for it: from its beginning to its release.
    reserved = peewee.BooleanField(default=False)
    launch_time = peewee.BigIntegerField(null=True)
    server_group_id = peewee.TextField(null=True)

    class Meta:
        database = database


# Names are unique per project among the living.
Instance.add_index(
    Instance.project_id, Instance.name, unique=True, where=Instance.delete_time.is_null()
)
# The order of a project's pages.
Instance.add_index(
    Instance.project_id,
    Instance.create_time,
    Instance.id,
    where=Instance.delete_time.is_null(),
)
# The members of a server group, oldest first.
Instance.add_index(
    Instance.server_group_id,
    Instance.id,
    where=Instance.delete_time.is_null() & Instance.server_group_id.is_null(False),
)


class Domain(Model):
    """One incarnation of an instance on one host. Its row outlives it, marked."""

    id = peewee.TextField(primary_key=True)
    instance_id = peewee.TextField(index=True)
    project_id = peewee.TextField()
    host_id = peewee.TextField(index=True)
    operation_id = peewee.TextField(default="")  # that made the present generation
    generation = peewee.BigIntegerField()  # of the desired state; set by the control plane only
    absent = peewee.BooleanField(default=False)  # desired: a tombstone
    observed_generation = peewee.BigIntegerField(default=0)  # reached by the host
    incarnation = peewee.BigIntegerField(default=0)  # agent process that reported last
    sequence = peewee.BigIntegerField(default=0)  # of its last report applied
    state = peewee.TextField(default="PREPARING")  # of mcloud.conductor.v1.DomainStatus.State
    reason = peewee.TextField(default="")
    error = peewee.BlobField(null=True)  # google.rpc.Status: why the generation is not reached
    create_time = peewee.BigIntegerField()
    absent_time = peewee.BigIntegerField(null=True)  # set when the host reported it gone
    unproven = peewee.BooleanField(default=False)  # restored; its host has yet to say so

    class Meta:
        database = database


# One living domain of an instance on a host.
Domain.add_index(
    Domain.instance_id, Domain.host_id, unique=True, where=Domain.absent_time.is_null()
)
Domain.add_index(Domain.host_id, Domain.generation)
# What hosts have not reached, in the order in which they are told.
Domain.add_index(
    Domain.host_id, Domain.create_time, where=Domain.observed_generation < Domain.generation
)


class Host(Resource):
    """A hypervisor. Totals are its own report; ratios are the operator's."""

    disabled = peewee.BooleanField(default=False)
    availability_zone = peewee.TextField(default="")
    cpu_allocation_ratio = peewee.DoubleField(default=0)
    memory_allocation_ratio = peewee.DoubleField(default=0)
    disk_allocation_ratio = peewee.DoubleField(default=0)
    vcpu_count = peewee.IntegerField(default=0)
    memory_mib = peewee.BigIntegerField(default=0)
    disk_gib = peewee.BigIntegerField(default=0)
    reserved_vcpu_count = peewee.IntegerField(default=0)
    reserved_memory_mib = peewee.BigIntegerField(default=0)
    reserved_disk_gib = peewee.BigIntegerField(default=0)
    underlay_ip = peewee.TextField(default="")
    agent_version = peewee.TextField(default="")
    hypervisor_type = peewee.TextField(default="")
    hypervisor_version = peewee.TextField(default="")
    cpu_arch = peewee.TextField(default="")
    traits = JsonField(default=list)
    incarnation = peewee.BigIntegerField(default=0)
    report_number = peewee.BigIntegerField(default=0)  # of its report stream; lower ones close
    report_time = peewee.BigIntegerField(default=0)
    failure_count = peewee.IntegerField(default=0)  # builds that it refused, since one succeeded

    class Meta:
        database = database


Host.add_index(Host.name, unique=True, where=Host.delete_time.is_null())


class Claim(Model):
    """Room held on a host for one domain."""

    domain_id = peewee.TextField(primary_key=True)
    instance_id = peewee.TextField(index=True)
    host_id = peewee.TextField(index=True)
    vcpu_count = peewee.IntegerField()
    memory_mib = peewee.BigIntegerField()
    disk_gib = peewee.BigIntegerField()
    create_time = peewee.BigIntegerField()
    server_group_id = peewee.TextField(null=True)  # of its instance

    class Meta:
        database = database


# How many members of a server group each host has.
Claim.add_index(Claim.server_group_id, Claim.host_id, where=Claim.server_group_id.is_null(False))


class Placement(Model):
    """The explanation of one attempt to find a host."""

    domain_id = peewee.TextField()
    attempt = peewee.IntegerField()
    instance_id = peewee.TextField(index=True)
    explanation = peewee.BlobField()  # mcloud.scheduler.v1.PlacementExplanation
    time = peewee.BigIntegerField()

    class Meta:
        database = database
        primary_key = peewee.CompositeKey("domain_id", "attempt")


class HostListing(Model):
    """A question to a host: what is on it. The process that has its session answers."""

    request_id = peewee.TextField()  # of the questions that were asked together
    host_id = peewee.TextField()
    expire_time = peewee.BigIntegerField(index=True)
    listing = peewee.BlobField(null=True)  # mcloud.common.v1.Listing; null: not answered

    class Meta:
        database = database
        table_name = "host_listing"
        primary_key = peewee.CompositeKey("request_id", "host_id")


MODELS = (
    Flavor, KeyPair, ServerGroup, Quota, Instance, Domain, Host, Claim, Placement, HostListing,
)  # fmt: skip


def locked(query: QueryT) -> QueryT:
    """Return a select that locks its rows; SQLite's transaction has locked them already.

    Whatever is read in order to be changed is read like this: otherwise a unit that runs at the
    same time could see the same row, and one would overwrite what the other did.
    """
    return query.for_update() if database.for_update else query  # type: ignore[attr-defined]


def locked_or_skipped(query: QueryT) -> QueryT:
    """Return a select that locks its rows and leaves out those that others have locked."""
    lock = "FOR UPDATE SKIP LOCKED"
    return query.for_update(lock) if database.for_update else query  # type: ignore[attr-defined]


def open_database(url: str, process: processes.Process | None = None) -> Database:
    """Open the compute database; its tables are made where they are missing."""
    return schema.open_database("compute", url, database, shared, process)
