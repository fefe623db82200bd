"""Serves mcloud.identity.v1.ProjectService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import project_pb2, project_service_pb2, project_service_pb2_grpc
from mcloud_controlplane.core import auth, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.identity import project_store as store
from mcloud_controlplane.identity.model import shared


class ProjectServicer(project_service_pb2_grpc.ProjectServiceServicer):
    """Projects."""

    def __init__(self, database: Database, frame: Frame) -> None:
        self._database = database
        self._frame = frame

    async def CreateProject(
        self, request: project_service_pb2.CreateProjectRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        return await self._frame.mutate(request, store.create)

    async def GetProject(
        self, request: project_service_pb2.GetProjectRequest, context: Context
    ) -> project_pb2.Project:
        """Return one."""
        return await self._database.read_few(lambda: store.message(store.get(request.id)))

    async def ListProjects(
        self, request: project_service_pb2.ListProjectsRequest, context: Context
    ) -> project_service_pb2.ListProjectsResponse:
        """Return a page."""
        return await self._database.read(store.list_page, auth.caller(), request)

    async def WatchProjects(
        self, request: project_service_pb2.WatchProjectsRequest, context: Context
    ) -> AsyncIterator[project_service_pb2.WatchProjectsResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "project",
            project_pb2.Project,
            request,
            auth.caller(),
            store.load,
            everybody=True,
        ):
            yield project_service_pb2.WatchProjectsResponse(
                type=event.type, project=event.message, revision=event.revision
            )

    async def UpdateProject(
        self, request: project_service_pb2.UpdateProjectRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(
            request, lambda work, asked: store.update(work, asked, self._database)
        )

    async def DeleteProject(
        self, request: project_service_pb2.DeleteProjectRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(
            request, lambda work, asked: store.delete(work, asked, self._database)
        )
