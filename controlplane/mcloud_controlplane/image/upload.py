"""Takes the bytes of an image: written as they come, resumed where they stopped, then inspected."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import structlog

from mcloud.image.v1 import image_pb2, image_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, database
from mcloud_controlplane.image import inspection, upload_store
from mcloud_controlplane.image.contents import Contents, Partial
from mcloud_controlplane.image.upload_store import Lease

log = structlog.get_logger()

_IDLE_S = 30.0  # without a message; less than the lease, which is renewed as messages come
_RENEW_S = 10.0
_ARRIVED = 8  # chunks that wait while others are written
_REFUSED = ("DIGEST_MISMATCH", "IMAGE_REFUSED")

Requests = AsyncIterator[image_service_pb2.UploadImageDataRequest]


class Uploads:
    """The uploads that this process serves."""

    def __init__(self, store: database.Database, contents: Contents) -> None:
        self._database = store
        self._contents = contents

    async def receive(self, caller: auth.Caller, requests: Requests) -> image_pb2.Image:
        """Serve one upload."""
        start = await _start(requests)
        lease = await self._database.write(upload_store.take, caller, start.id)
        partial: Partial | None = None
        try:
            partial = await self._contents.open_partial(lease.image_id, lease.uploaded_bytes)
            if partial is None:
                raise upload_store.in_progress(lease.image_id)
            if start.offset != partial.size:
                raise _bad_offset(start.offset, partial.size)
            await self._hash_again(lease, partial)
            sha256 = await self._write(lease, partial, requests)
            # Whole or not at all, also when the client goes away now.
            return await asyncio.shield(self._accept(lease, partial, sha256))
        except errors.InvalidArgument as error:
            if partial is not None and error.reason in _REFUSED:
                await self._contents.run(partial.discard)
                await self._database.write(upload_store.refuse, lease, error.message)
                log.info("image refused", image=lease.image_id, reason=error.reason)
            raise
        finally:
            await asyncio.shield(self._leave(lease, partial))

    async def _hash_again(self, lease: Lease, partial: Partial) -> None:
        """Hash what had been uploaded before."""
        renewal = time.monotonic()
        while partial.size and await self._contents.run(partial.hash_some):
            if time.monotonic() > renewal:
                await self._advance(lease, partial, partial.size)
                renewal = time.monotonic() + _RENEW_S

    async def _write(self, lease: Lease, partial: Partial, requests: Requests) -> str:
        """Write the chunks; return the digest that the client has of them."""
        arrived: asyncio.Queue[bytes | None] = asyncio.Queue(_ARRIVED)
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self._write_arrived(partial, arrived))
                sha256 = await self._receive(lease, partial, requests, arrived)
                await arrived.put(None)
                await writing
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        if sha256 is None:
            raise errors.InvalidArgument(
                "UPLOAD_UNFINISHED",
                f"the upload ended without its digest; go on at {partial.size}",
                offset=partial.size,
            )
        return sha256

    async def _receive(
        self,
        lease: Lease,
        partial: Partial,
        requests: Requests,
        arrived: asyncio.Queue[bytes | None],
    ) -> str | None:
        """Take the chunks that come; return the digest, or None if the upload ends without."""
        granted, renewal, size = 0, 0.0, partial.size
        while request := await _next(requests):
            kind = request.WhichOneof("part")
            if kind == "end":
                return request.end.sha256
            if kind != "chunk":
                raise errors.InvalidArgument("BAD_UPLOAD", "after start come chunks, then end")
            chunk = request.chunk  # a copy, each time
            size += len(chunk)
            if size > granted or time.monotonic() > renewal:
                granted = await self._advance(lease, partial, size)
                renewal = time.monotonic() + _RENEW_S
            await arrived.put(chunk)
        return None

    async def _write_arrived(self, partial: Partial, arrived: asyncio.Queue[bytes | None]) -> None:
        """Write what arrives, until None; what comes meanwhile is written next, all at once."""
        while (chunk := await arrived.get()) is not None:
            chunks = [chunk]
            while not arrived.empty() and (chunk := arrived.get_nowait()) is not None:
                chunks.append(chunk)
            await self._contents.run(partial.write, chunks)
            if chunk is None:
                return

    async def _advance(self, lease: Lease, partial: Partial, needed_bytes: int) -> int:
        return await self._database.write(upload_store.advance, lease, partial.size, needed_bytes)

    async def _accept(self, lease: Lease, partial: Partial, sha256: str) -> image_pb2.Image:
        found = await self._contents.run(partial.sha256)
        if found != sha256:
            raise errors.InvalidArgument(
                "DIGEST_MISMATCH",
                f"the bytes that came have SHA-256 {found}, not {sha256}; upload them again",
                found=found,
            )
        await self._advance(lease, partial, partial.size)
        virtual_size = await inspection.inspect(partial.path, lease.disk_format)
        await self._contents.commit(partial, lease.image_id)
        image = await self._database.write(
            upload_store.finish, lease, partial.size, virtual_size, sha256
        )
        log.info("image active", image=lease.image_id, size_bytes=partial.size)
        return image

    async def _leave(self, lease: Lease, partial: Partial | None) -> None:
        # The client's deadline may have passed: it is no reason to leave the lease behind.
        database.deadline.set(None)
        size = lease.uploaded_bytes
        if partial is not None:
            size = await self._contents.run(partial.close)
        await self._database.write(upload_store.leave, lease, size)


async def _start(requests: Requests) -> image_service_pb2.UploadStart:
    first = await _next(requests)
    if first is None or first.WhichOneof("part") != "start":
        raise errors.InvalidArgument("BAD_UPLOAD", "an upload begins with start")
    return first.start


async def _next(requests: Requests) -> image_service_pb2.UploadImageDataRequest | None:
    """Return the next message; None at the end of the stream."""
    try:
        async with asyncio.timeout(_IDLE_S):
            return await anext(requests, None)
    except TimeoutError as error:
        raise errors.DeadlineExceeded(
            "UPLOAD_STALLED", f"nothing came for {_IDLE_S:.0f} s; go on later"
        ) from error


def _bad_offset(offset: int, size: int) -> errors.OutOfRange:
    return errors.OutOfRange(
        "BAD_OFFSET", f"{size} bytes have arrived; go on there, not at {offset}", offset=size
    )
