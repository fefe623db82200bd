"""The tables of the volume database."""

from __future__ import annotations

from typing import Any

import peewee

from mcloud_controlplane.core import processes, schema, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.model import Model
from mcloud_controlplane.core.tables import JsonField, Resource

database = peewee.DatabaseProxy()
shared = tables.bind(database)


class Quota(Model):
    """What a project may have; its row is the lock under which usage is counted."""

    project_id = peewee.TextField(primary_key=True)
    volume_count = peewee.BigIntegerField(default=100)
    volume_gib = peewee.BigIntegerField(default=10_240)

    class Meta:
        database = database


class StorageHost(Model):
    """What a host that stores volumes has said of itself; its row is the lock on its room."""

    host_id = peewee.TextField(primary_key=True)
    capacity_gib = peewee.BigIntegerField(default=0)  # 0: it did not say

    class Meta:
        database = database
        table_name = "storage_host"


class Volume(Resource):
    """A block device. A deleted one keeps its row until its host says that the data are gone."""

    size_gib = peewee.IntegerField()
    state = peewee.TextField()  # names of mcloud.volume.v1.VolumeStatus.State
    fault = peewee.TextField(default="")
    attachment_id = peewee.TextField(default="")
    instance_id = peewee.TextField(default="", index=True)
    # What its host is to have and has.
    host_id = peewee.TextField(default="")
    desired_generation = peewee.BigIntegerField(default=0)  # 0: nothing has been asked of the host
    absent = peewee.BooleanField(default=False)  # desired: a tombstone
    observed_generation = peewee.BigIntegerField(default=0)
    incarnation = peewee.BigIntegerField(default=0)  # agent process that reported last
    sequence = peewee.BigIntegerField(default=0)  # of its last report applied
    error = peewee.BlobField(null=True)  # google.rpc.Status: why the generation is not reached
    allocated_bytes = peewee.BigIntegerField(default=0)
    endpoints = JsonField(default=list)  # [{"attachment_id", "address", "port", "export_name"}]

    class Meta:
        database = database


Volume.add_index(Volume.host_id, Volume.desired_generation)


class Attachment(Resource):
    """The claim of an instance on a volume. A released one has no row; its id is retired."""

    volume_id = peewee.TextField(unique=True)  # one living attachment of a volume
    instance_id = peewee.TextField(index=True)
    delete_with_instance = peewee.BooleanField(default=False)
    state = peewee.TextField()  # names of mcloud.volume.v1.AttachmentStatus.State
    host_id = peewee.TextField(default="")
    domain_id = peewee.TextField(default="")
    certificate_subject = peewee.TextField(default="")  # of the host that it is served to

    class Meta:
        database = database


MODELS = (Quota, StorageHost, Volume, Attachment)


def open_database(url: str, process: processes.Process | None = None) -> Database:
    """Open the volume database; its tables are made where they are missing."""
    return schema.open_database("volume", url, database, shared, process)


def locked(query: Any) -> Any:
    """Return a select that locks its rows; SQLite's transaction has locked them already."""
    if isinstance(database.obj, peewee.PostgresqlDatabase):
        return query.for_update()
    return query
