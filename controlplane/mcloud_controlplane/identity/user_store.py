"""Users in the database. No message shows a password's hash."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from mcloud.common.v1 import options_pb2
from mcloud.identity.v1 import user_pb2, user_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.identity import epoch_store, login_store, role_assignment_store
from mcloud_controlplane.identity.model import ApplicationCredential, RoleAssignment, User, shared

_UPDATABLE = ("name", "labels", "spec.email", "spec.disabled", "spec.description")


def message(row: User) -> user_pb2.User:
    """Return a user's row as its message."""
    return user_pb2.User(
        metadata=convert.metadata(row), spec=user_pb2.UserSpec.FromString(bytes(row.spec))
    )


def get(id_: str, lock: database.Database | None = None) -> User:
    """Return a user.

    Args:
        lock: the database, if the row is to be kept from changing.

    Raises:
        errors.NotFound: USER_NOT_FOUND.
    """
    query = User.select().where(User.id == id_)
    row: User | None = (lock.locked(query) if lock else query).first()
    if row is None:
        raise errors.NotFound("USER_NOT_FOUND", f"there is no user {id_}", id=id_)
    return row


def create(
    work: Mutation, request: user_service_pb2.CreateUserRequest, password_hash: str
) -> user_pb2.User:
    """Make a user."""
    _require_free(request.name)
    moment = database.now()
    row = User.create(
        id=ids.new("u"),
        name=request.name,
        labels=dict(request.labels),
        create_time=moment,
        update_time=moment,
        spec=request.spec.SerializeToString(),
        disabled=request.spec.disabled,
        password_hash=password_hash,
    )
    work.concerns("user", row.id, row.name)
    tables.changed("user", row.id, "", "ADDED")
    return message(row)


def update(
    work: Mutation, request: user_service_pb2.UpdateUserRequest, store: database.Database
) -> user_pb2.User:
    """Change what the mask names. Disabling ends the user's tokens."""
    if request.spec.disabled and "spec.disabled" in request.update_mask.paths:
        get(request.id)
        role_assignment_store.require_other_admin(store, user_id=request.id)
    row = get(request.id, store)
    name = row.name
    spec = convert.apply_mask(row, request, user_pb2.UserSpec, _UPDATABLE)
    if row.name != name:
        _require_free(row.name)
    if spec.disabled and not row.disabled:
        epoch_store.revoke(row.id)
    row.disabled = spec.disabled
    row.save()
    work.concerns("user", row.id, row.name)
    tables.changed("user", row.id, "")
    return message(row)


def delete(
    work: Mutation, request: user_service_pb2.DeleteUserRequest, store: database.Database
) -> user_pb2.User:
    """Delete a user with its roles and credentials; its tokens end."""
    get(request.id)
    role_assignment_store.require_other_admin(store, user_id=request.id)
    row = get(request.id, store)
    convert.require_version(row, request.resource_version)
    for table, type_ in (
        (RoleAssignment, "role_assignment"),
        (ApplicationCredential, "application_credential"),
    ):
        for held in table.select().where(table.user_id == row.id):
            tables.changed(type_, held.id, held.project_id, "DELETED")
        table.delete().where(table.user_id == row.id).execute()
    epoch_store.revoke(row.id)
    row.delete_instance()
    row.delete_time = database.now()
    work.concerns("user", row.id, row.name)
    tables.changed("user", row.id, "", "DELETED")
    return message(row)


def change_password(
    work: Mutation,
    request: user_service_pb2.ChangePasswordRequest,
    store: database.Database,
    proved: str | None,
    password_hash: str,
) -> user_pb2.User:
    """Set a password; the user's tokens end.

    Args:
        proved: the hash that the current password was found to match; "" if it matched none, None
            if it need not.

    Raises:
        errors.Unauthenticated: BAD_CREDENTIALS.
    """
    row = get(_target(work, request.user_id), store)
    if proved is not None and proved != row.password_hash:
        raise login_store.bad_credentials()
    row.password_hash = password_hash
    row.version += 1
    row.update_time = database.now()
    row.save()
    epoch_store.revoke(row.id)
    work.concerns("user", row.id, row.name)
    tables.changed("user", row.id, "")
    return message(row)


def revoke_tokens(work: Mutation, request: user_service_pb2.RevokeTokensRequest) -> user_pb2.User:
    """End a user's tokens."""
    row = get(_target(work, request.user_id))
    epoch_store.revoke(row.id)
    work.concerns("user", row.id, row.name)
    return message(row)


def _target(work: Mutation, user_id: str) -> str:
    """Return whose password or tokens are meant: one's own, or an administrator's choice.

    Raises:
        errors.PermissionDenied: ROLE_REQUIRED.
    """
    if user_id and user_id != work.caller.user_id:
        work.caller.require_system(options_pb2.Rule.ROLE_ADMIN, "doing this for somebody else")
    return user_id or work.caller.user_id


def list_page(
    caller: auth.Caller, request: user_service_pb2.ListUsersRequest
) -> user_service_pb2.ListUsersResponse:
    """Return a page of the users."""
    revision = shared.revision()
    page = listing.page(
        User,
        request,
        caller,
        fields={"id": User.id, "name": User.name, "disabled": User.disabled},
        visible=True,
    )
    return user_service_pb2.ListUsersResponse(
        users=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {row.id: message(row) for row in User.select().where(User.id.in_(found))}


def _require_free(name: str) -> None:
    if not name:
        raise errors.bad_field("name", "must be set")
    if User.select().where(User.name == name).exists():
        raise errors.AlreadyExists("USER_NAME_TAKEN", f"there is a user {name}", name=name)
