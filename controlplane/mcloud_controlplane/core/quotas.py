"""Quotas: reading and setting a project's limits, and the QuotaService that packages have.

What a limit is of is counted from rows, under the lock of the project's row: see each package's
quota_store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mcloud.common.v1 import operation_pb2
from mcloud_base import errors
from mcloud_controlplane.core import auth
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame, Mutation


@dataclass(frozen=True)
class Quotas:
    """The quotas of one package.

    Args:
        table: a row for each project whose limits were asked for; its defaults are the others'.
        message: the package's Quota. Limits, use and columns have the same names.
        usage: counts what a project has.
    """

    table: Any
    message: Any
    usage: Callable[[str], Mapping[str, int]]

    def lock(self, project_id: str) -> Any:
        """Return a project's row, and hold it until the commit."""
        row = self.table.find_locked(project_id)
        if row is None:
            self.table.insert(project_id=project_id).on_conflict_ignore().execute()
            row = self.table.find_locked(project_id)
        return row

    def get(self, project_id: str) -> Any:
        """Return limits and usage; a project without a row has the defaults."""
        row = self.table.get_or_none(self.table.project_id == project_id)
        return self._message(row or self.table(project_id=project_id))

    def update(self, work: Mutation, request: Any) -> Any:
        """Set limits.

        Raises:
            errors.InvalidArgument: BAD_UPDATE_MASK.
        """
        fields = [field.name for field in request.limits.DESCRIPTOR.fields]
        paths = [path.removeprefix("limits.") for path in request.update_mask.paths]
        if not paths or any(path not in fields for path in paths):
            raise errors.InvalidArgument(
                "BAD_UPDATE_MASK", f"update_mask may name {', '.join(fields)}"
            )
        row = self.lock(request.project_id)
        for path in paths:
            setattr(row, path, getattr(request.limits, path))
        row.save()
        work.concerns("quota", request.project_id, "", request.project_id)
        return self._message(row)

    def _message(self, row: Any) -> Any:
        used = self.usage(row.project_id)
        limits = {name: getattr(row, name) for name in used}
        return self.message(project_id=row.project_id, limits=limits, usage=used)


class QuotaServicer:
    """Serves `mcloud.<domain>.v1.QuotaService` over one database."""

    def __init__(self, database: Database, frame: Frame, quotas: Quotas) -> None:
        self._database = database
        self._frame = frame
        self._quotas = quotas

    async def GetQuota(self, request: Any, context: auth.Context) -> Any:
        """Return limits and usage."""
        project_id = request.project_id or auth.caller().project_id
        if not project_id or not auth.caller().sees(project_id):
            raise errors.NotFound("PROJECT_NOT_FOUND", f"there is no project {project_id}")
        return await self._database.read(self._quotas.get, project_id)

    async def UpdateQuota(self, request: Any, context: auth.Context) -> operation_pb2.Operation:
        """Set limits."""
        return await self._frame.mutate(request, self._quotas.update)
