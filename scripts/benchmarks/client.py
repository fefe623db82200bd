"""A client of a control plane: the administrator, over asynchronous stubs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import token_service_pb2, token_service_pb2_grpc
from mcloud_base import errors, ids, rpc

MessageT = TypeVar("MessageT", bound=Message)


class Reachable(Protocol):
    """A control plane that a client can reach, whoever runs it."""

    @property
    def public(self) -> str:
        """host:port of its public port."""

    @property
    def authority(self) -> Path:
        """The certificate that its own is signed by."""

    @property
    def password(self) -> str:
        """Of admin."""


class Client:
    """The administrator, over asynchronous stubs."""

    def __init__(self, plane: Reachable, channel: grpc.aio.Channel | None = None) -> None:
        self._plane = plane
        credentials = grpc.ssl_channel_credentials(plane.authority.read_bytes())
        self.channel = channel or rpc.channel(plane.public, credentials)
        self._tokens: dict[bool, str] = {}
        self.project_id = ""

    async def __aenter__(self) -> Client:
        """Log in, to the project and to the system."""
        for system in (False, True):
            await self.log_in(system=system)
        return self

    async def log_in(self, *, system: bool) -> None:
        """Take a token."""
        password = token_service_pb2.PasswordCredential(
            user_name="admin", password=self._plane.password
        )
        stub = token_service_pb2_grpc.TokenServiceStub(self.channel)
        request = token_service_pb2.CreateTokenRequest(
            password=password, project="" if system else "default", system=system
        )
        answer = await rpc.call(stub.CreateToken, request, timeout_s=30)
        self._tokens[system] = answer.token
        self.project_id = self.project_id or answer.claims.project_id

    async def __aexit__(self, *_: object) -> None:
        """Hang up."""
        await self.channel.close()

    def metadata(self, *, system: bool = False) -> Any:
        """Return what authorizes a call."""
        return rpc.bearer(self._tokens[system])

    async def call(
        self, method: Any, request: Any, *, system: bool = False, timeout_s: float = 30
    ) -> Any:
        """Call a method of a stub."""
        metadata = self.metadata(system=system)
        return await rpc.call(method, request, metadata=metadata, timeout_s=timeout_s)

    async def mutate(
        self, method: Any, request: Any, answer: type[MessageT], *, system: bool = False
    ) -> MessageT:
        """Call a method that returns an operation; wait for its end, return its response."""
        request.request_id = ids.request_id()
        operation = await self.call(method, request, system=system)
        operation = await self.ended(operation, system=system)
        response = answer()
        operation.response.Unpack(response)
        return response

    async def ended(
        self, operation: operation_pb2.Operation, *, system: bool = False
    ) -> operation_pb2.Operation:
        """Wait until an operation has succeeded.

        Raises:
            errors.Error: what it failed with.
        """
        states = operation_pb2.Operation
        if operation.state in (states.STATE_RUNNING, states.STATE_UNDOING):
            package = operation.method.strip("/").rpartition("/")[0].rpartition(".")[0]
            module = importlib.import_module(f"{package}.operation_service_pb2_grpc")
            request = operation_pb2.WaitOperationRequest(id=operation.id)
            request.timeout.FromSeconds(300)
            wait = module.OperationServiceStub(self.channel).WaitOperation
            operation = await self.call(wait, request, system=system, timeout_s=310)
        if operation.state != states.STATE_SUCCEEDED:
            raise errors.from_status(operation.error)
        return operation
