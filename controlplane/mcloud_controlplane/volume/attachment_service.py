"""Serves mcloud.volume.v1.AttachmentService."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

from mcloud.common.v1 import operation_pb2
from mcloud.volume.v1 import (
    attachment_pb2,
    attachment_service_pb2,
    attachment_service_pb2_grpc,
)
from mcloud_controlplane.core import auth, convert
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.volume import attachment_store

T = TypeVar("T")

_WAIT_S = 20.0  # for the storing host; callers try again
_MARGIN_S = 0.5  # to answer before the caller's own deadline


class AttachmentServicer(attachment_service_pb2_grpc.AttachmentServiceServicer):
    """Attachments."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def GetAttachment(
        self, request: attachment_service_pb2.GetAttachmentRequest, context: Context
    ) -> attachment_pb2.Attachment:
        """Return one."""
        caller = auth.caller()
        return await self._database.read_few(
            lambda: attachment_store.message(attachment_store.get(caller, request.id))
        )

    async def ListAttachments(
        self, request: attachment_service_pb2.ListAttachmentsRequest, context: Context
    ) -> attachment_service_pb2.ListAttachmentsResponse:
        """Return a page."""
        return await self._database.read(attachment_store.list_page, auth.caller(), request)

    async def EnsureAttachment(
        self, request: attachment_service_pb2.EnsureAttachmentRequest, context: Context
    ) -> attachment_pb2.Attachment:
        """Reserve a volume (4)."""
        return await self._database.write(attachment_store.ensure, request)

    async def ConnectAttachment(
        self, request: attachment_service_pb2.ConnectAttachmentRequest, context: Context
    ) -> attachment_service_pb2.ConnectAttachmentResponse:
        """Have the volume served to the calling host (14, 15)."""
        generation = await self._database.write(attachment_store.connect, auth.caller(), request)
        answer = await self._until(
            context,
            request.attachment_id,
            lambda: attachment_store.find_connection(
                request.attachment_id, request.domain_id, generation
            ),
        )
        _trace_authorization()
        return answer

    async def DisconnectAttachment(
        self, request: attachment_service_pb2.DisconnectAttachmentRequest, context: Context
    ) -> attachment_pb2.Attachment:
        """Have a domain cut off."""
        await self._database.write(attachment_store.disconnect, request)
        return await self._until(
            context,
            request.attachment_id,
            lambda: attachment_store.find_disconnected(request.attachment_id, request.domain_id),
        )

    async def ReleaseAttachment(
        self, request: attachment_service_pb2.ReleaseAttachmentRequest, context: Context
    ) -> attachment_service_pb2.ReleaseAttachmentResponse:
        """Give a volume back."""
        principal_id = auth.caller().principal_id
        await self._database.write(attachment_store.release, request, principal_id)
        return attachment_service_pb2.ReleaseAttachmentResponse()

    async def ListInstanceAttachments(
        self, request: attachment_service_pb2.ListInstanceAttachmentsRequest, context: Context
    ) -> attachment_service_pb2.ListInstanceAttachmentsResponse:
        """Return every project's."""
        rows = await self._database.read(attachment_store.list_after, request.after_id)
        return attachment_service_pb2.ListInstanceAttachmentsResponse(attachments=rows)

    async def _until(self, context: Context, id_: str, find: Callable[[], T | None]) -> T:
        """Wait for what the storing host reports."""
        left = context.time_remaining()
        timeout_s = _WAIT_S if left is None else min(_WAIT_S, max(left - _MARGIN_S, 0.1))
        try:
            return await self._database.until(find, timeout_s=timeout_s)
        except TimeoutError as error:
            raise await self._database.read(attachment_store.why, id_) from error


def _trace_authorization() -> None:
    """15. Hand the host the row of the trace that tells of its token's check."""
    call = auth.call()
    step = operation_pb2.OperationStep(
        number=15,
        name="volume authorizes",
        service="volume",
        host=socket.gethostname(),
        state=operation_pb2.OperationStep.STATE_DONE,
        start_time=convert.timestamp(call.authorize_start_time),
        end_time=convert.timestamp(call.authorize_end_time),
    )
    call.hand_over(step)
