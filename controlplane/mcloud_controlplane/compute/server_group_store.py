"""Server groups in the database. The scheduler keeps their rules (scheduler/server_group.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import peewee
from google.protobuf.message import Message

from mcloud.compute.v1 import server_group_pb2, server_group_service_pb2
from mcloud_base import errors
from mcloud_controlplane.compute import quota_store
from mcloud_controlplane.compute.model import Instance, ServerGroup, locked, shared
from mcloud_controlplane.core import auth, contract, convert, listing, tables
from mcloud_controlplane.core.mutation import Mutation

Spec = server_group_pb2.ServerGroupSpec

_MOST_SHOWN = 100  # members


def messages(rows: Sequence[ServerGroup]) -> list[server_group_pb2.ServerGroup]:
    """Return server groups as messages, in two more statements for any number of them."""
    found = [row.id for row in rows]
    counts = _counts(found)
    members = _oldest_members([id_ for id_ in found if counts.get(id_)])
    return [
        server_group_pb2.ServerGroup(
            metadata=convert.metadata(row),
            spec=Spec.FromString(bytes(row.spec)),
            status=server_group_pb2.ServerGroupStatus(
                instance_count=counts.get(row.id, 0), instance_ids=members.get(row.id, [])
            ),
        )
        for row in rows
    ]


def message(row: ServerGroup) -> server_group_pb2.ServerGroup:
    """Return a server group as its message."""
    return messages([row])[0]


def _members(found: Sequence[str]) -> Any:
    return Instance.server_group_id.in_(list(found)) & Instance.delete_time.is_null()


def _counts(found: Sequence[str]) -> dict[str, int]:
    query: Any = Instance.select(Instance.server_group_id, peewee.fn.COUNT(Instance.id))
    return dict(query.where(_members(found)).group_by(Instance.server_group_id).tuples())


def _oldest_members(found: Sequence[str]) -> dict[str, list[str]]:
    """Return members by group: of a thousand, too, no more are read than are shown."""
    members: dict[str, list[str]] = {id_: [] for id_ in found}
    if not found:
        return members
    number: Any = peewee.fn.ROW_NUMBER()
    place = number.over(partition_by=[Instance.server_group_id], order_by=[Instance.id])
    ranked: Any = Instance.select(Instance.server_group_id, Instance.id, place.alias("place"))
    ranked = ranked.where(_members(found))
    query = peewee.Select([ranked], [ranked.c.server_group_id, ranked.c.id])
    query = query.where(ranked.c.place <= _MOST_SHOWN).order_by(ranked.c.id)
    for group_id, id_ in query.tuples().execute(Instance._meta.database):
        members[group_id].append(id_)
    return members


def get(caller: auth.Caller, id_: str, *, lock: bool = False) -> ServerGroup:
    """Return a server group that the caller sees.

    Args:
        lock: it is to be changed, or to keep what is.

    Raises:
        errors.NotFound: SERVER_GROUP_NOT_FOUND.
    """
    query = ServerGroup.select().where(ServerGroup.id == id_)
    row: ServerGroup | None = (locked(query) if lock else query).first()
    if row is None or not caller.sees(row.project_id):
        raise not_found(id_)
    return row


def not_found(id_: str) -> errors.NotFound:
    """Return the error that there is no such server group."""
    return errors.NotFound("SERVER_GROUP_NOT_FOUND", f"there is no server group {id_}", id=id_)


def join(caller: auth.Caller, id_: str) -> None:
    """Let instances of the caller's project become members; within the unit that records them.

    The row stays locked until the commit: a server group that is deleted has no members.

    Raises:
        errors.NotFound: SERVER_GROUP_NOT_FOUND; also of one of another project.
    """
    row = get(caller, id_, lock=True)
    if row.project_id != caller.project_id:
        raise not_found(id_)
    tables.changed("server_group", row.id, row.project_id)  # its status


def leave(row: Instance) -> None:
    """Tell that an instance that is deleted is a member no more."""
    if row.server_group_id:
        tables.changed("server_group", row.server_group_id, row.project_id)


def create(
    work: Mutation, request: server_group_service_pb2.CreateServerGroupRequest
) -> server_group_pb2.ServerGroup:
    """Make a server group."""
    spec, project_id = request.spec, work.caller.project_id
    if spec.max_instances_per_host and spec.policy != Spec.POLICY_ANTI_AFFINITY:
        raise errors.bad_field("spec.max_instances_per_host", "is for POLICY_ANTI_AFFINITY only")
    quota_store.require(project_id, server_groups=1)
    _ensure_name_free(project_id, request.name)
    row = ServerGroup.create(
        **convert.new_row("grp", request, project_id),
        policy=contract.enum_name(spec.policy, Spec.Policy),
        max_instances_per_host=spec.max_instances_per_host or 1,
    )
    work.concerns("server_group", row.id, row.name, project_id)
    tables.changed("server_group", row.id, project_id, "ADDED")
    return message(row)


def _ensure_name_free(project_id: str, name: str, but: str = "") -> None:
    taken = ServerGroup.get_or_none(
        (ServerGroup.project_id == project_id) & (ServerGroup.name == name)
    )
    if taken is not None and taken.id != but:
        raise errors.AlreadyExists(
            "SERVER_GROUP_NAME_TAKEN", f"the project has a server group {name}", name=name
        )


def update(
    work: Mutation, request: server_group_service_pb2.UpdateServerGroupRequest
) -> server_group_pb2.ServerGroup:
    """Change the name or the labels."""
    row = get(work.caller, request.id, lock=True)
    convert.apply_mask(row, request, Spec, ("name", "labels"))
    if not row.name:
        raise errors.bad_field("name", "must be set")
    _ensure_name_free(row.project_id, row.name, but=row.id)
    row.save()
    work.concerns("server_group", row.id, row.name, row.project_id)
    tables.changed("server_group", row.id, row.project_id)
    return message(row)


def delete(
    work: Mutation, request: server_group_service_pb2.DeleteServerGroupRequest
) -> server_group_pb2.ServerGroup:
    """Delete a server group without members.

    Raises:
        errors.WrongState: SERVER_GROUP_IN_USE.
    """
    row = get(work.caller, request.id, lock=True)
    convert.require_version(row, request.resource_version)
    answer = message(row)
    if count := answer.status.instance_count:
        raise errors.WrongState(
            "SERVER_GROUP_IN_USE",
            f"server group {row.name} has {count} instance(s); delete them first",
            instance_count=count,
        )
    row.delete_instance()
    work.concerns("server_group", row.id, row.name, row.project_id)
    tables.changed("server_group", row.id, row.project_id, "DELETED")
    return answer


def list_page(
    caller: auth.Caller, request: server_group_service_pb2.ListServerGroupsRequest
) -> server_group_service_pb2.ListServerGroupsResponse:
    """Return a page."""
    revision = shared.revision()
    page = listing.page(
        ServerGroup,
        request,
        caller,
        fields={"id": ServerGroup.id, "name": ServerGroup.name, "policy": ServerGroup.policy},
    )
    return server_group_service_pb2.ListServerGroupsResponse(
        server_groups=messages(page.rows),
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    rows = list(ServerGroup.select().where(ServerGroup.id.in_(found)))
    return {message.metadata.id: message for message in messages(rows)}
