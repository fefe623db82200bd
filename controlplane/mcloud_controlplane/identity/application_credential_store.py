"""Application credentials in the database; of a secret only its hash."""

from __future__ import annotations

import secrets

from mcloud.common.v1 import options_pb2
from mcloud.identity.v1 import application_credential_pb2, application_credential_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Frame, Mutation
from mcloud_controlplane.identity import epoch_store, login_store
from mcloud_controlplane.identity.enrolment_store import already_issued
from mcloud_controlplane.identity.model import ApplicationCredential, User, shared

Rule = options_pb2.Rule


def message(row: ApplicationCredential) -> application_credential_pb2.ApplicationCredential:
    """Return a credential's row as its message."""
    return application_credential_pb2.ApplicationCredential(
        metadata=convert.metadata(row),
        spec=application_credential_pb2.ApplicationCredentialSpec.FromString(bytes(row.spec)),
    )


def get(caller: auth.Caller, id_: str) -> ApplicationCredential:
    """Return a credential of the caller in its project; with a role on the system, anyone's.

    Raises:
        errors.NotFound: APPLICATION_CREDENTIAL_NOT_FOUND.
    """
    row: ApplicationCredential | None = ApplicationCredential.get_or_none(
        ApplicationCredential.id == id_
    )
    mine = row is not None and (row.user_id, row.project_id) == (caller.user_id, caller.project_id)
    if row is None or not (mine or caller.system):
        raise errors.NotFound(
            "APPLICATION_CREDENTIAL_NOT_FOUND", f"there is no application credential {id_}", id=id_
        )
    return row


def create(
    frame: Frame,
    store: database.Database,
    caller: auth.Caller,
    method: str,
    request: application_credential_service_pb2.CreateApplicationCredentialRequest,
) -> application_credential_service_pb2.CreateApplicationCredentialResponse:
    """Make a credential of the caller; its secret exists in the answer only.

    Raises:
        errors.PermissionDenied: NO_PROJECT, PASSWORD_REQUIRED, ROLE_REQUIRED.
        errors.AlreadyExists: ALREADY_ISSUED, CREDENTIAL_NAME_TAKEN.
    """
    if not caller.project_id:
        raise errors.PermissionDenied("NO_PROJECT", "log in to a project first")
    if caller.principal_id != caller.user_id:
        # Otherwise whoever steals one that expires could make one that does not.
        raise errors.PermissionDenied(
            "PASSWORD_REQUIRED", "log in with a password to make application credentials"
        )
    made = ids.new("cred")
    if earlier := frame.accept(caller, method, request, made):
        raise already_issued(earlier)
    spec = application_credential_pb2.ApplicationCredentialSpec()
    spec.CopyFrom(request.spec)
    spec.user_id = caller.user_id
    if spec.role > caller.role:
        raise errors.PermissionDenied(
            "ROLE_REQUIRED", "a credential has at most the role that you have in the project"
        )
    moment = database.now()
    expire_time = None
    if spec.HasField("expire_time"):
        expire_time = convert.microseconds(spec.expire_time)
        if expire_time <= moment:
            raise errors.bad_field("spec.expire_time", "must be in the future")
    # Locked: the user is not deleted before its credential is there to be deleted with it.
    if store.locked(User.select().where(User.id == caller.user_id)).first() is None:
        raise errors.Unauthenticated("TOKEN_REVOKED", "the token has been revoked; log in again")
    _require_free(caller, request.name)
    secret = secrets.token_urlsafe(32)
    row = ApplicationCredential.create(
        id=made,
        name=request.name,
        project_id=caller.project_id,
        create_time=moment,
        update_time=moment,
        spec=spec.SerializeToString(),
        user_id=caller.user_id,
        role=spec.role,
        secret_hash=login_store.digest(secret),
        expire_time=expire_time,
    )
    tables.changed("application_credential", row.id, row.project_id, "ADDED")
    return application_credential_service_pb2.CreateApplicationCredentialResponse(
        application_credential=message(row), secret=secret
    )


def delete(
    work: Mutation, request: application_credential_service_pb2.DeleteApplicationCredentialRequest
) -> application_credential_pb2.ApplicationCredential:
    """Delete a credential; its tokens end. A credential may delete itself, not others."""
    row = get(work.caller, request.id)
    if row.user_id != work.caller.user_id:
        work.caller.require_system(Rule.ROLE_ADMIN, "deleting somebody else's credential")
    if work.caller.principal_id not in (work.caller.user_id, row.id):
        raise errors.PermissionDenied(
            "PASSWORD_REQUIRED", "log in with a password to delete other application credentials"
        )
    convert.require_version(row, request.resource_version)
    epoch_store.revoke(row.id)
    row.delete_instance()
    row.delete_time = database.now()
    work.concerns("application_credential", row.id, row.name, row.project_id)
    tables.changed("application_credential", row.id, row.project_id, "DELETED")
    return message(row)


def list_page(
    caller: auth.Caller,
    request: application_credential_service_pb2.ListApplicationCredentialsRequest,
) -> application_credential_service_pb2.ListApplicationCredentialsResponse:
    """Return a page: the caller's in its project, or with all_projects everybody's."""
    revision = shared.revision()
    table = ApplicationCredential
    page = listing.page(
        table,
        request,
        caller,
        fields={"id": table.id, "name": table.name},
        where=None if request.all_projects else table.user_id == caller.user_id,
    )
    return application_credential_service_pb2.ListApplicationCredentialsResponse(
        application_credentials=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def _require_free(caller: auth.Caller, name: str) -> None:
    table = ApplicationCredential
    if (
        table.select()
        .where(
            (table.user_id == caller.user_id)
            & (table.project_id == caller.project_id)
            & (table.name == name)
        )
        .exists()
    ):
        raise errors.AlreadyExists(
            "CREDENTIAL_NAME_TAKEN", f"you have an application credential {name}", name=name
        )
