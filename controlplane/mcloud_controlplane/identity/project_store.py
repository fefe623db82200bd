"""Projects in the database."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message
from google.rpc import error_details_pb2

from mcloud.identity.v1 import project_pb2, project_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation
from mcloud_controlplane.identity import epoch_store
from mcloud_controlplane.identity.model import (
    ApplicationCredential,
    Project,
    RoleAssignment,
    shared,
)

_UPDATABLE = ("name", "labels", "spec.description", "spec.disabled")


def message(row: Project) -> project_pb2.Project:
    """Return a project's row as its message."""
    return project_pb2.Project(
        metadata=convert.metadata(row), spec=project_pb2.ProjectSpec.FromString(bytes(row.spec))
    )


def get(id_: str, lock: database.Database | None = None) -> Project:
    """Return a project.

    Args:
        lock: the database, if the row is to be kept from changing.

    Raises:
        errors.NotFound: PROJECT_NOT_FOUND.
    """
    query = Project.select().where(Project.id == id_)
    row: Project | None = (lock.locked(query) if lock else query).first()
    if row is None:
        raise errors.NotFound("PROJECT_NOT_FOUND", f"there is no project {id_}", id=id_)
    return row


def create(
    work: Mutation, request: project_service_pb2.CreateProjectRequest
) -> project_pb2.Project:
    """Make a project."""
    _require_free(request.name)
    moment = database.now()
    row = Project.create(
        id=ids.new("p"),
        name=request.name,
        labels=dict(request.labels),
        create_time=moment,
        update_time=moment,
        spec=request.spec.SerializeToString(),
        disabled=request.spec.disabled,
    )
    work.concerns("project", row.id, row.name)
    tables.changed("project", row.id, "", "ADDED")
    return message(row)


def update(
    work: Mutation, request: project_service_pb2.UpdateProjectRequest, store: database.Database
) -> project_pb2.Project:
    """Change what the mask names. Disabling ends the tokens for the project."""
    row = get(request.id, store)
    name = row.name
    spec = convert.apply_mask(row, request, project_pb2.ProjectSpec, _UPDATABLE)
    if row.name != name:
        _require_free(row.name)
    if spec.disabled and not row.disabled:
        epoch_store.revoke(row.id)
    row.disabled = spec.disabled
    row.save()
    work.concerns("project", row.id, row.name)
    tables.changed("project", row.id, "")
    return message(row)


def delete(
    work: Mutation, request: project_service_pb2.DeleteProjectRequest, store: database.Database
) -> project_pb2.Project:
    """Delete a project that nobody has a role in.

    Raises:
        errors.WrongState: PROJECT_IN_USE.
    """
    row = get(request.id, store)
    convert.require_version(row, request.resource_version)
    held = list(
        RoleAssignment.select(RoleAssignment.id)
        .where(RoleAssignment.project_id == row.id)
        .order_by(RoleAssignment.id)
        .limit(20)
    )
    if held:
        names = ", ".join(assignment.id for assignment in held)
        violation = error_details_pb2.PreconditionFailure.Violation(
            type="ROLE_ASSIGNMENT", subject=row.id, description=f"role assignments {names}"
        )
        raise errors.WrongState(
            "PROJECT_IN_USE",
            f"somebody has a role in project {row.name}; delete the role assignments first: "
            f"{names}",
            details=(error_details_pb2.PreconditionFailure(violations=[violation]),),
            id=row.id,
        )
    credential = ApplicationCredential
    for left in credential.select().where(credential.project_id == row.id):
        tables.changed("application_credential", left.id, row.id, "DELETED")
    credential.delete().where(credential.project_id == row.id).execute()
    epoch_store.revoke(row.id)
    row.delete_instance()
    row.delete_time = database.now()
    work.concerns("project", row.id, row.name)
    tables.changed("project", row.id, "", "DELETED")
    return message(row)


def list_page(
    caller: auth.Caller, request: project_service_pb2.ListProjectsRequest
) -> project_service_pb2.ListProjectsResponse:
    """Return a page of the projects."""
    revision = shared.revision()
    page = listing.page(
        Project,
        request,
        caller,
        fields={"id": Project.id, "name": Project.name, "disabled": Project.disabled},
        visible=True,
    )
    return project_service_pb2.ListProjectsResponse(
        projects=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {row.id: message(row) for row in Project.select().where(Project.id.in_(found))}


def _require_free(name: str) -> None:
    if not name:
        raise errors.bad_field("name", "must be set")
    if Project.select().where(Project.name == name).exists():
        raise errors.AlreadyExists("PROJECT_NAME_TAKEN", f"there is a project {name}", name=name)
