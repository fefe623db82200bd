"""Attachments in the database. The volume's row is locked first, always."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from mcloud.volume.v1 import attachment_pb2, attachment_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth, contract, convert, database, effects, listing, tables
from mcloud_controlplane.volume import storage_store, volume_store
from mcloud_controlplane.volume.model import Attachment, Volume, locked, shared

_PAGE = 1000


def message(row: Attachment) -> attachment_pb2.Attachment:
    """Return an attachment's row as its message."""
    return attachment_pb2.Attachment(
        metadata=convert.metadata(row),
        spec=attachment_pb2.AttachmentSpec.FromString(bytes(row.spec)),
        status=attachment_pb2.AttachmentStatus(
            state=contract.enum_value(row.state, attachment_pb2.AttachmentStatus.State),
            host_id=row.host_id,
            domain_id=row.domain_id,
        ),
    )


def get(caller: auth.Caller, id_: str) -> Attachment:
    """Return an attachment of the caller's.

    Raises:
        errors.NotFound: ATTACHMENT_NOT_FOUND.
    """
    row = Attachment.find(id_)
    if row is None or not caller.sees(row.project_id):
        raise _not_found(id_)
    return row


def list_page(
    caller: auth.Caller, request: attachment_service_pb2.ListAttachmentsRequest
) -> attachment_service_pb2.ListAttachmentsResponse:
    """Return a page."""
    revision = shared.revision()
    page = listing.page(
        Attachment,
        request,
        caller,
        fields={
            "id": Attachment.id,
            "volume_id": Attachment.volume_id,
            "instance_id": Attachment.instance_id,
            "host_id": Attachment.host_id,
            "state": Attachment.state,
        },
    )
    return attachment_service_pb2.ListAttachmentsResponse(
        attachments=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def list_after(id_: str) -> list[attachment_pb2.Attachment]:
    """Return every project's attachments, by id."""
    query = Attachment.select().where(Attachment.id > id_).order_by(Attachment.id)
    return [message(row) for row in query.limit(_PAGE)]


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {row.id: message(row) for row in Attachment.select().where(Attachment.id.in_(found))}


def ensure(
    request: attachment_service_pb2.EnsureAttachmentRequest,
) -> attachment_pb2.Attachment:
    """Reserve a volume for an instance.

    Raises:
        errors.NotFound: VOLUME_NOT_FOUND.
        errors.WrongState: VOLUME_IN_USE, VOLUME_NOT_AVAILABLE, ID_RETIRED.
        errors.Conflict: STALE_LEASE.
    """
    effects.ensure_may(shared, request.attachment_id, request.lease_number)
    spec = request.spec
    volume = locked(
        Volume.select().where(
            (Volume.id == spec.volume_id)
            & (Volume.project_id == request.project_id)
            & Volume.delete_time.is_null()
        )
    ).first()
    if volume is None:
        raise volume_store.not_found(spec.volume_id)
    row = Attachment.find(request.attachment_id)
    if row is not None and (row.volume_id, row.instance_id) == (spec.volume_id, spec.instance_id):
        return message(row)
    if volume.attachment_id:
        raise volume_store.in_use(volume)
    if row is not None or volume.state != "AVAILABLE":
        raise errors.WrongState(
            "VOLUME_NOT_AVAILABLE", f"volume {volume.name} is {volume.state}", id=volume.id
        )
    moment = database.now()
    row = Attachment.create(
        id=request.attachment_id,
        name=volume.name,
        project_id=request.project_id,
        create_time=moment,
        update_time=moment,
        spec=spec.SerializeToString(),
        volume_id=volume.id,
        instance_id=spec.instance_id,
        delete_with_instance=spec.delete_with_instance,
        state="RESERVED",
    )
    tables.changed("attachment", row.id, row.project_id, "ADDED")
    volume.attachment_id, volume.instance_id, volume.state = row.id, row.instance_id, "RESERVED"
    volume_store.save(volume)
    return message(row)


def connect(caller: auth.Caller, request: attachment_service_pb2.ConnectAttachmentRequest) -> int:
    """Desire that the storing host serves the volume to the calling host.

    Returns:
        The volume's generation that does.

    Raises:
        errors.NotFound: ATTACHMENT_NOT_FOUND.
        errors.PermissionDenied: NOT_DELEGATED.
        errors.WrongState: ATTACHMENT_CONNECTED_ELSEWHERE, ID_RETIRED.
    """
    id_, domain_id = request.attachment_id, request.domain_id
    require_delegated(caller, request)
    retired = shared.effect.select().where(
        shared.effect.id.in_([id_, _pair(id_, domain_id)]) & shared.effect.retired
    )
    row, volume = _lock(id_)
    if retired.exists():
        raise errors.WrongState(
            "ID_RETIRED", f"attachment {id_} was taken back from domain {domain_id}", id=id_
        )
    if row is None or volume is None:
        raise _not_found(id_)
    if row.state == "DISCONNECTING" or row.domain_id not in ("", domain_id):
        raise errors.WrongState(
            "ATTACHMENT_CONNECTED_ELSEWHERE",
            f"attachment {id_} is connected to domain {row.domain_id} on host {row.host_id}",
            id=id_,
        )
    assert caller.certificate is not None
    subject = caller.certificate.subject or f"CN={caller.host_id}"
    if (row.domain_id, row.host_id, row.certificate_subject) != (
        domain_id,
        caller.host_id,
        subject,
    ):
        row.domain_id, row.host_id, row.certificate_subject = domain_id, caller.host_id, subject
        row.state, volume.state = "CONNECTED", "IN_USE"
        volume.desired_generation += 1
        _save(row)
        volume_store.save(volume)
    return int(volume.desired_generation)


def require_delegated(
    caller: auth.Caller, request: attachment_service_pb2.ConnectAttachmentRequest
) -> None:
    """Refuse a host whose token does not name the attachment and the domain.

    Raises:
        errors.PermissionDenied: NOT_DELEGATED.
    """
    delegation = caller.delegation
    if (
        delegation is None
        or request.attachment_id not in delegation.attachment_ids
        or request.domain_id != delegation.domain_id
    ):
        raise errors.PermissionDenied(
            "NOT_DELEGATED",
            f"the token does not name attachment {request.attachment_id} "
            f"for domain {request.domain_id}",
            id=request.attachment_id,
        )


def find_connection(
    id_: str, domain_id: str, generation: int
) -> attachment_service_pb2.ConnectAttachmentResponse | None:
    """Return how the host reaches the volume, once the storing host serves it.

    Raises:
        errors.WrongState: ID_RETIRED, it was taken back meanwhile.
        errors.Unavailable: STORAGE_HOST_SILENT.
    """
    row = Attachment.find(id_)
    if row is None or row.domain_id != domain_id or row.state != "CONNECTED":
        raise errors.WrongState("ID_RETIRED", f"attachment {id_} was taken back", id=id_)
    volume = Volume.get_by_id(row.volume_id)
    endpoint = next((e for e in volume.endpoints if e["attachment_id"] == id_), None)
    if endpoint is None or volume.error is not None or volume.observed_generation < generation:
        if storage_store.is_silent(volume.host_id):
            raise storage_store.silent(volume.host_id)
        return None
    return attachment_service_pb2.ConnectAttachmentResponse(
        attachment=message(row),
        nbd=attachment_pb2.NbdConnection(
            address=endpoint["address"],
            port=endpoint["port"],
            export_name=endpoint["export_name"],
            size_bytes=volume.size_gib << 30,
        ),
    )


def disconnect(request: attachment_service_pb2.DisconnectAttachmentRequest) -> None:
    """Desire that the storing host cuts a domain off, if it is the one that holds the volume.

    The pair is retired, so that a connection which is asked for late is refused.

    Raises:
        errors.NotFound: ATTACHMENT_NOT_FOUND.
        errors.Conflict: STALE_LEASE.
    """
    id_ = request.attachment_id
    effects.retire(shared, _pair(id_, request.domain_id), request.lease_number)
    row, volume = _lock(id_)
    if row is None or volume is None:
        raise _not_found(id_)
    if row.domain_id == request.domain_id and row.state == "CONNECTED":
        row.state = "DISCONNECTING"
        volume.desired_generation += 1
        _save(row)
        volume_store.save(volume)


def find_disconnected(id_: str, domain_id: str) -> attachment_pb2.Attachment | None:
    """Return the attachment once a domain holds it no more.

    Raises:
        errors.NotFound: ATTACHMENT_NOT_FOUND.
        errors.Unavailable: STORAGE_HOST_SILENT.
    """
    row = Attachment.find(id_)
    if row is None:
        raise _not_found(id_)
    if row.domain_id != domain_id:
        return message(row)
    volume = Volume.get_by_id(row.volume_id)
    if storage_store.is_silent(volume.host_id):
        raise storage_store.silent(volume.host_id)
    return None


def why(id_: str) -> errors.Error:
    """Return why a wait for the storing host was in vain."""
    row = Attachment.find(id_)
    if row is None:
        return _not_found(id_)
    return storage_store.why(Volume.get_by_id(row.volume_id))


def release(request: attachment_service_pb2.ReleaseAttachmentRequest, principal_id: str) -> None:
    """Give the volume back, and retire the attachment's id.

    Raises:
        errors.WrongState: ATTACHMENT_CONNECTED.
        errors.Conflict: STALE_LEASE.
    """
    id_ = request.attachment_id
    effects.retire(shared, id_, request.lease_number)
    row, volume = _lock(id_)
    if row is None:
        return
    if row.state != "RESERVED":
        raise errors.WrongState(
            "ATTACHMENT_CONNECTED",
            f"attachment {id_} is connected to domain {row.domain_id}; disconnect it first",
            id=id_,
        )
    row.delete_instance()
    tables.changed("attachment", row.id, row.project_id, "DELETED")
    if volume is None:
        return
    volume.attachment_id = volume.instance_id = ""
    volume.state = "AVAILABLE"
    if row.delete_with_instance and request.instance_deleted:
        volume_store.start_delete(volume, principal_id)
    else:
        volume_store.save(volume)


def _lock(id_: str) -> tuple[Attachment | None, Volume | None]:
    """Lock the volume of an attachment, and return both as they are then."""
    row = Attachment.find(id_)
    if row is None:
        return None, None
    volume = locked(Volume.select().where(Volume.id == row.volume_id)).first()
    return Attachment.find(id_), volume


def _save(row: Attachment) -> None:
    row.version += 1
    row.update_time = database.now()
    row.save()
    tables.changed("attachment", row.id, row.project_id)


def _pair(id_: str, domain_id: str) -> str:
    return f"{id_}/{domain_id}"


def _not_found(id_: str) -> errors.NotFound:
    return errors.NotFound("ATTACHMENT_NOT_FOUND", f"there is no attachment {id_}", id=id_)
