"""An image to create instances of that never boot."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

from mcloud.image.v1 import image_pb2, image_service_pb2
from mcloud_base import ids, rpc


async def upload_zeros(images: Any, token: str) -> str:
    """Make an image of 1 MiB of zeros; return its id."""
    who = rpc.bearer(token)
    operation = await rpc.call(
        images.CreateImage,
        image_service_pb2.CreateImageRequest(
            request_id=ids.request_id(),
            name="zeros",
            spec=image_pb2.ImageSpec(disk_format=image_pb2.DISK_FORMAT_RAW),
        ),
        metadata=who,
    )
    content = bytes(1 << 20)

    async def parts() -> AsyncIterator[image_service_pb2.UploadImageDataRequest]:
        id_ = operation.resource.id
        yield image_service_pb2.UploadImageDataRequest(start=image_service_pb2.UploadStart(id=id_))
        yield image_service_pb2.UploadImageDataRequest(chunk=content)
        yield image_service_pb2.UploadImageDataRequest(
            end=image_service_pb2.UploadEnd(sha256=hashlib.sha256(content).hexdigest())
        )

    with rpc.reraised():
        image = await images.UploadImageData(parts(), metadata=tuple(who), timeout=60)
    assert image.status.state == image_pb2.ImageStatus.STATE_ACTIVE
    return str(image.metadata.id)
