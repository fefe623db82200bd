"""Serves mcloud.compute.v1.QuotaService."""

from __future__ import annotations

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import quota_pb2, quota_service_pb2, quota_service_pb2_grpc
from mcloud_base import errors
from mcloud_controlplane.compute import quota_store
from mcloud_controlplane.core import auth
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame


class QuotaServicer(quota_service_pb2_grpc.QuotaServiceServicer):
    """Quotas of instances."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def GetQuota(
        self, request: quota_service_pb2.GetQuotaRequest, context: Context
    ) -> quota_pb2.Quota:
        """Return limits and usage."""
        project_id = request.project_id or auth.caller().project_id
        if not project_id or not auth.caller().sees(project_id):
            raise errors.NotFound("PROJECT_NOT_FOUND", f"there is no project {project_id}")
        return await self._database.read(quota_store.get, project_id)

    async def UpdateQuota(
        self, request: quota_service_pb2.UpdateQuotaRequest, context: Context
    ) -> operation_pb2.Operation:
        """Set limits."""
        return await self._frame.mutate(request, quota_store.update)
