"""Uploading images."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable

from benchmarks.client import Client
from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc

CHUNK_BYTES = 1 << 20  # the largest that is taken


async def create(client: Client, name: str) -> image_pb2.Image:
    """Make an image that has no bytes yet."""
    request = image_service_pb2.CreateImageRequest(
        name=name, spec=image_pb2.ImageSpec(disk_format=image_pb2.DISK_FORMAT_RAW)
    )
    stub = image_service_pb2_grpc.ImageServiceStub(client.channel)
    return await client.mutate(stub.CreateImage, request, image_pb2.Image)


async def upload(client: Client, image_id: str, chunks: Iterable[bytes], sha256: str) -> None:
    """Upload an image's bytes.

    Args:
        chunks: of at most CHUNK_BYTES.
        sha256: of all bytes, hexadecimal.
    """
    stub = image_service_pb2_grpc.ImageServiceStub(client.channel)
    part = image_service_pb2.UploadImageDataRequest

    async def parts() -> AsyncIterator[image_service_pb2.UploadImageDataRequest]:
        yield part(start=image_service_pb2.UploadStart(id=image_id))
        for chunk in chunks:
            yield part(chunk=chunk)
        yield part(end=image_service_pb2.UploadEnd(sha256=sha256))

    await stub.UploadImageData(parts(), metadata=client.metadata(), timeout=600)


async def make(client: Client, name: str, content: bytes) -> str:
    """Make an image of at most CHUNK_BYTES; return its id."""
    image = await create(client, name)
    await upload(client, image.metadata.id, [content], hashlib.sha256(content).hexdigest())
    return str(image.metadata.id)
