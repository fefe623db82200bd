"""What ends tokens, how soon other services hear of it, and rotation of the signing keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import (
    project_pb2,
    project_service_pb2,
    role_assignment_service_pb2,
    token_service_pb2,
    user_pb2,
    user_service_pb2,
)
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.core.tokens import TokenChecker
from mcloud_controlplane.identity import model, signing
from service.identity.cloud import Cloud, Role, eventually, refused


@pytest.fixture
async def checker(cloud: Cloud) -> AsyncIterator[TokenChecker]:
    """Another service's, over its own channel."""
    made = TokenChecker(cloud.service.token)  # type: ignore[arg-type]
    task = asyncio.create_task(made.follow())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until_revoked(checker: TokenChecker, token: str) -> float:
    """Return how long it takes until the token is refused as revoked."""
    start = time.monotonic()

    async def revoked() -> bool:
        try:
            await checker.check(token, mutates=False)
        except errors.Unauthenticated as error:
            return error.reason == "TOKEN_REVOKED"
        return False

    await eventually(revoked)
    return time.monotonic() - start


async def make_member(cloud: Cloud, admin: rpc.Metadata) -> tuple[str, str, str]:
    user = await cloud.make_user(admin, "ann")
    project = await cloud.make_project(admin, "blue")
    role = await cloud.assign(admin, user.metadata.id, project.metadata.id, Role.ROLE_MEMBER)
    return user.metadata.id, project.metadata.id, role.metadata.id


@pytest.mark.parametrize(
    "how", ["revoke", "disable", "password", "delete user", "delete role", "disable project"]
)
async def test_another_service_refuses_soon(cloud: Cloud, checker: TokenChecker, how: str) -> None:
    admin = await cloud.admin()
    user_id, project_id, role_id = await make_member(cloud, admin)
    token = (await cloud.login("ann")).token
    others = (await cloud.login()).token
    await checker.check(token, mutates=True)
    request_id = ids.request_id()
    call, request = {
        "revoke": (
            cloud.public.user.RevokeTokens,
            user_service_pb2.RevokeTokensRequest(request_id=request_id, user_id=user_id),
        ),
        "disable": (
            cloud.public.user.UpdateUser,
            user_service_pb2.UpdateUserRequest(
                request_id=request_id,
                id=user_id,
                update_mask={"paths": ["spec.disabled"]},
                spec=user_pb2.UserSpec(disabled=True),
            ),
        ),
        "password": (
            cloud.public.user.ChangePassword,
            user_service_pb2.ChangePasswordRequest(
                request_id=request_id, user_id=user_id, new_password="another password"
            ),
        ),
        "delete user": (
            cloud.public.user.DeleteUser,
            user_service_pb2.DeleteUserRequest(request_id=request_id, id=user_id),
        ),
        "delete role": (
            cloud.public.role.DeleteRoleAssignment,
            role_assignment_service_pb2.DeleteRoleAssignmentRequest(
                request_id=request_id, id=role_id
            ),
        ),
        "disable project": (
            cloud.public.project.UpdateProject,
            project_service_pb2.UpdateProjectRequest(
                request_id=request_id,
                id=project_id,
                update_mask={"paths": ["spec.disabled"]},
                spec=project_pb2.ProjectSpec(disabled=True),
            ),
        ),
    }[how]
    await rpc.call(call, request, metadata=admin)
    assert await until_revoked(checker, token) < 2
    await checker.check(others, mutates=True)
    error = await refused(
        rpc.call(cloud.service.token.CheckToken, token_service_pb2.CheckTokenRequest(token=token))
    )
    assert error.reason == "TOKEN_REVOKED"
    if how == "revoke":  # only those made until now
        await checker.check((await cloud.login("ann")).token, mutates=True)
    elif how == "password":
        error = await refused(cloud.login("ann"))
        assert error.reason == "BAD_CREDENTIALS"
        await cloud.login("ann", "another password")
    elif how in ("disable", "delete user"):
        assert (await refused(cloud.login("ann"))).reason == "BAD_CREDENTIALS"
    else:
        assert (await refused(cloud.login("ann"))).reason == "NO_ROLE"


async def test_the_gate_refuses_a_revoked_token(cloud: Cloud) -> None:
    admin = await cloud.admin()
    await make_member(cloud, admin)
    member = await cloud.as_user("ann")
    await rpc.call(
        cloud.public.user.RevokeTokens,
        user_service_pb2.RevokeTokensRequest(request_id=ids.request_id()),
        metadata=member,
    )

    async def refused_now() -> bool:
        try:
            await rpc.call(
                cloud.public.operation.ListOperations,
                operation_pb2.ListOperationsRequest(),
                metadata=member,
            )
        except errors.Unauthenticated as error:
            return error.reason == "TOKEN_REVOKED"
        return False

    await eventually(refused_now, 2)


async def test_the_feed_resumes_and_gives_a_bookmark_every_second(cloud: Cloud) -> None:
    admin = await cloud.admin()
    ann = (await cloud.make_user(admin, "ann")).metadata.id

    async def revoke() -> None:
        await rpc.call(
            cloud.public.user.RevokeTokens,
            user_service_pb2.RevokeTokensRequest(request_id=ids.request_id(), user_id=ann),
            metadata=admin,
        )

    async def first(revision: str) -> token_service_pb2.WatchRevocationsResponse:
        request = token_service_pb2.WatchRevocationsRequest(from_revision=revision)
        stream = cloud.service.token.WatchRevocations(request)
        async with asyncio.timeout(5):
            found = await stream.read()
        stream.cancel()
        return found

    await revoke()
    whole = await first("")
    assert [(item.principal_id, item.epoch) for item in whole.revocations] == [(ann, 1)]
    assert not (await first(whole.revision)).revocations
    await revoke()
    await revoke()
    resumed = await first(whole.revision)
    assert [(item.principal_id, item.epoch) for item in resumed.revocations] == [(ann, 3)]
    with pytest.raises(grpc.RpcError) as caught:
        await first("999999")
    assert rpc.from_rpc_error(caught.value).reason == "REVISION_COMPACTED"

    stream = cloud.service.token.WatchRevocations(token_service_pb2.WatchRevocationsRequest())
    await stream.read()
    start = time.monotonic()
    for _ in range(2):
        assert not (await stream.read()).revocations
    assert 1.5 < time.monotonic() - start < 6
    stream.cancel()


async def test_old_keys_are_good_while_tokens_need_them(
    cloud: Cloud, checker: TokenChecker
) -> None:
    database = cloud.runtime.database("identity", model.open_database)
    old = (await cloud.login()).token

    def age(days: int) -> None:
        key = model.SigningKey
        key.update(create_time=key.create_time - days * 86_400_000_000).execute()

    await database.write(age, 31)
    await database.write(signing.rotate, database)
    new = (await cloud.login()).token
    keys = await rpc.call(
        cloud.public.token.ListSigningKeys, token_service_pb2.ListSigningKeysRequest()
    )
    assert len(keys.keys) == 2
    for token in (old, new):
        await checker.check(token, mutates=True)
    await database.write(signing.rotate, database)
    assert len(await database.read(signing.keys)) == 2
    await database.write(age, 1)  # longer than any token lives
    await database.write(signing.rotate, database)
    assert len(await database.read(signing.keys)) == 1
    error = await refused(
        rpc.call(cloud.service.token.CheckToken, token_service_pb2.CheckTokenRequest(token=old))
    )
    assert error.reason == "TOKEN_INVALID"
