"""What the simulator asks for as an administrator: join tokens, and the removal of its hosts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from mcloud.common.v1 import operation_pb2
from mcloud.compute.v1 import host_pb2, host_service_pb2, host_service_pb2_grpc
from mcloud.identity.v1 import (
    enrolment_service_pb2,
    enrolment_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
)
from mcloud_base import errors, ids, rpc

_TIMEOUT_S = 60.0
_RENEWED_BEFORE_S = 60.0


@dataclass(frozen=True)
class Login:
    """Who asks: a token, or a user with a password. `authority` is PEM; None: the system's."""

    endpoint: str
    authority: bytes | None = None
    user_name: str = ""
    password: str = ""
    token: str = ""


class Administrator:
    """Calls to the public port, for the whole system. Use `async with`."""

    def __init__(self, login: Login) -> None:
        self._login = login
        credentials = grpc.ssl_channel_credentials(login.authority)
        self._channel = rpc.channel(login.endpoint, credentials)
        self._token = ""
        self._token_end = 0.0  # seconds since 1970

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close(None)

    async def join_token(self, name: str) -> str:
        """Return the secret of a new join token.

        Raises:
            Unauthenticated: NOT_LOGGED_IN, BAD_CREDENTIALS. PermissionDenied.
        """
        stub = enrolment_service_pb2_grpc.EnrolmentServiceStub(self._channel)
        answer = await self._call(
            stub.CreateJoinToken,
            enrolment_service_pb2.CreateJoinTokenRequest(request_id=ids.request_id(), name=name),
        )
        return str(answer.secret)

    async def delete_host(self, host_id: str) -> bool:
        """Delete a host, or disable it if it carries something; tell whether it is gone."""
        stub = host_service_pb2_grpc.HostServiceStub(self._channel)
        try:
            await self._mutate(stub.DeleteHost, host_service_pb2.DeleteHostRequest(id=host_id))
        except errors.NotFound:  # it has never reported, or was deleted by others
            return True
        except errors.WrongState as error:
            if error.reason != "HOST_IN_USE":
                raise
            await self._mutate(
                stub.UpdateHost,
                host_service_pb2.UpdateHostRequest(
                    id=host_id,
                    update_mask=FieldMask(paths=["spec.disabled", "spec.disabled_reason"]),
                    spec=host_pb2.HostSpec(
                        disabled=True, disabled_reason="the simulator no longer plays it"
                    ),
                ),
            )
            return False
        return True

    async def _mutate(self, method: Any, request: Any) -> None:
        request.request_id = ids.request_id()
        operation: operation_pb2.Operation = await self._call(method, request)
        if operation.state == operation_pb2.Operation.STATE_FAILED:
            raise errors.from_status(operation.error)

    async def _call(self, method: Any, request: Any) -> Any:
        token = await self._good_token()
        return await rpc.call(method, request, timeout_s=_TIMEOUT_S, metadata=rpc.bearer(token))

    async def _good_token(self) -> str:
        login = self._login
        if login.token:
            return login.token
        if not login.user_name or not login.password:
            raise errors.Unauthenticated(
                "NOT_LOGGED_IN",
                "hosts have to be enrolled: give MCLOUD_TOKEN, or MCLOUD_USERNAME with "
                "MCLOUD_PASSWORD or --password-file",
            )
        if time.time() > self._token_end - _RENEWED_BEFORE_S:
            answer = await rpc.call(
                token_service_pb2_grpc.TokenServiceStub(self._channel).CreateToken,
                token_service_pb2.CreateTokenRequest(
                    password=token_service_pb2.PasswordCredential(
                        user_name=login.user_name, password=login.password
                    ),
                    system=True,
                ),
                timeout_s=_TIMEOUT_S,
            )
            self._token, self._token_end = answer.token, answer.claims.expire_time.seconds
        return self._token
