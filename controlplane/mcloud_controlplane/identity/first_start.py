"""What a new deployment begins with: a project, and an administrator who can log in."""

from __future__ import annotations

import secrets
from pathlib import Path

import structlog

from mcloud.common.v1 import options_pb2
from mcloud.identity.v1 import project_pb2, role_assignment_pb2, user_pb2
from mcloud_base import ids, tls
from mcloud_controlplane.core import database, tables
from mcloud_controlplane.identity import passwords
from mcloud_controlplane.identity.model import Project, RoleAssignment, User, shared

log = structlog.get_logger()

ADMIN = options_pb2.Rule.ROLE_ADMIN


def ensure_administrator(store: database.Database, password_file: Path) -> None:
    """Make project "default" and user "admin", unless there is a user. Within a unit.

    The password's file is written before the commit, under the lock: a process that is killed in
    between leaves a file that the next one reads, never an administrator whom nobody can be.
    """
    list(store.locked(shared.deployment.select()))
    if User.select().exists():
        return
    if password_file.exists():
        password = password_file.read_text().strip()
    else:
        password = secrets.token_urlsafe(18)
        tls.write_private(password_file, f"{password}\n".encode())
    moment = database.now()
    times = {"create_time": moment, "update_time": moment}
    project = Project.create(
        id=ids.new("p"), name="default", spec=project_pb2.ProjectSpec().SerializeToString(), **times
    )
    tables.changed("project", project.id, "", "ADDED")
    user = User.create(
        id=ids.new("u"),
        name="admin",
        spec=user_pb2.UserSpec(description="the first administrator").SerializeToString(),
        password_hash=passwords.hash_now(password),
        **times,
    )
    tables.changed("user", user.id, "", "ADDED")
    for project_id in ("", project.id):
        spec = role_assignment_pb2.RoleAssignmentSpec(
            user_id=user.id, project_id=project_id, role=ADMIN
        )
        assignment = RoleAssignment.create(
            id=ids.new("ra"),
            project_id=project_id,
            user_id=user.id,
            role=ADMIN,
            spec=spec.SerializeToString(),
            **times,
        )
        tables.changed("role_assignment", assignment.id, project_id, "ADDED")
    database.unit().after_commit.append(
        lambda: log.info("first administrator made", user="admin", password_file=str(password_file))
    )
