"""The conductor's part of the compute database: domains, and what hosts say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import peewee
from google.rpc import status_pb2
from peewee import JOIN

from mcloud.common.v1 import session_pb2
from mcloud.compute.v1 import instance_pb2
from mcloud.conductor.v1 import domain_pb2, domain_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.compute.model import Claim, Domain, Host, Instance, locked, shared
from mcloud_controlplane.core import contract, database, sessions, tables, trace
from mcloud_controlplane.core import workflow as workflows
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.core.session_follower import Pending
from mcloud_controlplane.core.statements import Kept

State = domain_pb2.DomainStatus.State

_OPERATION_ID = len(ids.new("cop"))

# What an instance's state becomes when its domain's is observed and no operation works on it.
_INSTANCE_STATES = {
    "RUNNING": "ACTIVE",
    "PAUSED": "PAUSED",
    "SHUTOFF": "SHUTOFF",
    "CRASHED": "SHUTOFF",
    "ABSENT": "SHUTOFF",
}


class DomainSource(sessions.Source):
    """What the conductor's sessions send and take."""

    def desired(self, host_ids: Sequence[str]) -> Mapping[str, Sequence[session_pb2.Desired]]:
        """Return the domains whose present generation the hosts have not reached."""
        behind = Domain.observed_generation < Domain.generation
        return _desired(Domain.host_id.in_(list(host_ids)) & behind)

    def pending(self, *, urgent: bool) -> Sequence[Pending]:
        """Return the domains whose present generation their hosts have not reached."""
        query: Any = Domain.select(Domain.host_id, Domain.id, Domain.generation, Domain.absent)
        behind = _is_asked() & (Domain.observed_generation < Domain.generation)
        return [Pending(*row) for row in query.where(behind).tuples()]

    def everything(self, host_id: str) -> Sequence[session_pb2.Desired]:
        """Return every domain that is, or is to be removed, there."""
        return _desired(Domain.host_id == host_id).get(host_id, [])

    def observed(self, reports: Sequence[sessions.HostReport], epoch: str) -> None:
        """Record what hosts see of domains."""
        for host_id, incarnation, report in reports:
            if report.epoch in ("", epoch):
                apply_domain_status(host_id, incarnation, report)


def _is_asked() -> Any:
    """Return the condition that something is desired of a domain.

    Of a restored one nothing is but its absence, until its host has said that it is there: it may
    have been removed since, and is not to be built again.
    """
    return Domain.absent_time.is_null() & (Domain.absent | ~Domain.unproven)


def _desired(condition: Any) -> dict[str, list[session_pb2.Desired]]:
    """Return what is desired of domains, by host."""
    query: Any = (
        Domain.select(
            Domain.host_id,
            Domain.id,
            Domain.generation,
            Domain.absent,
            Domain.instance_id,
            Instance.power_state,
        )
        .join(
            Instance,
            JOIN.LEFT_OUTER,  # tombstones may be of what no instance names (repair_store.py)
            on=(Instance.id == Domain.instance_id),
        )
        .where(condition & _is_asked() & (Domain.absent | Instance.id.is_null(False)))
        .order_by(Domain.create_time)
    )
    found: dict[str, list[session_pb2.Desired]] = {}
    for host_id, id_, generation, absent, instance_id, power_state in query.tuples():
        spec = None
        if not absent:
            power = contract.enum_value(power_state, domain_pb2.PowerState)
            spec = domain_pb2.DomainDesired(instance_id=instance_id, power_state=power)
        found.setdefault(host_id, []).append(sessions.desired(id_, generation, spec))
    return found


def apply_domain_status(host_id: str, incarnation: int, report: session_pb2.Observed) -> None:
    """Record a report, unless it is stale, of another host or of an unknown domain."""
    status = domain_pb2.DomainStatus()
    report.status.Unpack(status)
    state = "ABSENT" if report.absent else contract.enum_name(status.state, State)
    error = report.error.SerializeToString() if report.HasField("error") else None
    removed = report.generation if report.absent else -1
    values = [
        report.id, host_id, incarnation, report.sequence, report.generation, removed,
        state, status.reason, error, database.now(),
    ]  # fmt: skip
    found = _REPORTED.run(Domain._meta.database, values)
    if not found:
        return
    ((project_id, key, generation, absent, instance_id, unproven, is_free),) = found
    tables.changed("domain", report.id, project_id)
    operation_id = _begun_by(key)
    if status.steps and operation_id and status.desired_generation == generation:
        trace.save(shared, operation_id, 1, list(status.steps))
        tables.changed("operation", operation_id, project_id)
    if unproven:
        # Boots since the backup was taken count: the next one asked for is to be a higher one.
        missed = (Instance.id == instance_id) & (Instance.boot_number < status.boot_number)
        Instance.update(boot_number=status.boot_number).where(missed).execute()
    if is_free and not absent:
        _follow_domain(instance_id, report.id, state, status.reason)


def _reported(values: Sequence[Any]) -> Any:
    """Return the statement that records a report, with no row of it if the report is not to count.

    It tells, too, whether the instance is free: while an operation works on it, and that is when
    hosts report most, there is nothing to follow.
    """
    id_, host_id, incarnation, sequence, generation, removed, state, reason, error, moment = values
    newer = (Domain.incarnation < incarnation) | (
        (Domain.incarnation == incarnation) & (Domain.sequence < sequence)
    )
    free = Instance.select(Instance.id).where(
        (Instance.id == Domain.instance_id) & (Instance.domain_id == Domain.id) & _is_free()
    )
    reached = (Domain.observed_generation < generation, generation)
    gone = (Domain.absent & (Domain.generation <= removed), moment)
    return (
        Domain.update(
            incarnation=incarnation,
            sequence=sequence,
            state=state,
            reason=reason,
            error=error,
            observed_generation=peewee.Case(None, [reached], Domain.observed_generation),
            absent_time=peewee.Case(None, [gone], Domain.absent_time),
        )
        .where((Domain.id == id_) & (Domain.host_id == host_id) & newer)
        .returning(
            Domain.project_id,
            Domain.operation_id,
            Domain.generation,
            Domain.absent,
            Domain.instance_id,
            Domain.unproven,
            peewee.fn.EXISTS(free),
        )
    )


def _is_free() -> Any:
    """Return the condition that no operation works on an instance, nor ever will."""
    return (Instance.operation_id == "") & Instance.delete_time.is_null()


_REPORTED = Kept(_reported)


def _begun_by(key: str) -> str:
    """Return the operation that made a generation, of its key; with an undo, that says more."""
    return key.partition("/")[0]


def _follow_domain(instance_id: str, domain_id: str, observed: str, reason: str) -> None:
    """Let the instance follow its domain, where no operation works on it."""
    state = _INSTANCE_STATES.get(observed)
    if state is None:
        return
    instance = next(iter(_FREE.rows([instance_id], [domain_id])), None)
    if instance is None:
        return
    if instance.state == "ERROR" and instance.launch_time is None:
        return  # it was never built
    reason = reason or ("the host has lost the domain" if observed == "ABSENT" else "")
    if (instance.state, instance.power_reason) != (state, reason):
        # A guest that has shut itself down is to stay so when its host looks again.
        power = "SHUTOFF" if state == "SHUTOFF" else "RUNNING"
        set_instance(instance.id, state=state, power_reason=reason, power_state=power)


_FREE = Prepared(
    Instance,
    lambda ids, domain_ids: locked(
        Instance.select().where(
            (Instance.id == ids[0]) & (Instance.domain_id == domain_ids[0]) & _is_free()
        )
    ),
)


def set_instance(id_: str, **values: Any) -> None:
    """Change an instance's row, its version and the log. Within a unit."""
    columns = {**values, "version": Instance.version + 1, "update_time": database.now()}
    update: Any = Instance.update(columns).where(Instance.id == id_)
    ((project_id,),) = update.returning(Instance.project_id).tuples().execute()
    tables.changed("instance", id_, project_id)


def record_reserved(id_: str, nics: Sequence[Any], image: Mapping[str, Any]) -> None:
    """Keep what is known of an instance once it has its ports and its image. Within a unit."""
    values = [nics, image, database.now()]
    ((project_id,),) = _RESERVED.run(Instance._meta.database, [id_], values)
    tables.changed("instance", id_, project_id)


_RESERVED = Kept(
    lambda ids, values: (
        Instance.update(
            nics=values[0], image=values[1], update_time=values[2], version=Instance.version + 1
        )
        .where(Instance.id == ids[0])
        .returning(Instance.project_id)
    )
)


def end_operation(job: workflows.Job, **values: Any) -> Instance:
    """Change an instance's row as its operation ends, free it and return it. Within a unit.

    An operation that was pre-empted by a delete changes nothing of what that has begun.
    """
    names = tuple(values)
    end = _ENDS.get(names) or _ENDS.setdefault(names, _ending(names))
    known = [job.resource_id, job.operation_id, database.now()]
    (instance,) = end.rows(known, [*values.values()])  # it stays while an operation works on it
    tables.changed("instance", instance.id, instance.project_id)
    return cast(Instance, instance)


def _ending(names: Sequence[str]) -> Prepared:
    """Return the statement that writes these columns of an instance whose operation ends."""

    def build(known: Sequence[Any], values: Sequence[Any]) -> Any:
        id_, operation_id, moment = known
        mine = Instance.operation_id == operation_id
        columns: dict[str, Any] = dict(zip(names, values, strict=True))
        if "state" in columns:
            not_preempted = (mine | Instance.delete_time.is_null(), columns["state"])
            columns["state"] = peewee.Case(None, [not_preempted], Instance.state)
        columns["operation_id"] = peewee.Case(None, [(mine, "")], Instance.operation_id)
        columns["version"] = Instance.version + 1
        columns["update_time"] = moment
        return Instance.update(columns).where(Instance.id == id_).returning(Instance)

    return Prepared(Instance, build)


_ENDS: dict[tuple[str, ...], Prepared] = {}  # by the columns that they write


def end_instance(id_: str) -> Instance:
    """Mark an instance DELETED, and return it. Within a unit."""
    (instance,) = _DELETED.rows([id_, database.now()])
    tables.changed("instance", id_, instance.project_id, "DELETED")
    return cast(Instance, instance)


_DELETED = Prepared(
    Instance,
    lambda values: (
        Instance.update(
            state="DELETED",
            operation_id="",
            reserved=False,
            update_time=values[1],
            version=Instance.version + 1,
        )
        .where(Instance.id == values[0])
        .returning(Instance)
    ),
)


def add_volume(job: workflows.Job, volume: dict[str, Any]) -> int:
    """Desire the domain with a disk; return the generation."""
    volumes = _other_volumes(get_instance(job.resource_id), volume)
    return desire(job, job.data["domain_id"], volumes=[*volumes, volume])


def remove_volume(job: workflows.Job, volume: dict[str, Any]) -> int:
    """Desire the domain without a disk; return the generation.

    Until its host has taken the disk off and the volume is given back, the instance shows it:
    whatever becomes of the operation, somebody knows of it.
    """
    volumes = _other_volumes(get_instance(job.resource_id), volume)
    key = f"{job.operation_id}/remove"
    leaving = {**volume, "leaving": True}
    return desire(job, job.data["domain_id"], key, volumes=[*volumes, leaving])


def drop_volume(job: workflows.Job, volume: dict[str, Any]) -> None:
    """Forget a volume that was given back."""
    require_lease(job)
    instance = get_instance(job.resource_id)
    volumes = _other_volumes(instance, volume)
    if len(volumes) < len(instance.volumes):
        set_instance(instance.id, volumes=volumes)


def _other_volumes(instance: Instance, volume: dict[str, Any]) -> list[dict[str, Any]]:
    return [v for v in instance.volumes if v["attachment_id"] != volume["attachment_id"]]


def get_instance(id_: str) -> Instance:
    """Return an instance's row, also a deleted one's."""
    return Instance.get_by_id(id_)


def find_domain(id_: str) -> Domain | None:
    """Return a domain's row."""
    return Domain.find(id_)


def find_progress(id_: str) -> Domain | None:
    """Return of a domain's row how far its host is."""
    return next(iter(_PROGRESS.rows([id_])), None)


_PROGRESS = Prepared(
    Domain,
    lambda ids: Domain.select(
        Domain.absent, Domain.absent_time, Domain.observed_generation, Domain.state, Domain.error
    ).where(Domain.id == ids[0]),
)


def domain_error(row: Domain) -> errors.Error | None:
    """Return why the host could not reach the domain's generation."""
    if not row.error:
        return None
    return errors.from_status(status_pb2.Status.FromString(bytes(row.error)))


def require_lease(job: workflows.Job) -> None:
    """Refuse a runner that was overtaken; first in the unit of each of its effects here.

    The update keeps the operation's row, so that nobody overtakes before the unit's end.

    Raises:
        errors.Conflict: STALE_LEASE.
    """
    held = [job.operation_id, job.lease_number]
    if job.operation_id and not _KEEP.cursor(shared.operation._meta.database, held).rowcount:
        raise errors.Conflict(
            "STALE_LEASE", f"another runner works on {job.operation_id}", id=job.operation_id
        )


def _keeping(held: Sequence[Any]) -> Any:
    table = shared.operation
    mine = (table.id == held[0]) & (table.lease_number == held[1])
    return table.update(lease_number=held[1]).where(mine)


_KEEP = Kept(_keeping)


def change_instance(job: workflows.Job, **values: Any) -> None:
    """Change the instance's row as a step's effect."""
    require_lease(job)
    set_instance(job.resource_id, **values)


def desire(job: workflows.Job, domain_id: str, key: str = "", **instance_values: Any) -> int:
    """Change what is desired of a domain, and return its new generation.

    Keyed by the operation, or by what is given: a repeat changes nothing.
    """
    require_lease(job)
    operation_id = key or job.operation_id
    row = locked(Domain.select().where(Domain.id == domain_id)).get()
    if row.operation_id == operation_id or row.absent:
        return int(row.generation)
    row.generation += 1
    row.operation_id = operation_id
    row.error = None
    row.save()
    if instance_values:
        set_instance(row.instance_id, **instance_values)
    tables.changed("domain", domain_id, row.project_id)
    tables.wake_host(row.host_id)
    return int(row.generation)


def desire_absent(job: workflows.Job, domain_id: str) -> None:
    """Put a tombstone on a domain; where there is none yet, none can be made any more."""
    require_lease(job)
    marked = _TOMBSTONE.run(Domain._meta.database, [domain_id, job.operation_id])
    for project_id, host_id in marked:
        tables.changed("domain", domain_id, project_id)
        tables.wake_host(host_id)
    row = None if marked else find_progress(domain_id)
    if not marked and row is None:
        _retire_domain(job, domain_id)
    elif row is not None and not row.absent:  # it has been queued since the first look
        desire_absent(job, domain_id)


_TOMBSTONE = Kept(
    lambda values: (
        Domain.update(
            absent=True, generation=Domain.generation + 1, operation_id=values[1], error=None
        )
        .where((Domain.id == values[0]) & ~Domain.absent)
        .returning(Domain.project_id, Domain.host_id)
    )
)


def _retire_domain(job: workflows.Job, domain_id: str) -> None:
    """Make it impossible that a claim for this domain, delayed, is made after its undo."""
    moment = database.now()
    Domain.create(
        id=domain_id,
        instance_id=job.resource_id,
        project_id=job.project_id,
        host_id="",
        operation_id=job.operation_id,
        generation=1,
        absent=True,
        state="ABSENT",
        create_time=moment,
        absent_time=moment,
    )


def count_failure(domain_id: str) -> None:
    """Remember that a host has refused a build; the scheduler avoids hosts that refuse them."""
    host_of = Domain.select(Domain.host_id).where(Domain.id == domain_id)
    count: Any = Host.update(failure_count=Host.failure_count + 1).where(Host.id.in_(host_of))
    for (host_id,) in count.returning(Host.id).tuples().execute():
        tables.changed("host", host_id, "")


def forget_failures(host_id: str) -> None:
    """Forget the builds that a host has refused: only those one after the other count."""
    refused = (Host.id == host_id) & (Host.failure_count > 0)
    if Host.update(failure_count=0).where(refused).execute():
        tables.changed("host", host_id, "")


def release_claim(job: workflows.Job, domain_id: str) -> None:
    """Give the room back; nothing happens if none is held."""
    require_lease(job)
    for (host_id,) in _RELEASED.run(Claim._meta.database, [domain_id]):
        tables.changed("host", host_id, "")


_RELEASED = Kept(
    lambda ids: Claim.delete().where(Claim.domain_id == ids[0]).returning(Claim.host_id)
)

# What of an instance its domain's spec is made of.
_OF_INSTANCE = (
    Instance.id, Instance.project_id, Instance.spec, Instance.name, Instance.hostname,
    Instance.vcpu_count, Instance.memory_mib, Instance.disk_gib, Instance.image_id, Instance.image,
    Instance.nics, Instance.volumes, Instance.flavor_name, Instance.key_pair_name,
    Instance.public_key, Instance.power_state, Instance.boot_number, Instance.hard_reboot,
)  # fmt: skip
_NAMES = [field.name for field in _OF_INSTANCE]


def _placed(domain_ids: Sequence[str], host_ids: Sequence[str]) -> Any:
    """Return what is to be known of a domain on a host, the trace of its operation included."""
    operation = shared.operation
    return (
        Domain.select(
            Domain.id,
            Domain.generation,
            Domain.absent,
            Domain.operation_id,
            Host.availability_zone,
            operation.trace_id,
            *_OF_INSTANCE,
        )
        .join(Host, on=(Host.id == Domain.host_id))
        .join(Instance, on=(Instance.id == Domain.instance_id))
        .join(
            operation,
            JOIN.LEFT_OUTER,
            on=(operation.id == peewee.fn.SUBSTR(Domain.operation_id, 1, _OPERATION_ID)),
        )
        .where((Domain.id == domain_ids[0]) & (Domain.host_id == host_ids[0]))
        .tuples()
    )


_PLACED = Prepared(Domain, _placed)


def domain_spec(
    host_id: str, request: domain_service_pb2.GetDomainSpecRequest
) -> domain_pb2.DomainSpec:
    """Return the whole of a domain placed on a host, without a token.

    Raises:
        errors.NotFound: DOMAIN_NOT_FOUND.
        errors.WrongState: DOMAIN_ABSENT, STALE_EPOCH.
    """
    epoch = shared.epoch()
    if request.epoch and request.epoch != epoch:
        raise errors.WrongState(
            "STALE_EPOCH", "the control plane was restored; begin a new session"
        )
    found = _PLACED.rows([request.domain_id], [host_id])
    if not found:
        raise errors.NotFound("DOMAIN_NOT_FOUND", f"there is no domain {request.domain_id} here")
    row_id, generation, absent, operation_id, zone, trace_id, *values = found[0]
    if absent:
        raise errors.WrongState("DOMAIN_ABSENT", f"domain {row_id} is to be removed")
    instance = SimpleNamespace(**dict(zip(_NAMES, values, strict=True)))
    traceparent = f"00-{trace_id}-{trace_id[:16]}-01" if trace_id else ""
    spec = instance_pb2.InstanceSpec.FromString(bytes(instance.spec))
    keys = []
    if instance.public_key:
        keys.append(
            domain_pb2.PublicKey(name=instance.key_pair_name, public_key=instance.public_key)
        )
    return domain_pb2.DomainSpec(
        domain_id=row_id,
        instance_id=instance.id,
        project_id=instance.project_id,
        epoch=epoch,
        generation=generation,
        power_state=contract.enum_value(instance.power_state, domain_pb2.PowerState),
        boot_number=instance.boot_number,
        hard_reboot=instance.hard_reboot,
        uuid=ids.libvirt_uuid(instance.id),
        name=instance.name,
        hostname=instance.hostname,
        vcpu_count=instance.vcpu_count,
        memory_mib=instance.memory_mib,
        root_disk=domain_pb2.RootDisk(
            image_id=instance.image_id,
            image_sha256=instance.image.get("sha256", ""),
            image_format=instance.image.get("format", ""),
            image_size_bytes=instance.image.get("size_bytes", 0),
            size_gib=instance.disk_gib,
        ),
        nics=[domain_pb2.DomainNic(port_id=nic["port_id"]) for nic in instance.nics],
        disks=[
            domain_pb2.DomainDisk(
                attachment_id=volume["attachment_id"],
                volume_id=volume["volume_id"],
                device=volume["device"],
            )
            for volume in instance.volumes
            if "leaving" not in volume
        ],
        config=domain_pb2.GuestConfig(
            public_keys=keys,
            metadata=dict(spec.guest_metadata),
            user_data=spec.user_data,
            availability_zone=zone,
            config_drive=spec.config_drive,
            project_id=instance.project_id,
            flavor_name=instance.flavor_name,
        ),
        operation_id=_begun_by(operation_id),
        traceparent=traceparent,
    )
