"""Repair's part of the compute database. Every unit looks again whether it is needed."""

from __future__ import annotations

from mcloud_base import errors
from mcloud_controlplane.compute.model import Claim, Domain, Host, Instance, locked, shared
from mcloud_controlplane.conductor import store
from mcloud_controlplane.conductor.picture import Finding
from mcloud_controlplane.core import database, tables
from mcloud_controlplane.core.invariants import RUNNING
from mcloud_controlplane.core.workflow import Job

# What an instance's state becomes by its domain's.
_STATES = {"RUNNING": "ACTIVE", "PAUSED": "PAUSED", "SHUTOFF": "SHUTOFF", "CRASHED": "SHUTOFF"}


def is_worked_on(instance_id: str) -> bool:
    """Tell whether an operation works on an instance."""
    table = shared.operation
    running = (table.resource_id == instance_id) & table.state.in_(RUNNING)
    return bool(table.select(table.id).where(running).exists())


def find_instance(id_: str) -> Instance | None:
    """Return an instance's row, also a deleted one's."""
    return Instance.find(id_)


def has_claim(domain_id: str) -> bool:
    """Tell whether room is held for a domain that is gone."""
    gone = store.find_domain(domain_id)
    held = Claim.select(Claim.domain_id).where(Claim.domain_id == domain_id).exists()
    return bool(held) and (gone is None or gone.absent_time is not None)


def hold_claim(job: Job, domain_id: str) -> bool:
    """Hold for a placed domain what its instance has, whether or not the host has room for it.

    The domain is there: not to count it would not make it smaller.
    """
    store.require_lease(job)
    domain = store.find_domain(domain_id)
    if domain is None or domain.absent:
        return False
    instance = find_instance(domain.instance_id)
    if instance is None:
        return False
    list(locked(Host.select(Host.id).where(Host.id == domain.host_id)))
    values = {
        "vcpu_count": instance.vcpu_count,
        "memory_mib": instance.memory_mib,
        "disk_gib": instance.disk_gib,
    }
    row = Claim.get_or_none(Claim.domain_id == domain_id)
    if row is not None and all(getattr(row, name) == value for name, value in values.items()):
        return False
    Claim.insert(
        domain_id=domain_id,
        instance_id=instance.id,
        host_id=domain.host_id,
        server_group_id=instance.server_group_id,
        create_time=database.now(),
        **values,
    ).on_conflict(conflict_target=[Claim.domain_id], update=values).execute()
    tables.changed("host", domain.host_id, "")
    return True


def free_instance(job: Job, id_: str) -> bool:
    """Free an instance of an operation that is lost; its state is its domain's, or ERROR."""
    store.require_lease(job)
    row = locked(Instance.select().where(Instance.id == id_)).first()
    if row is None or row.state == "DELETED" or is_worked_on(id_):
        return False
    if not row.operation_id and row.state not in ("BUILD", "REBOOT"):
        return False
    domain = store.find_domain(row.domain_id)
    state = None
    if domain is not None and not domain.absent:
        state = _STATES.get(domain.state)
    values: dict[str, object] = {"operation_id": ""}
    if row.delete_time is not None:
        pass  # the reclaimer goes on with what is left of it
    elif state is not None:
        values["state"] = state
        values["launch_time"] = row.launch_time or database.now()
    else:
        lost = "the operation that worked on it was lost"
        values["state"] = "ERROR"
        values["fault"] = {"reason": "OPERATION_LOST", "message": lost, "time": database.now()}
    store.set_instance(id_, **values)
    return True


def forget_volume(job: Job, finding: Finding) -> bool:
    """Take a volume that is not attached off an instance, and its disk off the domain."""
    store.require_lease(job)
    row = locked(Instance.select().where(Instance.id == finding.subject)).first()
    if row is None or is_worked_on(row.id):
        return False
    kept = [each for each in row.volumes if each["attachment_id"] != finding.owner_id]
    if len(kept) == len(row.volumes):
        return False
    domain = store.find_domain(row.domain_id)
    if domain is None or domain.absent:
        store.set_instance(row.id, volumes=kept)
    else:
        store.desire(job, domain.id, f"{job.operation_id}/{finding.owner_id}", volumes=kept)
    return True


def desire_again(job: Job, domain_id: str) -> bool:
    """Have a host bring a domain to what is desired once more."""
    domain = store.find_domain(domain_id)
    if domain is None or domain.absent or is_worked_on(domain.instance_id):
        return False
    before = domain.generation
    return store.desire(job, domain_id, f"{job.operation_id}/{domain_id}") > before


def bury_unknown(job: Job, finding: Finding) -> bool:
    """Make the tombstone of a domain on a host that no row names.

    Its instance is not known either: the row names itself instead, since a host has one living
    domain of an instance.

    Raises:
        errors.WrongState: DOMAIN_KNOWN.
    """
    store.require_lease(job)
    id_, host_id = finding.owner_id, finding.host_id
    row = locked(Domain.select().where(Domain.id == id_)).first()
    if row is None:
        Domain.create(
            id=id_,
            instance_id=id_,
            project_id="",
            host_id=host_id,
            operation_id=job.operation_id,
            generation=finding.generation + 1,
            absent=True,
            create_time=database.now(),
        )
    elif row.absent and row.absent_time is None and row.host_id == host_id:
        # Its tombstone is on its way; another of its traces may show a later generation.
        if finding.generation < row.generation:
            return True
        row.generation = finding.generation + 1
        row.save()
    elif row.absent_time is not None:
        # It was gone once, and is back: a disk of before, or a backup of the host.
        row.absent, row.absent_time, row.host_id = True, None, host_id
        row.generation = max(row.generation, finding.generation) + 1
        row.operation_id = job.operation_id
        row.save()
    else:
        raise errors.WrongState(
            "DOMAIN_KNOWN", f"domain {id_} is placed on host {row.host_id}; delete its instance"
        )
    tables.changed("domain", id_, "")
    tables.wake_host(host_id)
    return True


def is_absent(domain_id: str) -> bool | None:
    """Return True once a domain's host has reported it absent; to wait for."""
    row = store.find_domain(domain_id)
    return True if row is None or row.absent_time is not None else None
