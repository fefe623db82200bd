"""Role assignments in the database, and the rule that somebody administers the system."""

from __future__ import annotations

from mcloud.common.v1 import options_pb2
from mcloud.identity.v1 import role_assignment_pb2, role_assignment_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, contract, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.identity import epoch_store, project_store
from mcloud_controlplane.identity.model import RoleAssignment, User, shared

Rule = options_pb2.Rule


def message(row: RoleAssignment) -> role_assignment_pb2.RoleAssignment:
    """Return a role assignment's row as its message."""
    return role_assignment_pb2.RoleAssignment(
        metadata=convert.metadata(row),
        spec=role_assignment_pb2.RoleAssignmentSpec.FromString(bytes(row.spec)),
    )


def get(id_: str) -> RoleAssignment:
    """Return a role assignment.

    Raises:
        errors.NotFound: ROLE_ASSIGNMENT_NOT_FOUND.
    """
    row: RoleAssignment | None = RoleAssignment.find(id_)
    if row is None:
        raise errors.NotFound(
            "ROLE_ASSIGNMENT_NOT_FOUND", f"there is no role assignment {id_}", id=id_
        )
    return row


def create(
    work: Mutation,
    request: role_assignment_service_pb2.CreateRoleAssignmentRequest,
    store: database.Database,
) -> role_assignment_pb2.RoleAssignment:
    """Give a user a role.

    Raises:
        errors.NotFound: USER_NOT_FOUND, PROJECT_NOT_FOUND.
        errors.AlreadyExists: ROLE_ASSIGNED.
    """
    spec = request.spec
    # Locked: neither goes away before the assignment is there to prevent or follow it.
    user = store.locked(User.select().where(User.id == spec.user_id)).first()
    if user is None:
        raise errors.NotFound("USER_NOT_FOUND", f"there is no user {spec.user_id}", id=spec.user_id)
    if spec.project_id:
        project_store.get(spec.project_id, store)
    held = RoleAssignment.get_or_none(
        (RoleAssignment.user_id == spec.user_id)
        & (RoleAssignment.project_id == spec.project_id)
        & (RoleAssignment.role == spec.role)
    )
    if held is not None:
        raise errors.AlreadyExists(
            "ROLE_ASSIGNED",
            f"{user.name} has the role {contract.enum_name(spec.role, Rule.Role).lower()} there: "
            f"{held.id}",
            id=held.id,
        )
    moment = database.now()
    row = RoleAssignment.create(
        id=ids.new("ra"),
        project_id=spec.project_id,
        create_time=moment,
        update_time=moment,
        spec=spec.SerializeToString(),
        user_id=spec.user_id,
        role=spec.role,
    )
    work.concerns("role_assignment", row.id, "")
    tables.changed("role_assignment", row.id, row.project_id, "ADDED")
    return message(row)


def delete(
    work: Mutation,
    request: role_assignment_service_pb2.DeleteRoleAssignmentRequest,
    store: database.Database,
) -> role_assignment_pb2.RoleAssignment:
    """Take a role away; the tokens that rest on it end."""
    row = get(request.id)
    convert.require_version(row, request.resource_version)
    require_other_admin(store, assignment_id=row.id)
    epoch_store.revoke(row.id)
    row.delete_instance()
    row.delete_time = database.now()
    work.concerns("role_assignment", row.id, "")
    tables.changed("role_assignment", row.id, row.project_id, "DELETED")
    return message(row)


def require_other_admin(
    store: database.Database, *, user_id: str = "", assignment_id: str = ""
) -> None:
    """Refuse what would leave the system without an administrator who can log in.

    Args:
        user_id: who is about to be disabled or deleted.
        assignment_id: what is about to be deleted.

    Raises:
        errors.WrongState: LAST_ADMIN.
    """
    # Two that take each other's role away at once must not both succeed: the first locks all.
    rows = list(
        store.locked(
            RoleAssignment.select()
            .where((RoleAssignment.project_id == "") & (RoleAssignment.role == Rule.ROLE_ADMIN))
            .order_by(RoleAssignment.id)
        )
    )
    left = {row.user_id for row in rows if row.id != assignment_id and row.user_id != user_id}
    if len(left) == len({row.user_id for row in rows}):
        return
    if not User.select().where(User.id.in_(left) & ~User.disabled).exists():
        raise errors.WrongState(
            "LAST_ADMIN",
            "nobody else administers the system; give another user the role admin on it first",
        )


def list_page(
    caller: auth.Caller, request: role_assignment_service_pb2.ListRoleAssignmentsRequest
) -> role_assignment_service_pb2.ListRoleAssignmentsResponse:
    """Return a page of the role assignments."""
    revision = shared.revision()
    page = listing.page(
        RoleAssignment,
        request,
        caller,
        fields={
            "id": RoleAssignment.id,
            "user_id": RoleAssignment.user_id,
            "project_id": RoleAssignment.project_id,
        },
        visible=True,
    )
    return role_assignment_service_pb2.ListRoleAssignmentsResponse(
        role_assignments=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )
