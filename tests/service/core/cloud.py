"""A whole control plane in a process of its own, and callers of every kind."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor, duration_pb2, message_factory

from mcloud.common.v1 import operation_pb2, options_pb2
from mcloud.identity.v1 import (
    project_service_pb2,
    project_service_pb2_grpc,
    role_assignment_service_pb2,
    role_assignment_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
    user_service_pb2,
    user_service_pb2_grpc,
)
from mcloud_base import endpoints, errors, ids, rpc, tls
from mcloud_controlplane.core import pki
from mcloud_controlplane.settings import SERVICES

Rule = options_pb2.Rule
PASSWORD = "correct horse battery"
_START_S = 120
_END_S = 60


@dataclass(frozen=True)
class ControlPlane:
    """A running one. `database` is of its settings."""

    state_dir: Path
    public: str
    internal: str
    database: str
    pids: list[int] = field(default_factory=list)  # its process, and those before it

    @property
    def log(self) -> Path:
        return self.state_dir.parent / "log"

    def authority(self) -> pki.Authority:
        return pki.Authority(self.state_dir / "pki")


def run(
    directory: Path, ports: list[int], database: str, **settings: Any
) -> Iterator[ControlPlane]:
    """Start one; end it by SIGTERM, cleanly. A further one has the first's `state_dir`."""
    state_dir = Path(settings.get("state_dir", directory / "state"))
    made = ControlPlane(state_dir, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", database)
    values = {
        **settings,
        "state_dir": str(made.state_dir),
        "public_listen": made.public,
        "internal_listen": made.internal,
        "database": database,
    }
    config = directory / "controlplane.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    log = directory / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mcloud_controlplane", "--config", config],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    made.pids.append(process.pid)
    try:
        end = time.monotonic() + _START_S
        while b"control plane serves" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)  # its log is all that tells
        yield made
        process.send_signal(signal.SIGTERM)
        assert process.wait(_END_S) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Client:
    """Someone who calls; the administrator unless another is named."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        authority = plane.authority()
        self.public = rpc.channel(plane.public, grpc.ssl_channel_credentials(authority.certificate))
        self._opened = [self.public]
        self._tokens: dict[tuple[str, str], rpc.Metadata] = {}

    async def close(self) -> None:
        for channel in self._opened:
            await channel.close(None)

    def as_service(self, name: str = "compute") -> grpc.aio.Channel:
        return self._internal(self.plane.authority().issue_service(name, ()))

    def as_host(self, host_id: str = "") -> grpc.aio.Channel:
        authority, key = self.plane.authority(), tls.new_key()
        host_id = host_id or ids.new("h")
        certificate = authority.issue_host(tls.signing_request(key, host_id), host_id, "127.0.0.1")
        return self._internal(tls.Identity(key, pki._pem(certificate), authority.certificate))

    def _internal(self, identity: tls.Identity) -> grpc.aio.Channel:
        channel = rpc.channel(
            self.plane.internal, identity.channel_credentials(), server_name=endpoints.SERVICE_NAME
        )
        self._opened.append(channel)
        return channel

    async def login(self, user: str = "admin", project: str = "") -> rpc.Metadata:
        """Return a token's metadata: for a project, or (empty) for the system."""
        if (user, project) not in self._tokens:
            password = PASSWORD
            if user == "admin":
                password = (self.plane.state_dir / "admin-password").read_text().strip()
            answer = await rpc.call(
                token_service_pb2_grpc.TokenServiceStub(self.public).CreateToken,
                token_service_pb2.CreateTokenRequest(
                    password=token_service_pb2.PasswordCredential(
                        user_name=user, password=password
                    ),
                    project=project,
                    system=not project,
                ),
                timeout_s=60,
            )
            self._tokens[user, project] = rpc.bearer(answer.token)
        return self._tokens[user, project]

    async def make_user(self, name: str, role: Any, project: str = "") -> rpc.Metadata:
        """Make a user with a role in a project (made, too, if it is not there) or on the system."""
        system = await self.login()
        project_id = ""
        if project:
            request = project_service_pb2.CreateProjectRequest(
                request_id=ids.request_id(), name=project
            )
            request.spec.SetInParent()
            projects = project_service_pb2_grpc.ProjectServiceStub(self.public)
            try:
                made = await rpc.call(projects.CreateProject, request, metadata=system)
                project_id = made.resource.id
            except errors.AlreadyExists:
                listing = project_service_pb2.ListProjectsRequest(filter=f'name="{project}"')
                found = await rpc.call(projects.ListProjects, listing, metadata=system)
                project_id = found.projects[0].metadata.id
        user = user_service_pb2.CreateUserRequest(
            request_id=ids.request_id(), name=name, password=PASSWORD
        )
        user.spec.SetInParent()
        users = user_service_pb2_grpc.UserServiceStub(self.public)
        operation = await rpc.call(users.CreateUser, user, metadata=system, timeout_s=60)
        assignment = role_assignment_service_pb2.CreateRoleAssignmentRequest(
            request_id=ids.request_id()
        )
        assignment.spec.user_id = operation.resource.id
        assignment.spec.role = role
        assignment.spec.project_id = project_id
        roles = role_assignment_service_pb2_grpc.RoleAssignmentServiceStub(self.public)
        await rpc.call(roles.CreateRoleAssignment, assignment, metadata=system)
        return await self.login(name, project)


async def refused(call: Awaitable[Any]) -> errors.Error:
    with pytest.raises(errors.Error) as caught:
        await call
    return caught.value


async def wait(operations: Any, id_: str, who: rpc.Metadata) -> operation_pb2.Operation:
    """Wait for an operation's end."""
    request = operation_pb2.WaitOperationRequest(id=id_, timeout=duration_pb2.Duration(seconds=60))
    found: operation_pb2.Operation = await rpc.call(
        operations.WaitOperation, request, metadata=who, timeout_s=70
    )
    return found


def unpack(operation: operation_pb2.Operation, kind: Any) -> Any:
    message = kind()
    assert operation.response.Unpack(message), operation
    return message


def rpcs() -> list[descriptor.MethodDescriptor]:
    """Return every rpc of the contract."""
    found = []
    for service in SERVICES:
        package = importlib.import_module(f"mcloud.{service}.v1")
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith("_pb2"):
                file = importlib.import_module(f"{package.__name__}.{module.name}").DESCRIPTOR
                for each in file.services_by_name.values():
                    found += each.methods
    assert len(found) > 100
    return found


def rule(method: descriptor.MethodDescriptor) -> Rule:
    return method.GetOptions().Extensions[options_pb2.rule]


def path(method: descriptor.MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def stub(channel: Any, method: descriptor.MethodDescriptor) -> Any:
    """Return the callable for an rpc, of whichever of the four forms it is."""
    forms = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    answer: Any = message_factory.GetMessageClass(method.output_type)
    return forms[method.client_streaming, method.server_streaming](
        path(method),
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )


def new_request(method: descriptor.MethodDescriptor) -> Any:
    return message_factory.GetMessageClass(method.input_type)()
