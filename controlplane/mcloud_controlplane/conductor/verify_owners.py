"""What verify finds between instances and what other services hold for them."""

from __future__ import annotations

from collections.abc import Iterator

from mcloud.volume.v1 import attachment_pb2
from mcloud_controlplane.conductor.picture import Finding, Others, Rows

_RESERVED = attachment_pb2.AttachmentStatus.STATE_RESERVED


def find(others: Others, rows: Rows) -> Iterator[Finding]:
    """Return what is wrong."""
    # Before the first reservation this is noted, and again after the last is given back.
    holders = {id_: row for id_, row in rows.instances.items() if row.reserved or rows.is_held(id_)}
    holding = holders.keys() | rows.worked_on
    yield from _ports(others, rows, holding)
    yield from _attachments(others, rows, holding)
    for use in others.uses:
        if use.instance_id not in holding:
            yield Finding(
                kind=Finding.KIND_IMAGE_USE_WITHOUT_INSTANCE,
                subject=use.image_id,
                owner_id=use.instance_id,
                detail="its instance is gone",
                repair="forget the use",
            )
    yield from _lacking(others, rows)


def _ports(others: Others, rows: Rows, holding: set[str]) -> Iterator[Finding]:
    named = {nic["port_id"] for row in rows.instances.values() for nic in row.nics}
    for id_, port in others.ports.items():
        status = port.status
        if status.owner_id in holding and (id_ in named or rows.is_held(status.owner_id)):
            if status.domain_id and _is_gone(rows, status.owner_id, status.domain_id):
                yield Finding(
                    kind=Finding.KIND_PORT_BOUND_TO_NO_DOMAIN,
                    subject=id_,
                    owner_id=status.domain_id,
                    host_id=status.host_id,
                    detail="the domain that it is bound for is gone",
                    repair="take it off the host",
                )
            continue
        yield Finding(
            kind=Finding.KIND_PORT_WITHOUT_INSTANCE,
            subject=id_,
            owner_id=status.owner_id,
            host_id=status.host_id,
            domain_id=status.domain_id,
            detail="its instance is gone, or does not name it",
            repair="take it off its host, then delete it"
            if status.delete_with_owner
            else "take it off its host, then give it back to its project",
        )


def _attachments(others: Others, rows: Rows, holding: set[str]) -> Iterator[Finding]:
    named = {v["attachment_id"] for row in rows.instances.values() for v in row.volumes}
    for id_, attachment in others.attachments.items():
        if id_ in rows.being_attached:
            continue
        instance_id, status = attachment.spec.instance_id, attachment.status
        if instance_id in holding and (id_ in named or rows.is_held(instance_id)):
            if status.domain_id and _is_gone(rows, instance_id, status.domain_id):
                yield Finding(
                    kind=Finding.KIND_ATTACHMENT_CONNECTED_TO_NO_DOMAIN,
                    subject=id_,
                    owner_id=status.domain_id,
                    host_id=status.host_id,
                    detail="the domain that it is connected to is gone",
                    repair="cut the connection",
                )
            continue
        yield Finding(
            kind=Finding.KIND_ATTACHMENT_WITHOUT_INSTANCE,
            subject=id_,
            owner_id=instance_id,
            host_id=status.host_id,
            domain_id=status.domain_id,
            detail="its instance is gone, or does not name it",
            repair="give the volume back"
            if status.state == _RESERVED
            else "cut the connection, then give the volume back",
        )


def _is_gone(rows: Rows, instance_id: str, domain_id: str) -> bool:
    settled = domain_id not in rows.domains and domain_id not in rows.settling
    return settled and not rows.is_held(instance_id)


def _lacking(others: Others, rows: Rows) -> Iterator[Finding]:
    """Return what instances that are built do not have."""
    used = {(use.instance_id, use.image_id) for use in others.uses}
    for id_, row in rows.instances.items():
        if row.launch_time is None or row.delete_time is not None or rows.is_held(id_):
            continue
        for nic in row.nics:
            if nic["port_id"] not in others.ports:
                yield Finding(
                    kind=Finding.KIND_INSTANCE_WITHOUT_PORT,
                    subject=id_,
                    owner_id=nic["port_id"],
                    host_id=row.host_id,
                    detail="it names a port that the network service does not have for it; "
                    "its guest has no network there: delete and create it",
                )
        for volume in row.volumes:
            if volume["attachment_id"] not in others.attachments:
                yield Finding(
                    kind=Finding.KIND_INSTANCE_WITHOUT_ATTACHMENT,
                    subject=id_,
                    owner_id=volume["attachment_id"],
                    host_id=row.host_id,
                    detail=f"it names volume {volume['volume_id']}, which is not attached to it",
                    repair="take the disk off its domain, and forget it",
                )
        if (id_, row.image_id) not in used:
            yield Finding(
                kind=Finding.KIND_INSTANCE_WITHOUT_IMAGE_USE,
                subject=id_,
                owner_id=row.image_id,
                detail="the image service does not know that it uses its image",
                repair="record the use",
            )
