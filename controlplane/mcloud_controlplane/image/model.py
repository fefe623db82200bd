"""The tables of the image database."""

from __future__ import annotations

from typing import Any

import peewee

from mcloud_controlplane.core import processes, schema, tables
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.model import Model
from mcloud_controlplane.core.tables import Resource

database = peewee.DatabaseProxy()
shared = tables.bind(database)


class Quota(Model):
    """What a project may have; its row is the lock under which usage is counted."""

    project_id = peewee.TextField(primary_key=True)
    image_count = peewee.BigIntegerField(default=100)
    image_bytes = peewee.BigIntegerField(default=1 << 40)

    class Meta:
        database = database


class Image(Resource):
    """A disk to start from. A deleted one keeps its row for as long as its bytes are kept."""

    # Names of mcloud.image.v1.ImageStatus.State; DELETED while its bytes are being removed.
    state = peewee.TextField()
    visibility = peewee.TextField()  # PRIVATE or PUBLIC
    disk_format = peewee.TextField()  # QCOW2 or RAW
    is_protected = peewee.BooleanField(default=False)
    size_bytes = peewee.BigIntegerField(default=0)
    virtual_size_bytes = peewee.BigIntegerField(default=0)
    sha256 = peewee.TextField(default="")
    fault = peewee.TextField(default="")
    uploaded_bytes = peewee.BigIntegerField(default=0)  # known to be on disk, in the partial file
    reserved_bytes = peewee.BigIntegerField(default=0)  # counted by the quota
    # The lease of the upload that is going on: one at a time, and a dead one does not block.
    upload_number = peewee.BigIntegerField(default=0)
    upload_expire_time = peewee.BigIntegerField(default=0)

    class Meta:
        database = database


Image.add_index(Image.visibility)
Image.add_index(Image.delete_time)


class ImageUse(Model):
    """An instance that was started from an image."""

    instance_id = peewee.TextField()
    image_id = peewee.TextField(index=True)
    project_id = peewee.TextField()

    class Meta:
        database = database
        table_name = "image_use"
        primary_key = peewee.CompositeKey("instance_id", "image_id")


MODELS = (Quota, Image, ImageUse)


def open_database(url: str, process: processes.Process | None = None) -> Database:
    """Open the image database; its tables are made where they are missing."""
    return schema.open_database("image", url, database, shared, process)


def locked(query: Any) -> Any:
    """Return a select that locks its rows; SQLite's transaction has locked them already."""
    if isinstance(database.obj, peewee.PostgresqlDatabase):
        return query.for_update()
    return query
