"""Security groups and their rules in the database."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

import peewee
from google.protobuf.message import Message

from mcloud.network.v1 import security_group_pb2, security_group_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, contract, convert, database, listing, tables
from mcloud_controlplane.core.model import Prepared
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.network import dataplane_store, quota_store
from mcloud_controlplane.network.model import (
    PortGroup,
    SecurityGroup,
    SecurityGroupRule,
    locked,
    shared,
)

Spec = security_group_pb2.SecurityGroupRuleSpec

DEFAULT = "default"
_NUMBERS = {"1": "icmp", "6": "tcp", "17": "udp", "58": "ipv6-icmp"}


def messages(rows: Sequence[SecurityGroup]) -> list[security_group_pb2.SecurityGroup]:
    """Return groups as messages, in two more statements."""
    found = [row.id for row in rows]
    rules: dict[str, list[security_group_pb2.SecurityGroupRule]] = {id_: [] for id_ in found}
    query = SecurityGroupRule.select().where(SecurityGroupRule.security_group_id.in_(found))
    for rule in query.order_by(SecurityGroupRule.id):
        rules[rule.security_group_id].append(rule_message(rule))
    members: Any = (
        PortGroup.select(PortGroup.security_group_id, peewee.fn.COUNT(PortGroup.port_id))
        .where(PortGroup.security_group_id.in_(found))
        .group_by(PortGroup.security_group_id)
        .tuples()
    )
    counts: dict[str, int] = dict(members)
    return [
        security_group_pb2.SecurityGroup(
            metadata=convert.metadata(row),
            spec=security_group_pb2.SecurityGroupSpec.FromString(bytes(row.spec)),
            status=security_group_pb2.SecurityGroupStatus(
                rules=rules[row.id], port_count=counts.get(row.id, 0)
            ),
        )
        for row in rows
    ]


def message(row: SecurityGroup) -> security_group_pb2.SecurityGroup:
    """Return a group as its message."""
    return messages([row])[0]


def rule_message(row: SecurityGroupRule) -> security_group_pb2.SecurityGroupRule:
    """Return a rule as its message."""
    return security_group_pb2.SecurityGroupRule(
        metadata=convert.metadata(row), spec=Spec.FromString(bytes(row.spec))
    )


def get(caller: auth.Caller, id_: str) -> SecurityGroup:
    """Return a group.

    Raises:
        errors.NotFound: SECURITY_GROUP_NOT_FOUND.
    """
    row = SecurityGroup.find(id_)
    if row is None or not caller.sees(row.project_id):
        raise _not_found(id_)
    return row


def _get_locked(caller: auth.Caller, id_: str) -> SecurityGroup:
    row = locked(SecurityGroup.select().where(SecurityGroup.id == id_)).get_or_none()
    if row is None or not caller.sees(row.project_id):
        raise _not_found(id_)
    return row


def resolve(project_id: str, wanted: Sequence[str], default_id: str | None = None) -> list[str]:
    """Return the groups for a port of a project: those wanted, else its "default". Locked.

    Args:
        default_id: of its "default", if that is known.

    Raises:
        errors.NotFound: SECURITY_GROUP_NOT_FOUND.
    """
    if not wanted:
        return [default_id or ensure_default(project_id)]
    chosen = list(dict.fromkeys(wanted))
    query = SecurityGroup.select(SecurityGroup.id).where(
        SecurityGroup.id.in_(chosen) & (SecurityGroup.project_id == project_id)
    )
    found = {row.id for row in locked(query.order_by(SecurityGroup.id))}
    for id_ in chosen:
        if id_ not in found:
            raise _not_found(id_)
    return chosen


def find_default(project_id: str) -> str | None:
    """Return the id of a project's "default" group."""
    return next((id_ for (id_,) in _DEFAULTS.rows([project_id])), None)


_DEFAULTS = Prepared(
    SecurityGroup,
    lambda project_ids: (
        SecurityGroup.select(SecurityGroup.id)
        .where((SecurityGroup.project_id == project_ids[0]) & (SecurityGroup.name == DEFAULT))
        .tuples()
    ),
)


def ensure_default(project_id: str) -> str:
    """Return the id of a project's "default" group; made where there is none.

    It allows everything out, and in only what comes from its own members.
    """
    found = find_default(project_id)
    if found is not None:
        return found
    moment = database.now()
    group = SecurityGroup.create(
        id=ids.new("sg"),
        name=DEFAULT,
        project_id=project_id,
        create_time=moment,
        update_time=moment,
        spec=security_group_pb2.SecurityGroupSpec(
            description="Everything out; in from its own members."
        ).SerializeToString(),
    )
    for direction, remote in ((Spec.DIRECTION_EGRESS, ""), (Spec.DIRECTION_INGRESS, group.id)):
        for version in (4, 6):
            _insert_rule(
                Spec(
                    security_group_id=group.id,
                    direction=direction,
                    ip_version=version,
                    remote_group_id=remote,
                ),
                project_id,
            )
    tables.changed("security_group", group.id, project_id, "ADDED")
    return str(group.id)


def create(
    work: Mutation, request: security_group_service_pb2.CreateSecurityGroupRequest
) -> security_group_pb2.SecurityGroup:
    """Make a group. Like OpenStack's, it lets everything out until its rules are changed."""
    project_id = work.caller.project_id
    _ensure_name_free(project_id, request.name)
    quota_store.ensure_room(project_id, "security_group")
    row = SecurityGroup.create(**convert.new_row("sg", request, project_id))
    for version in (4, 6):
        spec = Spec(security_group_id=row.id, direction=Spec.DIRECTION_EGRESS, ip_version=version)
        _insert_rule(spec, project_id)
    work.concerns("security_group", row.id, row.name)
    tables.changed("security_group", row.id, project_id, "ADDED")
    return message(row)


def _ensure_name_free(project_id: str, name: str, but: str = "") -> None:
    taken = SecurityGroup.get_or_none(
        (SecurityGroup.project_id == project_id) & (SecurityGroup.name == name)
    )
    if taken is not None and taken.id != but:
        raise errors.AlreadyExists(
            "SECURITY_GROUP_NAME_TAKEN", f"there is a security group {name}", name=name
        )


def update(
    work: Mutation, request: security_group_service_pb2.UpdateSecurityGroupRequest
) -> security_group_pb2.SecurityGroup:
    """Change name, labels or description."""
    row = _get_locked(work.caller, request.id)
    convert.apply_mask(
        row,
        request,
        security_group_pb2.SecurityGroupSpec,
        ("name", "labels", "spec.description"),
    )
    if not row.name:
        raise errors.bad_field("name", "must be set")
    _ensure_name_free(row.project_id, row.name, but=row.id)
    row.save()
    work.concerns("security_group", row.id, row.name, row.project_id)
    tables.changed("security_group", row.id, row.project_id)
    return message(row)


def delete(
    work: Mutation, request: security_group_service_pb2.DeleteSecurityGroupRequest
) -> security_group_pb2.SecurityGroup:
    """Delete a group that no port is in and no other group's rule names."""
    row = _get_locked(work.caller, request.id)
    convert.require_version(row, request.resource_version)
    ports = PortGroup.select().where(PortGroup.security_group_id == row.id).limit(5)
    names = [member.port_id for member in ports]
    referring = SecurityGroupRule.select().where(
        (SecurityGroupRule.remote_group_id == row.id)
        & (SecurityGroupRule.security_group_id != row.id)
    )
    names += [rule.security_group_id for rule in referring.limit(5)]
    if names:
        raise errors.WrongState(
            "SECURITY_GROUP_IN_USE",
            f"security group {row.name} is used by {', '.join(names)}",
            users=", ".join(names),
        )
    row.delete_time = database.now()
    answer = message(row)
    SecurityGroupRule.delete().where(SecurityGroupRule.security_group_id == row.id).execute()
    row.delete_instance()
    work.concerns("security_group", row.id, row.name, row.project_id)
    tables.changed("security_group", row.id, row.project_id, "DELETED")
    return answer


def create_rule(
    work: Mutation, request: security_group_service_pb2.CreateSecurityGroupRuleRequest
) -> security_group_pb2.SecurityGroupRule:
    """Add a rule; the hosts of the group's ports get it at once."""
    group = _get_locked(work.caller, request.spec.security_group_id)
    spec = _normal(request.spec)
    if spec.remote_group_id:
        resolve(group.project_id, [spec.remote_group_id])
    if _find_rule(spec):
        raise errors.AlreadyExists(
            "RULE_EXISTS", f"security group {group.name} has a rule that matches the same"
        )
    quota_store.ensure_room(group.project_id, "security_group_rule")
    row = _insert_rule(spec, group.project_id)
    _log_rule_change(work, group, row)
    return rule_message(row)


def delete_rule(
    work: Mutation, request: security_group_service_pb2.DeleteSecurityGroupRuleRequest
) -> security_group_pb2.SecurityGroupRule:
    """Remove a rule."""
    row = SecurityGroupRule.find(request.id)
    if row is None or not work.caller.sees(row.project_id):
        raise errors.NotFound(
            "SECURITY_GROUP_RULE_NOT_FOUND", f"there is no rule {request.id}", id=request.id
        )
    group = _get_locked(work.caller, row.security_group_id)
    row.delete_time = database.now()
    row.delete_instance()
    _log_rule_change(work, group, row)
    return rule_message(row)


def _log_rule_change(work: Mutation, group: SecurityGroup, row: SecurityGroupRule) -> None:
    group.version += 1
    group.update_time = database.now()
    group.save()
    work.concerns("security_group_rule", row.id, "", row.project_id)
    tables.changed("security_group", group.id, group.project_id)
    dataplane_store.bump(dataplane_store.hosts_of_groups([group.id]))


def _insert_rule(spec: Spec, project_id: str) -> SecurityGroupRule:
    moment = database.now()
    return SecurityGroupRule.create(
        id=ids.new("sgr"),
        project_id=project_id,
        create_time=moment,
        update_time=moment,
        spec=spec.SerializeToString(),
        security_group_id=spec.security_group_id,
        direction=contract.enum_name(spec.direction, Spec.Direction),
        ip_version=spec.ip_version,
        protocol=spec.protocol,
        port_min=spec.port_min if spec.HasField("port_min") else None,
        port_max=spec.port_max if spec.HasField("port_max") else None,
        remote_cidr=spec.remote_cidr,
        remote_group_id=spec.remote_group_id,
        digest=_digest(spec),
    )


def _find_rule(spec: Spec) -> SecurityGroupRule | None:
    return SecurityGroupRule.get_or_none(
        (SecurityGroupRule.security_group_id == spec.security_group_id)
        & (SecurityGroupRule.digest == _digest(spec))
    )


def _digest(spec: Spec) -> str:
    """Return what a rule matches, in few characters: alike if and only if the rules are."""
    ends = [str(getattr(spec, f)) if spec.HasField(f) else "" for f in ("port_min", "port_max")]
    remote = spec.remote_group_id or spec.remote_cidr
    return "|".join([str(spec.direction), str(spec.ip_version), spec.protocol, *ends, remote])


def _normal(given: Spec) -> Spec:
    """Return a rule in its one form.

    Raises:
        errors.InvalidArgument: BAD_RULE.
    """
    spec = Spec()
    spec.CopyFrom(given)
    spec.protocol = _NUMBERS.get(spec.protocol, spec.protocol)
    if spec.remote_cidr and spec.remote_group_id:
        raise _bad_rule("remote_cidr and remote_group_id exclude each other")
    network = ipaddress.ip_network(spec.remote_cidr) if spec.remote_cidr else None
    if spec.ip_version == 0:
        spec.ip_version = network.version if network else 4
    if spec.ip_version not in (4, 6):
        raise _bad_rule("ip_version must be 4 or 6")
    if network is not None:
        if network.version != spec.ip_version:
            raise _bad_rule(f"{network} is not of IP version {spec.ip_version}")
        # All addresses and no condition are the same rule.
        spec.remote_cidr = str(network) if network.prefixlen else ""
    if spec.protocol == "icmp" and spec.ip_version == 6:
        spec.protocol = "ipv6-icmp"
    if spec.protocol == "ipv6-icmp" and spec.ip_version == 4:
        raise _bad_rule("ipv6-icmp needs ip_version 6")
    if spec.protocol.isdigit() and int(spec.protocol) > 255:
        raise _bad_rule("protocol must be at most 255")
    _check_ports(spec)
    return spec


def _check_ports(spec: Spec) -> None:
    low, high = spec.HasField("port_min"), spec.HasField("port_max")
    if not low and not high:
        return
    if spec.protocol in ("icmp", "ipv6-icmp"):
        if not low or max(spec.port_min, spec.port_max) > 255:
            raise _bad_rule("port_min is the ICMP type, port_max its code; both at most 255")
        return
    if spec.protocol not in ("tcp", "udp"):
        raise _bad_rule("ports are for tcp and udp")
    if not low:
        spec.port_min = spec.port_max
    if not high:
        spec.port_max = spec.port_min
    if spec.port_min > spec.port_max:
        raise _bad_rule("port_min is above port_max")


def list_page(
    caller: auth.Caller, request: security_group_service_pb2.ListSecurityGroupsRequest
) -> security_group_service_pb2.ListSecurityGroupsResponse:
    """Return a page of groups with their rules."""
    revision = shared.revision()
    page = listing.page(
        SecurityGroup,
        request,
        caller,
        fields={"id": SecurityGroup.id, "name": SecurityGroup.name},
    )
    return security_group_service_pb2.ListSecurityGroupsResponse(
        security_groups=messages(page.rows),
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    rows = list(SecurityGroup.select().where(SecurityGroup.id.in_(found)))
    return {m.metadata.id: m for m in messages(rows)}


def _not_found(id_: str) -> errors.NotFound:
    return errors.NotFound("SECURITY_GROUP_NOT_FOUND", f"there is no security group {id_}", id=id_)


def _bad_rule(text: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("BAD_RULE", text)
