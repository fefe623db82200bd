"""Serves mcloud.identity.v1.UserService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import user_pb2, user_service_pb2, user_service_pb2_grpc
from mcloud_base import errors
from mcloud_controlplane.core import auth, contract, listing
from mcloud_controlplane.core.auth import Context
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.mutation import Frame
from mcloud_controlplane.identity import user_store as store
from mcloud_controlplane.identity.authentication import Authenticator
from mcloud_controlplane.identity.model import shared
from mcloud_controlplane.identity.passwords import Hasher


class UserServicer(user_service_pb2_grpc.UserServiceServicer):
    """Users.

    Requests with passwords are recorded masked, their digest included: a digest of a password is
    quicker to guess it by than its hash.
    """

    def __init__(
        self, database: Database, frame: Frame, authenticator: Authenticator, hasher: Hasher
    ) -> None:
        self._database = database
        self._frame = frame
        self._authenticator = authenticator
        self._hasher = hasher

    async def CreateUser(
        self, request: user_service_pb2.CreateUserRequest, context: Context
    ) -> operation_pb2.Operation:
        """Make one."""
        hashed = await self._hasher.hash(request.password)
        return await self._frame.mutate(
            contract.masked(request), lambda work, asked: store.create(work, asked, hashed)
        )

    async def GetUser(
        self, request: user_service_pb2.GetUserRequest, context: Context
    ) -> user_pb2.User:
        """Return one."""
        return await self._database.read_few(lambda: store.message(store.get(request.id)))

    async def ListUsers(
        self, request: user_service_pb2.ListUsersRequest, context: Context
    ) -> user_service_pb2.ListUsersResponse:
        """Return a page."""
        return await self._database.read(store.list_page, auth.caller(), request)

    async def WatchUsers(
        self, request: user_service_pb2.WatchUsersRequest, context: Context
    ) -> AsyncIterator[user_service_pb2.WatchUsersResponse]:
        """Stream changes."""
        async for event in listing.watch(
            self._database,
            shared,
            "user",
            user_pb2.User,
            request,
            auth.caller(),
            store.load,
            everybody=True,
        ):
            yield user_service_pb2.WatchUsersResponse(
                type=event.type, user=event.message, revision=event.revision
            )

    async def UpdateUser(
        self, request: user_service_pb2.UpdateUserRequest, context: Context
    ) -> operation_pb2.Operation:
        """Change one."""
        return await self._frame.mutate(
            request, lambda work, asked: store.update(work, asked, self._database)
        )

    async def DeleteUser(
        self, request: user_service_pb2.DeleteUserRequest, context: Context
    ) -> operation_pb2.Operation:
        """Delete one."""
        return await self._frame.mutate(
            request, lambda work, asked: store.delete(work, asked, self._database)
        )

    async def ChangePassword(
        self, request: user_service_pb2.ChangePasswordRequest, context: Context
    ) -> operation_pb2.Operation:
        """Check the current password where it is one's own, set the new one."""
        proved = None
        if request.user_id in ("", auth.caller().user_id):
            proved = await self._prove(request.current_password)
        hashed = await self._hasher.hash(request.new_password)
        return await self._frame.mutate(
            contract.masked(request),
            lambda work, asked: store.change_password(work, asked, self._database, proved, hashed),
        )

    async def _prove(self, password: str) -> str:
        """Return the hash that the caller's password matches; empty if it does not.

        The refusal is left to the unit: the repeat of a change that was done finds its operation,
        though its password is no longer the current one.
        """
        if not password:
            raise errors.bad_field("current_password", "is needed for one's own")
        user = await self._database.read_few(store.get, auth.caller().user_id)
        found = await self._authenticator.find(user.name, password)
        return found.password_hash if found else ""

    async def RevokeTokens(
        self, request: user_service_pb2.RevokeTokensRequest, context: Context
    ) -> operation_pb2.Operation:
        """End one's own tokens, or somebody's."""
        return await self._frame.mutate(request, store.revoke_tokens)
