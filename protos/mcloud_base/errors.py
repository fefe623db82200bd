"""Every failure that may cross a process boundary.

Error               gRPC code            The caller should
InvalidArgument     INVALID_ARGUMENT     fix the request
Unauthenticated     UNAUTHENTICATED      log in again
PermissionDenied    PERMISSION_DENIED    ask the project's owner
NotFound            NOT_FOUND            check the id (also: not yours to see)
AlreadyExists       ALREADY_EXISTS       pick another name
WrongState          FAILED_PRECONDITION  change the resource's state first
Exhausted           RESOURCE_EXHAUSTED   ask for less, or wait for capacity
OutOfRange          OUT_OF_RANGE         start again from what the message says
Conflict            ABORTED              read again, then retry
Unavailable         UNAVAILABLE          retry the same call with back-off
DeadlineExceeded    DEADLINE_EXCEEDED    look whether it has been done; retry
Cancelled           CANCELLED            nothing: it was asked for
DataLoss            DATA_LOSS            tell the operator
Internal            INTERNAL             tell the operator the request id

Each carries a `reason` (UPPER_SNAKE, unique, never changed), one sentence that says what, which and
the way out, and the values in it as `metadata`. On the wire: google.rpc.Status with ErrorInfo
(domain "mcloud"), as https://google.aip.dev/193 has it, and any further typed details.
"""

from __future__ import annotations

from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "mcloud"

# An error travels in trailing metadata, of which clients take 8 KiB; these parts of it may hold
# what a caller sent.
_MESSAGE_BYTES = 1000
_VALUE_BYTES = 200


class Error(Exception):
    """Base of all; never raised itself.

    Args:
        reason: stable, for programs: "INSTANCE_NAME_TAKEN".
        message: one sentence, for people.
        details: further google.rpc messages, such as BadRequest or QuotaFailure.
        metadata: the values in the message, by name.
    """

    code: ClassVar[grpc.StatusCode]

    def __init__(
        self, reason: str, message: str, *, details: tuple[Message, ...] = (), **metadata: object
    ) -> None:
        message = _short(message, _MESSAGE_BYTES)
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.details = details
        self.metadata = {key: _short(str(value), _VALUE_BYTES) for key, value in metadata.items()}

    def __str__(self) -> str:
        return f"{self.message} ({self.reason})"


class InvalidArgument(Error):
    code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(Error):
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(Error):
    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(Error):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(Error):
    code = grpc.StatusCode.ALREADY_EXISTS


class WrongState(Error):
    code = grpc.StatusCode.FAILED_PRECONDITION


class Exhausted(Error):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class OutOfRange(Error):
    code = grpc.StatusCode.OUT_OF_RANGE


class Conflict(Error):
    code = grpc.StatusCode.ABORTED


class Unavailable(Error):
    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(Error):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(Error):
    code = grpc.StatusCode.CANCELLED


class DataLoss(Error):
    code = grpc.StatusCode.DATA_LOSS


class Internal(Error):
    code = grpc.StatusCode.INTERNAL


_BY_CODE = {kind.code: kind for kind in Error.__subclasses__()}


def _short(text: str, limit: int) -> str:
    raw = text.encode(errors="replace")
    return text if len(raw) <= limit else raw[: limit - 3].decode(errors="ignore") + "…"


def retry_after(seconds: float) -> error_details_pb2.RetryInfo:
    """Return the detail that tells a caller when to try again."""
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def bad_field(field: str, description: str) -> InvalidArgument:
    """Return the error for one field of a request, with a BadRequest detail."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    return InvalidArgument(
        "BAD_FIELD",
        f"{field}: {description}",
        details=(error_details_pb2.BadRequest(field_violations=[violation]),),
        field=field,
    )


def to_status(error: Error) -> status_pb2.Status:
    """Return the error as it stands on the wire and in an operation."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    packed = []
    for detail in (info, *error.details):
        if isinstance(detail, any_pb2.Any):  # as it came in another process's status
            packed.append(detail)
        else:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=packed)


def from_status(status: status_pb2.Status) -> Error:
    """Return the error that a status stands for; the inverse of `to_status`."""
    info = error_details_pb2.ErrorInfo()
    details: list[Message] = []
    for packed in status.details:
        if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            packed.Unpack(info)
        else:
            details.append(packed)
    kind = next((k for c, k in _BY_CODE.items() if c.value[0] == status.code), Internal)
    reason = info.reason or code_pb2.Code.Name(status.code)
    error = kind(reason, status.message, details=tuple(details))
    error.metadata = dict(info.metadata)
    return error


def find_detail(error: Error, kind: type[Message]) -> Message | None:
    """Return the error's detail of this type, or None."""
    for detail in error.details:
        if isinstance(detail, kind):
            return detail
        if isinstance(detail, any_pb2.Any):
            message = kind()
            if detail.Unpack(message):
                return message
    return None
