"""Instances in the database: what their owners want. The workflows are the conductor's."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from google.protobuf.message import Message
from peewee import JOIN

from mcloud.compute.v1 import (
    flavor_pb2,
    instance_pb2,
    instance_service_pb2,
)
from mcloud.scheduler.v1 import placement_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.compute import (
    flavor_store,
    key_pair_store,
    quota_store,
    server_group_store,
)
from mcloud_controlplane.compute.model import Domain, Host, Instance, Placement, locked, shared
from mcloud_controlplane.core import auth, contract, convert, database, listing, tables
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.core.statements import Kept

State = instance_pb2.InstanceStatus.State

_DELETE_S = 420.0
_CHANGE_S = 240.0
_SILENT_STATES = ("ACTIVE", "SHUTOFF", "PAUSED", "REBOOT")
_LAST_DEVICE = ord("z")
_MOST_NAME = 255  # as the contract has it


# -- reading ---------------------------------------------------------------------------------------


class HostState(NamedTuple):
    """What an instance shows of its host, and how many builds that has refused."""

    name: str
    silent: bool
    failure_count: int


_NO_HOST = HostState("", silent=False, failure_count=0)


def _hosts(ids: Sequence[str]) -> Any:
    sessions = shared.host_session
    query = Host.select(Host.id, Host.name, Host.failure_count, sessions.lease_expire_time)
    joined = query.join(sessions, JOIN.LEFT_OUTER, on=(sessions.host_id == Host.id))
    return joined.where(Host.id.in_(ids)).tuples()


_HOSTS = Prepared(Host, _hosts)


def find_hosts(rows: Sequence[Instance]) -> dict[str, HostState]:
    """Return the hosts of instances' rows, by id, in one statement."""
    found = {row.host_id for row in rows if row.host_id}
    moment = database.now()
    return {
        id_: _host_state(name, failures, end, moment)
        for id_, name, failures, end in (_HOSTS.rows(sorted(found)) if found else ())
    }


def _host_state(name: str, failure_count: int, lease_end: int | None, moment: int) -> HostState:
    silent = lease_end is not None and not tables.is_connected(lease_end, moment)
    return HostState(name, silent, failure_count)


def messages(
    rows: Sequence[Instance], hosts: Mapping[str, HostState] | None = None
) -> list[instance_pb2.Instance]:
    """Return instances' rows as messages, in one statement for any number of them.

    Args:
        hosts: of the rows, where they are known.
    """
    known = find_hosts(rows) if hosts is None else hosts
    return [_message(row, known.get(row.host_id, _NO_HOST)) for row in rows]


def get_message(id_: str) -> instance_pb2.Instance:
    """Return an instance, also a deleted one."""
    return messages([Instance.get_by_id(id_)])[0]


def _message(row: Any, host: HostState) -> instance_pb2.Instance:
    state = "UNKNOWN" if host.silent and row.state in _SILENT_STATES else row.state
    spec = instance_pb2.InstanceSpec.FromString(bytes(row.spec))
    status = instance_pb2.InstanceStatus(
        state=contract.enum_value(state, State),
        host_id=row.host_id,
        host_name=host.name,
        domain_id=row.domain_id,
        observed_generation=row.generation if row.launch_time else 0,
        hostname=row.hostname,
        addresses=[
            instance_pb2.InstanceAddress(
                network_id=nic["network_id"],
                ip_address=address,
                mac=nic.get("mac", ""),
                port_id=nic["port_id"],
            )
            for nic in row.nics
            for address in nic.get("addresses", [])
        ],
        volumes=[
            instance_pb2.AttachedVolume(
                volume_id=volume["volume_id"],
                attachment_id=volume["attachment_id"],
                device=volume["device"],
            )
            for volume in row.volumes
        ],
        flavor=flavor_pb2.FlavorSpec(
            vcpu_count=row.vcpu_count, memory_mib=row.memory_mib, disk_gib=row.disk_gib
        ),
        flavor_name=row.flavor_name,
        key_pair_name=row.key_pair_name,
        operation_id=row.operation_id,
        power_reason=row.power_reason,
    )
    if row.fault:
        status.fault.reason = row.fault["reason"]
        status.fault.message = row.fault["message"]
        status.fault.time.CopyFrom(convert.timestamp(row.fault["time"]))
    if row.launch_time is not None:
        status.launch_time.CopyFrom(convert.timestamp(row.launch_time))
    spec.ClearField("user_data")  # the guest's, and nobody's who may only look
    return instance_pb2.Instance(metadata=convert.metadata(row), spec=spec, status=status)


def get(caller: auth.Caller, id_: str, *, deleted: bool = False, lock: bool = False) -> Instance:
    """Return an instance that the caller sees.

    Args:
        deleted: one that is being deleted will do.
        lock: it is to be changed.

    Raises:
        errors.NotFound: INSTANCE_NOT_FOUND.
    """
    row = Instance.find_locked(id_) if lock else Instance.find(id_)
    if row is None or not caller.sees(row.project_id) or (row.delete_time and not deleted):
        raise errors.NotFound("INSTANCE_NOT_FOUND", f"there is no instance {id_}", id=id_)
    return row


def get_visible(caller: auth.Caller, id_: str) -> instance_pb2.Instance:
    """Return an instance that the caller sees; also one that is being deleted.

    Raises:
        errors.NotFound: INSTANCE_NOT_FOUND.
    """
    found = _VISIBLE.rows([id_])
    if found:
        *values, name, failures, end = found[0]
        row = SimpleNamespace(**dict(zip(_SHOWN_NAMES, values, strict=True)))
        if caller.sees(row.project_id) and row.state != "DELETED":
            host = _NO_HOST if name is None else _host_state(name, failures, end, database.now())
            return _message(row, host)
    raise errors.NotFound("INSTANCE_NOT_FOUND", f"there is no instance {id_}", id=id_)


# What of an instance its message is made of.
_SHOWN = (
    Instance.id, Instance.name, Instance.project_id, Instance.labels, Instance.version,
    Instance.generation, Instance.create_time, Instance.update_time, Instance.delete_time,
    Instance.spec, Instance.state, Instance.host_id, Instance.domain_id, Instance.launch_time,
    Instance.hostname, Instance.nics, Instance.volumes, Instance.vcpu_count, Instance.memory_mib,
    Instance.disk_gib, Instance.flavor_name, Instance.key_pair_name, Instance.operation_id,
    Instance.power_reason, Instance.fault,
)  # fmt: skip
_SHOWN_NAMES = [field.name for field in _SHOWN]


def _shown(ids: Sequence[str]) -> Any:
    sessions = shared.host_session
    query: Any = Instance.select(*_SHOWN, Host.name, Host.failure_count, sessions.lease_expire_time)
    return (
        query.join(Host, JOIN.LEFT_OUTER, on=(Host.id == Instance.host_id))
        .join(sessions, JOIN.LEFT_OUTER, on=(sessions.host_id == Host.id))
        .where(Instance.id == ids[0])
        .tuples()
    )


_VISIBLE = Prepared(Instance, _shown)


def list_page(
    caller: auth.Caller, request: instance_service_pb2.ListInstancesRequest
) -> instance_service_pb2.ListInstancesResponse:
    """Return a page of the living."""
    revision = shared.revision()
    page = listing.page(
        Instance,
        request,
        caller,
        fields={
            "id": Instance.id,
            "name": Instance.name,
            "state": Instance.state,
            "host_id": Instance.host_id,
            "flavor_id": Instance.flavor_id,
            "image_id": Instance.image_id,
            "server_group_id": Instance.server_group_id,
        },
        where=Instance.delete_time.is_null(),
    )
    return instance_service_pb2.ListInstancesResponse(
        instances=messages(page.rows),
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    rows = list(Instance.select().where(Instance.id.in_(found) & (Instance.state != "DELETED")))
    return {message.metadata.id: message for message in messages(rows)}


def explain(
    caller: auth.Caller, request: instance_service_pb2.ExplainInstanceRequest
) -> instance_service_pb2.ExplainInstanceResponse:
    """Return every attempt to place an instance, newest first."""
    row = get(caller, request.id, deleted=True)
    attempts = (
        Placement.select().where(Placement.instance_id == row.id).order_by(Placement.time.desc())
    )
    return instance_service_pb2.ExplainInstanceResponse(
        instance=messages([row])[0],
        placements=[
            placement_pb2.PlacementExplanation.FromString(bytes(attempt.explanation))
            for attempt in attempts
        ],
        blocking_operation_id=row.operation_id,
    )


# -- creating --------------------------------------------------------------------------------------


def create(
    work: Mutation, request: instance_service_pb2.CreateInstanceRequest
) -> instance_pb2.Instance | None:
    """Record instances with every id that their workflows will need (step 4)."""
    caller, spec = work.caller, request.spec
    project_id = _project(caller)
    flavor = flavor_store.get(spec.flavor_id)
    size = flavor_pb2.FlavorSpec.FromString(bytes(flavor.spec))
    key = key_pair_store.get(caller, spec.key_pair_id) if spec.key_pair_id else None
    if spec.placement.host_id:
        caller.require_system(auth.Rule.ROLE_ADMIN, "choosing the host")
    if spec.placement.server_group_id:
        server_group_store.join(caller, spec.placement.server_group_id)
    names = _names(request)
    _check_spec(spec, len(names))
    count = len(names)
    quota_store.require(
        project_id,
        instances=count,
        vcpus=count * size.vcpu_count,
        memory_mib=count * size.memory_mib,
    )
    moment = database.now()
    like = Instance(
        project_id=project_id,
        labels=dict(request.labels),
        create_time=moment,
        update_time=moment,
        spec=spec.SerializeToString(),
        state="BUILD",
        flavor_id=flavor.id,
        flavor_name=flavor.name,
        image_id=spec.image_id,
        vcpu_count=size.vcpu_count,
        memory_mib=size.memory_mib,
        disk_gib=size.disk_gib,
        key_pair_name=key.name if key else "",
        public_key=key_pair_store.public_key(key) if key else "",
        server_group_id=spec.placement.server_group_id or None,
        reserved=True,
    )
    if request.count <= 1:
        row = _create(work, like, spec, request.name)
        return messages([row])[0] if work.validate_only else None
    work.concerns("instance", "", request.name, project_id)
    rows = [_create(work.part(), like, spec, name) for name in names]
    work.wait_for_parts(deadline_s=_CREATE_S)
    return messages(rows[:1])[0] if work.validate_only else None


def _names(request: instance_service_pb2.CreateInstanceRequest) -> list[str]:
    if request.count <= 1:
        return [request.name]
    names = [f"{request.name}-{number}" for number in range(1, request.count + 1)]
    if len(names[-1]) > _MOST_NAME:
        raise errors.bad_field("name", f"{names[-1]} would be too long; choose a shorter name")
    return names


def _create(work: Mutation, like: Instance, spec: instance_pb2.InstanceSpec, name: str) -> Instance:
    """Record one, and begin to build it."""
    id_ = ids.new("i")
    row = Instance.fresh(
        **like.__data__
        | {
            "id": id_,
            "name": name,
            "hostname": hostname(name, id_),
            "nics": [
                {
                    "port_id": nic.port_id or ids.new("port"),
                    "network_id": nic.network_id,
                    "existing": bool(nic.port_id),
                    "ip": nic.ip_address,
                }
                for nic in spec.nics
            ],
            "volumes": [
                {
                    "attachment_id": ids.new("att"),
                    "volume_id": volume.volume_id,
                    "device": f"vd{chr(ord('b') + number)}",
                    "delete_with_instance": volume.delete_with_instance,
                }
                for number, volume in enumerate(spec.volumes)
            ],
            "operation_id": work.operation_id,
        }
    )
    values = [row.__data__.get(name) for name in Instance._meta.sorted_field_names]
    if not _INSERT.run(Instance._meta.database, values):
        raise _name_taken(name)
    work.concerns("instance", row.id, row.name, row.project_id)
    tables.changed("instance", row.id, row.project_id, "ADDED")
    if not work.validate_only:
        _trace_request(work)
        work.start(
            "create_instance",
            json.dumps({"domain_id": ids.new("d")}),
            deadline_s=_CREATE_S,
            instance=row,
        )
    return row


_CREATE_S = 600.0


def _trace_request(work: Mutation) -> None:
    """Save what is done: login (from the token), request, authorization; the conductor ends 4."""
    here, call = socket.gethostname(), work.call
    start, end = work.caller.login
    if start:
        work.step(
            1, "authenticate", "identity", start, end, host=work.caller.login_host,
            detail=f"token for {work.caller.user_name}",
        )  # fmt: skip
    work.step(2, "request", "compute", call.receive_time, call.receive_time, host=here)
    work.step(
        3, "authorize", "compute", call.authorize_start_time, call.authorize_end_time, host=here,
        detail="signature, expiry, revocation, role",
    )  # fmt: skip
    work.step(4, "record, reserve", "compute", call.authorize_end_time, None, host=here)


def _check_spec(spec: instance_pb2.InstanceSpec, count: int) -> None:
    for number, nic in enumerate(spec.nics):
        if count > 1 and (nic.port_id or nic.ip_address):
            raise errors.bad_field(f"spec.nics[{number}]", "only one instance can have it")
        if bool(nic.network_id) == bool(nic.port_id):
            raise errors.bad_field(f"spec.nics[{number}]", "must name either a network or a port")
        if nic.port_id and nic.ip_address:
            raise errors.bad_field(f"spec.nics[{number}].ip_address", "a port has its own address")
    if count > 1 and spec.volumes:
        raise errors.bad_field("spec.volumes", "only one instance can have them")
    for what, found in (
        ("spec.volumes", [volume.volume_id for volume in spec.volumes]),
        ("spec.nics", [nic.port_id for nic in spec.nics if nic.port_id]),
    ):
        if len(set(found)) < len(found):
            raise errors.bad_field(what, "the same one is named twice")


# Without a row if the project has a living instance of that name.
_INSERT = Kept(
    lambda values: (
        Instance.insert(dict(zip(Instance._meta.sorted_fields, values, strict=True)))
        .on_conflict_ignore()
        .returning(Instance.id)
    )
)


def _name_taken(name: str) -> errors.AlreadyExists:
    text = f"the project has an instance {name}; choose another name"
    return errors.AlreadyExists("INSTANCE_NAME_TAKEN", text, name=name)


def _project(caller: auth.Caller) -> str:
    if not caller.project_id:
        raise errors.PermissionDenied("NO_PROJECT", "log in to a project first: mcloud login")
    return caller.project_id


def hostname(name: str, id_: str) -> str:
    """Return the host name that Nova would derive from an instance's name.

    Source: nova.utils.sanitize_hostname: spaces, underscores and dots become hyphens, other
    characters than letters, digits and hyphens go, lower case, at most 63 characters. (Letters
    are ASCII's here: others are no host names.) Where nothing is left, it is the id.
    """
    text = re.sub(r"[ _.]", "-", name).lower()
    text = re.sub(r"[^a-z0-9-]", "", text).strip("-")[:63].rstrip("-")
    return text or id_


# -- changing --------------------------------------------------------------------------------------


def update(
    work: Mutation, request: instance_service_pb2.UpdateInstanceRequest
) -> instance_pb2.Instance:
    """Change the name or the labels."""
    row = get(work.caller, request.id, lock=True)
    if "name" in request.update_mask.paths and request.name != row.name:
        same = (Instance.project_id == row.project_id) & (Instance.name == request.name)
        if Instance.select().where(same & Instance.delete_time.is_null()).exists():
            raise _name_taken(request.name)
    convert.apply_mask(row, request, instance_pb2.InstanceSpec, ("name", "labels"))
    row.save()
    work.concerns("instance", row.id, row.name, row.project_id)
    tables.changed("instance", row.id, row.project_id)
    return messages([row])[0]


def delete(
    work: Mutation, request: instance_service_pb2.DeleteInstanceRequest
) -> instance_pb2.Instance | None:
    """Free name and quota at once, stop whatever works on the instance, and leave the rest."""
    table = shared.operation
    in_the_way = get(work.caller, request.id).operation_id
    if in_the_way:  # runners lock their operation, then the instance: so does this
        locked(table.select(table.id).where(table.id == in_the_way)).first()
    row = get(work.caller, request.id, lock=True)
    convert.require_version(row, request.resource_version)
    work.concerns("instance", row.id, row.name, row.project_id)
    preempted = row.operation_id
    if work.validate_only:
        return messages([row])[0]
    job: dict[str, Any] = {"preempted": preempted, "domain_id": row.domain_id}
    if preempted:
        earlier = table.find(preempted)
        if earlier is not None:
            job["domain_id"] = json.loads(earlier.job).get("domain_id", row.domain_id)
        table.update(cancel_requested=True, not_before=0).where(
            (table.id == preempted) & (table.state == "RUNNING")
        ).execute()
        tables.changed("operation", preempted, row.project_id)
        tables.wake_runners(preempted, row.project_id)
    moment = database.now()
    row.delete_time = row.update_time = moment
    row.version += 1
    row.operation_id = work.operation_id
    row.save()
    tables.changed("instance", row.id, row.project_id)
    server_group_store.leave(row)
    work.start("delete_instance", json.dumps(job), deadline_s=_DELETE_S)
    return None


def start(
    work: Mutation, request: instance_service_pb2.StartInstanceRequest
) -> instance_pb2.Instance | None:
    """Want the domain running."""
    row = _take(work, request.id, ("SHUTOFF",), "start")
    return _change_power(work, row, "start_instance", {"power_state": "RUNNING"})


def stop(
    work: Mutation, request: instance_service_pb2.StopInstanceRequest
) -> instance_pb2.Instance | None:
    """Want the domain off."""
    row = _take(work, request.id, ("ACTIVE", "PAUSED"), "stop")
    values = {"power_state": "SHUTOFF", "hard_reboot": request.force}
    return _change_power(work, row, "stop_instance", values)


def reboot(
    work: Mutation, request: instance_service_pb2.RebootInstanceRequest
) -> instance_pb2.Instance | None:
    """Want another boot of the domain."""
    row = _take(work, request.id, ("ACTIVE",), "reboot")
    values = {
        "power_state": "RUNNING",
        "boot_number": row.boot_number + 1,
        "hard_reboot": request.hard,
    }
    return _change_power(work, row, "reboot_instance", values, state="REBOOT")


def attach_volume(
    work: Mutation, request: instance_service_pb2.AttachVolumeRequest
) -> instance_pb2.Instance | None:
    """Want another disk."""
    row = _take(work, request.id, ("ACTIVE", "SHUTOFF", "PAUSED"), "attach a volume to")
    if any(volume["volume_id"] == request.volume_id for volume in row.volumes):
        raise errors.WrongState(
            "VOLUME_IN_USE", f"volume {request.volume_id} is attached to this instance already"
        )
    volume = {
        "attachment_id": ids.new("att"),
        "volume_id": request.volume_id,
        "device": _free_device(row.volumes),
        "delete_with_instance": request.delete_with_instance,
    }
    return _change_volume(work, row, "attach_volume", volume)


def detach_volume(
    work: Mutation, request: instance_service_pb2.DetachVolumeRequest
) -> instance_pb2.Instance | None:
    """Want a disk gone."""
    row = _take(work, request.id, ("ACTIVE", "SHUTOFF", "PAUSED"), "detach a volume from")
    for volume in row.volumes:
        if volume["volume_id"] == request.volume_id:
            return _change_volume(work, row, "detach_volume", volume)
    raise errors.NotFound(
        "VOLUME_NOT_ATTACHED", f"volume {request.volume_id} is not attached to {row.name}"
    )


def _take(work: Mutation, id_: str, states: Iterable[str], verb: str) -> Instance:
    """Return an instance for an exclusive operation.

    Raises:
        errors.Conflict: OPERATION_IN_PROGRESS.
        errors.WrongState: BAD_STATE.
    """
    row = get(work.caller, id_, lock=True)
    work.concerns("instance", row.id, row.name, row.project_id)
    if row.operation_id:
        raise errors.Conflict(
            "OPERATION_IN_PROGRESS",
            f"operation {row.operation_id} works on instance {row.name}; wait for it: "
            f"mcloud operation wait {row.operation_id}",
            operation_id=row.operation_id,
        )
    if row.state not in states:
        raise errors.WrongState(
            "BAD_STATE",
            f"cannot {verb} instance {row.name}: it is {row.state}, not {' or '.join(states)}",
            state=row.state,
        )
    living = Domain.get_or_none((Domain.id == row.domain_id) & Domain.absent_time.is_null())
    if living is None:
        raise errors.WrongState("BAD_STATE", f"instance {row.name} is on no host", state=row.state)
    return row


def _change_power(
    work: Mutation, row: Instance, workflow: str, values: dict[str, Any], *, state: str = ""
) -> instance_pb2.Instance | None:
    job = {"domain_id": row.domain_id, "values": values}
    return _begin(work, row, workflow, job, state=state)


def _change_volume(
    work: Mutation, row: Instance, workflow: str, volume: dict[str, Any]
) -> instance_pb2.Instance | None:
    return _begin(work, row, workflow, {"domain_id": row.domain_id, "volume": volume})


def _begin(
    work: Mutation, row: Instance, workflow: str, job: dict[str, Any], *, state: str = ""
) -> instance_pb2.Instance | None:
    if work.validate_only:
        return messages([row])[0]
    row.operation_id = work.operation_id
    row.state = state or row.state
    row.fault = None
    row.version += 1
    row.update_time = database.now()
    row.save()
    tables.changed("instance", row.id, row.project_id)
    work.start(workflow, json.dumps(job), deadline_s=_CHANGE_S)
    return None


def _free_device(volumes: Sequence[Mapping[str, Any]]) -> str:
    used = {volume["device"] for volume in volumes}
    for letter in range(ord("b"), _LAST_DEVICE + 1):
        if f"vd{chr(letter)}" not in used:
            return f"vd{chr(letter)}"
    raise errors.WrongState("TOO_MANY_VOLUMES", "an instance has at most 25 volumes")
