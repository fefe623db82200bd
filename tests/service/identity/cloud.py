"""Clients of a control plane of identity alone, on real ports over TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from mcloud.common.v1 import options_pb2
from mcloud.identity.v1 import (
    application_credential_service_pb2_grpc,
    endpoint_service_pb2_grpc,
    enrolment_service_pb2_grpc,
    operation_service_pb2_grpc,
    project_pb2,
    project_service_pb2,
    project_service_pb2_grpc,
    role_assignment_pb2,
    role_assignment_service_pb2,
    role_assignment_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
    user_pb2,
    user_service_pb2,
    user_service_pb2_grpc,
)
from mcloud_base import endpoints, errors, ids, rpc, tls
from mcloud_controlplane.core.runtime import Runtime
from mcloud_controlplane.settings import Settings

Role = options_pb2.Rule
PASSWORD = "correct horse"


class Stubs:
    """Every service of identity over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.token = token_service_pb2_grpc.TokenServiceStub(channel)
        self.user = user_service_pb2_grpc.UserServiceStub(channel)
        self.project = project_service_pb2_grpc.ProjectServiceStub(channel)
        self.role = role_assignment_service_pb2_grpc.RoleAssignmentServiceStub(channel)
        self.credential = application_credential_service_pb2_grpc.ApplicationCredentialServiceStub(
            channel
        )
        self.enrolment = enrolment_service_pb2_grpc.EnrolmentServiceStub(channel)
        self.endpoint = endpoint_service_pb2_grpc.EndpointServiceStub(channel)
        self.operation = operation_service_pb2_grpc.OperationServiceStub(channel)


class Cloud:
    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.settings = settings
        self.runtime = runtime
        self.public = Stubs(
            rpc.channel(
                settings.public_listen,
                grpc.ssl_channel_credentials(runtime.authority.certificate),
            )
        )
        # As a service that runs elsewhere would call.
        self.service = self.internal(runtime.authority.issue_service("compute", ()))
        self.admin_password = (settings.state_dir / "admin-password").read_text().strip()

    def internal(self, identity: tls.Identity) -> Stubs:
        return Stubs(
            rpc.channel(
                self.settings.internal_listen,
                identity.channel_credentials(),
                server_name=endpoints.SERVICE_NAME,
            )
        )

    async def close(self) -> None:
        for stubs in (self.public, self.service):
            await stubs.channel.close(None)

    async def login(
        self, name: str = "admin", password: str = "", **scope: Any
    ) -> token_service_pb2.CreateTokenResponse:
        credential = token_service_pb2.PasswordCredential(
            user_name=name,
            password=password or (self.admin_password if name == "admin" else PASSWORD),
        )
        return await rpc.call(
            self.public.token.CreateToken,
            token_service_pb2.CreateTokenRequest(password=credential, **scope),
        )

    async def admin(self) -> rpc.Metadata:
        return rpc.bearer((await self.login(system=True)).token)

    async def as_user(self, name: str, **scope: Any) -> rpc.Metadata:
        return rpc.bearer((await self.login(name, **scope)).token)

    async def make_user(self, admin: rpc.Metadata, name: str, **values: Any) -> user_pb2.User:
        request = user_service_pb2.CreateUserRequest(
            request_id=ids.request_id(),
            name=name,
            spec=user_pb2.UserSpec(email=f"{name}@example.org"),
            password=PASSWORD,
            **values,
        )
        return unpack(
            await rpc.call(self.public.user.CreateUser, request, metadata=admin), user_pb2.User
        )

    async def make_project(self, admin: rpc.Metadata, name: str) -> project_pb2.Project:
        request = project_service_pb2.CreateProjectRequest(
            request_id=ids.request_id(), name=name, spec=project_pb2.ProjectSpec()
        )
        request.spec.SetInParent()
        return unpack(
            await rpc.call(self.public.project.CreateProject, request, metadata=admin),
            project_pb2.Project,
        )

    async def assign(
        self, admin: rpc.Metadata, user_id: str, project_id: str, role: Any
    ) -> role_assignment_pb2.RoleAssignment:
        request = role_assignment_service_pb2.CreateRoleAssignmentRequest(
            request_id=ids.request_id(),
            spec=role_assignment_pb2.RoleAssignmentSpec(
                user_id=user_id, project_id=project_id, role=role
            ),
        )
        return unpack(
            await rpc.call(self.public.role.CreateRoleAssignment, request, metadata=admin),
            role_assignment_pb2.RoleAssignment,
        )


def unpack(operation: Any, kind: Any) -> Any:
    message = kind()
    assert operation.response.Unpack(message), operation
    return message


async def refused(call: Awaitable[Any]) -> errors.Error:
    with pytest.raises(errors.Error) as caught:
        await call
    return caught.value


async def eventually(attempt: Callable[[], Awaitable[Any]], timeout_s: float = 15) -> Any:
    """Repeat until it returns something true; the time between is the event loop's own."""
    async with asyncio.timeout(timeout_s):
        while not (found := await attempt()):
            await asyncio.sleep(0.02)
        return found
