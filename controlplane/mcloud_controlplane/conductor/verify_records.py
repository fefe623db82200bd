"""What verify finds in the compute database itself: instances, domains, claims, operations."""

from __future__ import annotations

from collections.abc import Iterator

from mcloud_controlplane.conductor.picture import Finding, Rows


def find(rows: Rows) -> Iterator[Finding]:
    """Return what is wrong."""
    yield from _claims(rows)
    yield from _domains(rows)
    yield from _instances(rows)


def _claims(rows: Rows) -> Iterator[Finding]:
    for id_, row in rows.claims.items():
        # An operation, and then the reclaimer, gives the room of a domain that has gone back last.
        if rows.is_held(row.instance_id):
            continue
        instance = rows.instances.get(row.instance_id)
        if id_ not in rows.domains:
            if id_ not in rows.settling:
                yield Finding(
                    kind=Finding.KIND_CLAIM_WITHOUT_DOMAIN,
                    subject=id_,
                    owner_id=row.instance_id,
                    host_id=row.host_id,
                    detail="room is held for a domain that is gone",
                    repair="give the room back",
                )
        elif instance is not None and (row.vcpu_count, row.memory_mib, row.disk_gib) != (
            instance.vcpu_count,
            instance.memory_mib,
            instance.disk_gib,
        ):
            yield Finding(
                kind=Finding.KIND_CLAIM_DIFFERS,
                subject=id_,
                owner_id=row.instance_id,
                host_id=row.host_id,
                detail=f"{row.vcpu_count} vCPUs, {row.memory_mib} MiB, {row.disk_gib} GiB are "
                f"held; the instance has {instance.vcpu_count}, {instance.memory_mib}, "
                f"{instance.disk_gib}",
                repair="hold what the instance has",
            )


def _domains(rows: Rows) -> Iterator[Finding]:
    for id_, row in rows.domains.items():
        if row.absent or rows.is_held(row.instance_id):
            continue
        if row.instance_id not in rows.instances:
            yield Finding(
                kind=Finding.KIND_DOMAIN_WITHOUT_INSTANCE,
                subject=id_,
                owner_id=row.instance_id,
                host_id=row.host_id,
                detail="a domain is placed of an instance that is not there",
                repair="have its host remove it, then give the room back",
            )
        elif id_ not in rows.claims:
            yield Finding(
                kind=Finding.KIND_DOMAIN_WITHOUT_CLAIM,
                subject=id_,
                owner_id=row.instance_id,
                host_id=row.host_id,
                detail="a domain is placed without room held for it",
                repair="hold room for it",
            )


def _instances(rows: Rows) -> Iterator[Finding]:
    for id_, row in rows.instances.items():
        lost = row.operation_id and row.operation_id not in rows.running
        if lost or (row.state in ("BUILD", "REBOOT") and not row.operation_id):
            yield Finding(
                kind=Finding.KIND_INSTANCE_WITHOUT_OPERATION,
                subject=id_,
                owner_id=row.operation_id,
                host_id=row.host_id,
                detail=f"it is in {row.state}, and no operation works on it",
                repair="free it; its state becomes its domain's, or ERROR if it has none",
            )
