"""What identity's records always are (core/invariants.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peewee

from mcloud_controlplane.core import invariants, tables
from mcloud_controlplane.core.invariants import Invariant, Violation
from mcloud_controlplane.identity import epoch_store
from mcloud_controlplane.identity.model import (
    ApplicationCredential,
    Project,
    RoleAssignment,
    User,
    shared,
)

_HELD: dict[str, Any] = {
    "role_assignment": RoleAssignment,
    "application_credential": ApplicationCredential,
}


def _without_holder(model: Any) -> Any:
    user = User.select(User.id).where(User.id == model.user_id)
    project = Project.select(Project.id).where(Project.id == model.project_id)
    exists: Any = peewee.fn.EXISTS
    return ~exists(user) | ((model.project_id != "") & ~exists(project))


def _held() -> Iterator[Violation]:
    for type_, model in _HELD.items():
        for row in model.select().where(_without_holder(model)).order_by(model.id):
            yield Violation(
                subject=row.id,
                owner_id=row.user_id,
                detail=f"the user or the project of this {type_.replace('_', ' ')} is not there",
            )


def _end(violation: Violation) -> bool:
    for type_, model in _HELD.items():
        this = (model.id == violation.subject) & _without_holder(model)
        row = model.get_or_none(this)
        if row is not None:
            epoch_store.revoke(row.id)  # of tokens that rest on it
            row.delete_instance()
            tables.changed(type_, row.id, row.project_id, "DELETED")
            return True
    return False


INVARIANTS = (
    Invariant("ROLE_WITHOUT_HOLDER", _held, _end, "end it, and the tokens that rest on it"),
    invariants.of_operations(shared, ()),
)
count = invariants.count_rows(User, Project, RoleAssignment, ApplicationCredential)
