"""What the images' records always are (core/invariants.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peewee

from mcloud_controlplane.core import invariants, tables
from mcloud_controlplane.core.invariants import Invariant, Violation
from mcloud_controlplane.image.model import Image, ImageUse, locked, shared


def _without_image() -> Any:
    image = Image.select(Image.id).where(Image.id == ImageUse.image_id)
    return ~peewee.fn.EXISTS(image)


def _uses() -> Iterator[Violation]:
    for row in ImageUse.select().where(_without_image()).order_by(ImageUse.instance_id):
        yield Violation(
            subject=row.image_id,
            owner_id=row.instance_id,
            detail="the image that the instance was started from is not there",
        )


def _forget_use(violation: Violation) -> bool:
    this = (ImageUse.image_id == violation.subject) & (ImageUse.instance_id == violation.owner_id)
    return bool(ImageUse.delete().where(this & _without_image()).execute())


# While it is uploaded, what is reserved is more.
_MISCOUNTED = (Image.state == "ACTIVE") & (Image.reserved_bytes != Image.size_bytes)


def _usage() -> Iterator[Violation]:
    for row in Image.select().where(_MISCOUNTED).order_by(Image.id):
        yield Violation(
            subject=row.id,
            owner_id=row.project_id,
            detail=f"it takes {row.size_bytes} bytes; {row.reserved_bytes} are counted",
        )


def _count_anew(violation: Violation) -> bool:
    row = locked(Image.select().where((Image.id == violation.subject) & _MISCOUNTED)).first()
    if row is None:
        return False
    row.reserved_bytes = row.size_bytes
    row.save()
    tables.changed("image", row.id, row.project_id)
    return True


INVARIANTS = (
    Invariant("IMAGE_USE_WITHOUT_IMAGE", _uses, _forget_use, "forget the use"),
    Invariant("IMAGE_USAGE_DIFFERS", _usage, _count_anew, "count what it takes"),
    invariants.of_operations(shared, ()),
)
count = invariants.count_rows(Image, ImageUse)
