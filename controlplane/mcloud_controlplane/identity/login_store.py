"""What a login is decided by, in the database: users, credentials, roles, failed attempts."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from mcloud.common.v1 import options_pb2
from mcloud_base import errors
from mcloud_controlplane.core import database
from mcloud_controlplane.identity import epoch_store
from mcloud_controlplane.identity.model import (
    ApplicationCredential,
    Attempt,
    Project,
    RoleAssignment,
    User,
)
from mcloud_controlplane.identity.passwords import too_many_attempts

Rule = options_pb2.Rule

_FREE_FAILURES = 5  # further ones make wait: 1 s, 2 s, 4 s …
_LONGEST_WAIT_S = 60
_FORGET_US = 15 * 60 * 1_000_000


@dataclass(frozen=True)
class Grant:
    """Whom a token is for, where, and on what it rests."""

    principal_id: str
    user_id: str
    user_name: str
    project_id: str
    project_name: str
    role: int
    system: bool
    epochs: dict[str, int]
    expire_time: int | None = None  # the token's, if sooner than usual


def find_user(name: str) -> User | None:
    """Return the user of a name, with its epoch, or None; refuse a name that must wait.

    Raises:
        errors.Exhausted: TOO_MANY_ATTEMPTS.
    """
    attempt = Attempt.get_or_none(Attempt.name_hash == digest(name))
    if attempt is not None:
        wait_s = (attempt.not_before - database.now()) / 1e6
        if 0 < wait_s <= _LONGEST_WAIT_S:  # longer: the clock was set back
            raise too_many_attempts(wait_s + 0.5)
    found: User | None = epoch_store.find(User, User.name == name)
    return found


def record_failure(store: database.Database, name: str) -> None:
    """Count a failed attempt under a name, and make the next one wait if there were many."""
    moment = database.now()
    Attempt.insert(
        name_hash=digest(name), failure_count=0, time=moment, not_before=0
    ).on_conflict_ignore().execute()
    row = store.locked(Attempt.select().where(Attempt.name_hash == digest(name))).get()
    count = row.failure_count + 1 if row.time > moment - _FORGET_US else 1
    wait_s = 0
    if count >= _FREE_FAILURES:
        wait_s = min(1 << min(count - _FREE_FAILURES, 30), _LONGEST_WAIT_S)
    Attempt.update(failure_count=count, time=moment, not_before=moment + wait_s * 1_000_000).where(
        Attempt.name_hash == row.name_hash
    ).execute()


def has_failures(name: str) -> bool:
    """Tell whether failed attempts are known under a name."""
    return bool(Attempt.select().where(Attempt.name_hash == digest(name)).exists())


def forget_failures(name: str) -> None:
    """Start counting anew, after a success."""
    Attempt.delete().where(Attempt.name_hash == digest(name)).execute()


def forget_old_failures() -> None:
    """Delete what no longer counts."""
    Attempt.delete().where(Attempt.time < database.now() - _FORGET_US).execute()


def grant_user(user: User, project: str, system: bool) -> Grant:
    """Decide what a user, who has proved to be it, gets a token for.

    Args:
        user: with its epoch of when the password was read.
        project: name or id; empty for the only one.

    Raises:
        errors.PermissionDenied: NO_ROLE.
        errors.InvalidArgument: PROJECT_REQUIRED.
    """
    if system:
        assignment = _highest(user.id, "")
        if assignment is None:
            raise errors.PermissionDenied("NO_ROLE", f"{user.name} has no role on the system")
        epochs = {user.id: user.epoch, assignment.id: assignment.epoch}
        return Grant(user.id, user.id, user.name, "", "", assignment.role, True, epochs)
    return _grant_project(user, _find_project(project) if project else _only_project(user), project)


def grant_credential(id_: str, secret: str, project: str, system: bool) -> Grant:
    """Decide what the holder of an application credential's secret gets a token for.

    Raises:
        errors.Unauthenticated: BAD_CREDENTIALS.
        errors.PermissionDenied: NO_ROLE.
    """
    credential = epoch_store.find(ApplicationCredential, ApplicationCredential.id == id_)
    known = credential.secret_hash if credential else ""
    if credential is None or not hmac.compare_digest(known, digest(secret)):
        raise bad_credentials()
    if credential.expire_time is not None and credential.expire_time <= database.now():
        raise bad_credentials()
    user = epoch_store.find(User, User.id == credential.user_id)
    if user is None or user.disabled:
        raise bad_credentials()
    own = _find_project(credential.project_id)
    if system or own is None or project not in ("", own.id, own.name):
        raise errors.PermissionDenied(
            "NO_ROLE", "an application credential is good in its own project only"
        )
    grant = _grant_project(user, own, own.name)
    return Grant(
        principal_id=credential.id,
        user_id=user.id,
        user_name=user.name,
        project_id=grant.project_id,
        project_name=grant.project_name,
        role=min(credential.role, grant.role) if credential.role else grant.role,
        system=False,
        epochs={**grant.epochs, credential.id: credential.epoch},
        expire_time=credential.expire_time,
    )


def digest(secret: str) -> str:
    """Return the hash of a random secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def bad_credentials() -> errors.Unauthenticated:
    """Return the one answer to all that is wrong with a login."""
    return errors.Unauthenticated("BAD_CREDENTIALS", "the name or the secret is wrong")


def _grant_project(user: User, project: Project | None, wanted: str) -> Grant:
    assignment = _highest(user.id, project.id) if project and not project.disabled else None
    if project is None or assignment is None:
        # The same for a project that does not exist: names of others' projects are not told.
        raise errors.PermissionDenied(
            "NO_ROLE",
            f"{user.name} has no role in a project {wanted}"
            if wanted
            else f"{user.name} has no role in any project; a role on the system needs --system",
        )
    epochs = {
        user.id: user.epoch,
        project.id: project.epoch,
        assignment.id: assignment.epoch,
    }
    return Grant(
        user.id, user.id, user.name, project.id, project.name, assignment.role, False, epochs
    )


def _highest(user_id: str, project_id: str) -> RoleAssignment | None:
    """Return a user's highest role somewhere, with its epoch."""
    mine = (RoleAssignment.user_id == user_id) & (RoleAssignment.project_id == project_id)
    best = (
        RoleAssignment.select(RoleAssignment.id)
        .where(mine)
        .order_by(RoleAssignment.role.desc())
        .limit(1)
    )
    found: RoleAssignment | None = epoch_store.find(RoleAssignment, RoleAssignment.id.in_(best))
    return found


def _find_project(wanted: str) -> Project | None:
    found: Project | None = epoch_store.find(Project, Project.id == wanted)
    return found or epoch_store.find(Project, Project.name == wanted)


def _only_project(user: User) -> Project | None:
    mine = RoleAssignment.select(RoleAssignment.project_id).where(RoleAssignment.user_id == user.id)
    rows = list(
        Project.select(Project.id, Project.name)
        .where(Project.id.in_(mine) & ~Project.disabled)
        .order_by(Project.name)
        .limit(20)
    )
    if len(rows) > 1:
        raise errors.InvalidArgument(
            "PROJECT_REQUIRED",
            f"say which project: {', '.join(row.name for row in rows)}",
        )
    return _find_project(rows[0].id) if rows else None
