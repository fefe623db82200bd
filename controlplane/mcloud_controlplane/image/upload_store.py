"""Uploads in the database: one at a time for an image, by a lease that runs out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mcloud.image.v1 import image_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, database
from mcloud_controlplane.image import image_store, quota_store
from mcloud_controlplane.image.model import Image, locked

LEASE_S = 60
_RESERVE_BYTES = 64 << 20  # of the quota, at a time


@dataclass(frozen=True)
class Lease:
    """The right to write an image's bytes."""

    image_id: str
    project_id: str
    disk_format: str
    number: int
    uploaded_bytes: int


def take(caller: auth.Caller, id_: str) -> Lease:
    """Begin an upload, or go on with one.

    A lease that ends later than any that is given now was given before the clock was set back.

    Raises:
        errors.NotFound: IMAGE_NOT_FOUND.
        errors.WrongState: IMAGE_NOT_QUEUED.
        errors.Conflict: UPLOAD_IN_PROGRESS.
    """
    row = image_store.get_owned(caller, id_)
    if row.state not in ("QUEUED", "SAVING", "ERROR"):
        raise errors.WrongState(
            "IMAGE_NOT_QUEUED", f"image {id_} has its bytes already; make another image", id=id_
        )
    moment = database.now()
    if moment < row.upload_expire_time < moment + 2 * LEASE_S * 1_000_000:
        raise in_progress(id_)
    if row.state != "SAVING":
        row.uploaded_bytes = row.reserved_bytes = 0
    row.state, row.fault = "SAVING", ""
    row.upload_number += 1
    row.upload_expire_time = moment + LEASE_S * 1_000_000
    _save(row)
    return Lease(id_, row.project_id, row.disk_format, row.upload_number, row.uploaded_bytes)


def in_progress(id_: str) -> errors.Conflict:
    """Return the error for a second upload."""
    return errors.Conflict(
        "UPLOAD_IN_PROGRESS", f"image {id_} is being uploaded already; wait, or cancel that", id=id_
    )


def advance(lease: Lease, uploaded_bytes: int, needed_bytes: int) -> int:
    """Renew the lease, note what is on disk, reserve room for more.

    Args:
        needed_bytes: that the image will have after what is to be written next.

    Returns:
        Up to how many bytes may be written now.

    Raises:
        errors.Exhausted: QUOTA_EXCEEDED.
        errors.Conflict: UPLOAD_IN_PROGRESS, another one has taken over.
        errors.NotFound: IMAGE_NOT_FOUND, it was deleted.
    """
    row = _hold(lease)
    if needed_bytes > row.reserved_bytes:
        allowed = quota_store.room(row.project_id, row.id)
        if needed_bytes > allowed:
            raise quota_store.bytes_exceeded(row.project_id, allowed)
        row.reserved_bytes = min(allowed, needed_bytes + _RESERVE_BYTES)
    row.uploaded_bytes = uploaded_bytes
    row.upload_expire_time = database.now() + LEASE_S * 1_000_000
    _save(row)
    return int(row.reserved_bytes)


def leave(lease: Lease, uploaded_bytes: int) -> None:
    """End an upload that is to be gone on with."""
    row = _find(lease)
    if row is not None and row.state == "SAVING":
        row.uploaded_bytes = row.reserved_bytes = uploaded_bytes
        row.upload_expire_time = 0
        _save(row)


def refuse(lease: Lease, fault: str) -> None:
    """End an upload whose bytes were refused and thrown away."""
    row = _find(lease)
    if row is not None and row.state == "SAVING":
        row.state, row.fault = "ERROR", fault
        row.uploaded_bytes = row.reserved_bytes = row.upload_expire_time = 0
        _save(row)


def finish(lease: Lease, size_bytes: int, virtual_size_bytes: int, sha256: str) -> image_pb2.Image:
    """End an upload whose bytes are in their place.

    Raises:
        errors.Conflict: UPLOAD_IN_PROGRESS.
        errors.NotFound: IMAGE_NOT_FOUND.
    """
    row = _hold(lease)
    row.state = "ACTIVE"
    row.size_bytes = row.reserved_bytes = size_bytes
    row.virtual_size_bytes = virtual_size_bytes
    row.sha256 = sha256
    row.uploaded_bytes = row.upload_expire_time = 0
    _save(row)
    return image_store.message(row)


def has_abandoned(idle_s: float) -> bool:
    """Tell whether `take_abandoned` would find any."""
    return bool(_abandoned(idle_s).exists())


def take_abandoned(idle_s: float) -> list[Lease]:
    """Take the uploads that nobody has gone on with for a long time, to end them."""
    leases = []
    for row in locked(_abandoned(idle_s).order_by(Image.update_time).limit(100)):
        row.upload_number += 1
        row.upload_expire_time = database.now() + LEASE_S * 1_000_000
        _save(row)
        leases.append(Lease(row.id, row.project_id, row.disk_format, row.upload_number, 0))
    return leases


def _abandoned(idle_s: float) -> Any:
    moment = database.now()
    return Image.select().where(
        (Image.state == "SAVING")
        & Image.delete_time.is_null()
        & (Image.upload_expire_time < moment)
        & (Image.update_time < moment - int(idle_s * 1_000_000))
    )


def _find(lease: Lease) -> Image | None:
    query = Image.select().where(
        (Image.id == lease.image_id) & (Image.upload_number == lease.number)
    )
    found: Image | None = locked(query).first()
    return found


def _hold(lease: Lease) -> Image:
    row = _find(lease)
    if row is None or row.state != "SAVING":
        raise in_progress(lease.image_id)
    if row.delete_time is not None:
        raise image_store.not_found(lease.image_id)
    return row


def _save(row: Image) -> None:
    row.version += 1
    row.update_time = database.now()
    row.save()
    image_store.log_change(row, "MODIFIED")
