"""Serves mcloud.image.v1.ImageService."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from functools import partial

from mcloud.common.v1 import operation_pb2
from mcloud.image.v1 import image_pb2, image_service_pb2, image_service_pb2_grpc
from mcloud_base import errors
from mcloud_controlplane.core import auth, convert, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.image import image_store, use_store
from mcloud_controlplane.image.contents import Contents
from mcloud_controlplane.image.model import shared
from mcloud_controlplane.image.upload import Uploads


class ImageServicer(image_service_pb2_grpc.ImageServiceServicer):
    """Images."""

    def __init__(self, database: Database, frame: Frame, contents: Contents) -> None:
        self._database = database
        self._frame = frame
        self._contents = contents
        self._uploads = Uploads(database, contents)

    async def CreateImage(
        self, request: image_service_pb2.CreateImageRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one without bytes."""
        return await self._frame.mutate(request, image_store.create)

    async def UploadImageData(
        self,
        request_iterator: AsyncIterator[image_service_pb2.UploadImageDataRequest],
        context: Context,
    ) -> image_pb2.Image:
        """Take its bytes."""
        return await self._uploads.receive(auth.caller(), request_iterator)

    async def DownloadImage(
        self, request: image_service_pb2.DownloadImageRequest, context: Context
    ) -> AsyncIterator[image_service_pb2.DownloadImageResponse]:
        """Send its bytes (10, 11)."""
        image = await self._database.read_few(_get, auth.caller(), request.id)
        _trace_authorization()
        _require_bytes(image, request.offset)
        yield image_service_pb2.DownloadImageResponse(image=image)
        status = image.status
        async for chunk in self._contents.read(
            request.id, request.offset, status.size_bytes, status.sha256
        ):
            yield image_service_pb2.DownloadImageResponse(chunk=chunk)

    async def GetImage(
        self, request: image_service_pb2.GetImageRequest, context: Context
    ) -> image_pb2.Image:
        """Return one (10, 11)."""
        image = await self._database.read_few(_get, auth.caller(), request.id)
        _trace_authorization()
        return image

    async def ListImages(
        self, request: image_service_pb2.ListImagesRequest, context: Context
    ) -> image_service_pb2.ListImagesResponse:
        """Return a page."""
        return await self._database.read(image_store.list_page, auth.caller(), request)

    async def WatchImages(
        self, request: image_service_pb2.WatchImagesRequest, context: Context
    ) -> AsyncIterator[image_service_pb2.WatchImagesResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "image",
            image_pb2.Image,
            request,
            auth.caller(),
            partial(image_store.load, auth.caller()),
            with_shared=True,
        ):
            yield image_service_pb2.WatchImagesResponse(
                type=event.type, image=event.message, revision=event.revision
            )

    async def UpdateImage(
        self, request: image_service_pb2.UpdateImageRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(request, image_store.update)

    async def DeleteImage(
        self, request: image_service_pb2.DeleteImageRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(request, image_store.delete)

    async def EnsureImageUse(
        self, request: image_service_pb2.EnsureImageUseRequest, context: Context
    ) -> image_service_pb2.ImageUse:
        """Record a use (4)."""
        return await self._database.write(use_store.ensure, request)

    async def ReleaseImageUse(
        self, request: image_service_pb2.ReleaseImageUseRequest, context: Context
    ) -> image_service_pb2.ReleaseImageUseResponse:
        """Remove a use."""
        await self._database.write(use_store.release, request)
        return image_service_pb2.ReleaseImageUseResponse()

    async def ListImageUses(
        self, request: image_service_pb2.ListImageUsesRequest, context: Context
    ) -> image_service_pb2.ListImageUsesResponse:
        """Return uses by instance."""
        uses = await self._database.read(use_store.list_after, request.after_instance_id)
        return image_service_pb2.ListImageUsesResponse(uses=uses)


def _get(caller: auth.Caller, id_: str) -> image_pb2.Image:
    return image_store.message(image_store.get(caller, id_))


def _require_bytes(image: image_pb2.Image, offset: int) -> None:
    """Refuse what cannot be downloaded.

    Raises:
        errors.WrongState: IMAGE_NOT_ACTIVE.
        errors.OutOfRange: BAD_OFFSET.
    """
    id_ = image.metadata.id
    if not image.status.sha256:
        raise errors.WrongState("IMAGE_NOT_ACTIVE", f"image {id_} has no bytes yet", id=id_)
    if offset > image.status.size_bytes:
        raise errors.OutOfRange(
            "BAD_OFFSET", f"image {id_} has {image.status.size_bytes} bytes, not {offset}", id=id_
        )


def _trace_authorization() -> None:
    """11. Hand a host the row of the trace that tells of its token's check."""
    call = auth.call()
    if auth.caller().delegation is None:
        return
    step = operation_pb2.OperationStep(
        number=11,
        name="image authorizes",
        service="image",
        host=socket.gethostname(),
        state=operation_pb2.OperationStep.STATE_DONE,
        start_time=convert.timestamp(call.authorize_start_time),
        end_time=convert.timestamp(call.authorize_end_time),
    )
    call.hand_over(step)
