"""TokenService/CreateToken, and what its tokens are good for."""

from __future__ import annotations

import asyncio
import time

import jwt
from google.rpc import error_details_pb2

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import (
    endpoint_service_pb2,
    project_service_pb2,
    token_service_pb2,
    user_service_pb2,
)
from mcloud_base import errors, rpc
from service.identity.cloud import Cloud, Role, eventually, refused


async def test_the_first_administrator_logs_in_to_the_default_project(cloud: Cloud) -> None:
    before = time.time_ns() // 1000
    answer = await cloud.login()
    claims = answer.claims
    assert (claims.user_name, claims.project_name) == ("admin", "default")
    assert claims.role == Role.ROLE_ADMIN
    assert not claims.system
    assert claims.expire_time.seconds - claims.issue_time.seconds == 3600
    assert before <= answer.start_time.ToMicroseconds() <= answer.end_time.ToMicroseconds()
    inside = jwt.decode(answer.token, options={"verify_signature": False})
    assert inside["lgs"] == answer.start_time.ToMicroseconds()
    assert inside["lge"] == answer.end_time.ToMicroseconds()
    assert set(inside["epo"].values()) == {0}
    assert {claims.user_id, claims.project_id} < set(inside["epo"])
    mode = (cloud.settings.state_dir / "admin-password").stat().st_mode
    assert mode & 0o777 == 0o600


async def test_a_project_is_named_by_name_or_id(cloud: Cloud) -> None:
    by_name = await cloud.login(project="default")
    by_id = await cloud.login(project=by_name.claims.project_id)
    assert by_id.claims.project_id == by_name.claims.project_id


async def test_wrong_password_and_unknown_user_get_the_same_answer(cloud: Cloud) -> None:
    wrong = await refused(cloud.login(password="wrong password"))
    unknown = await refused(cloud.login("nobody"))
    assert isinstance(wrong, errors.Unauthenticated)
    assert wrong.reason == unknown.reason == "BAD_CREDENTIALS"
    assert wrong.message == unknown.message


async def test_nothing_to_log_in_with_is_refused(cloud: Cloud) -> None:
    error = await refused(
        rpc.call(cloud.public.token.CreateToken, token_service_pb2.CreateTokenRequest())
    )
    assert error.reason == "BAD_FIELD"


async def test_failures_make_the_next_attempt_wait(cloud: Cloud) -> None:
    for name in ("admin", "nobody"):  # the answers do not tell who exists
        for _ in range(5):
            error = await refused(cloud.login(name, "wrong password"))
            assert error.reason == "BAD_CREDENTIALS"
        error = await refused(cloud.login(name, cloud.admin_password))
        assert isinstance(error, errors.Exhausted)
        assert error.reason == "TOO_MANY_ATTEMPTS"
        retry = errors.find_detail(error, error_details_pb2.RetryInfo)
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert 0 < retry.retry_delay.ToMilliseconds() <= 2000

    async def logged_in() -> bool:
        try:
            await cloud.login()
        except errors.Exhausted:
            return False
        return True

    await eventually(logged_in)
    for _ in range(4):  # counted anew after the success
        error = await refused(cloud.login(password="wrong password"))
        assert error.reason == "BAD_CREDENTIALS"
    await cloud.login()


async def test_parallel_guesses_do_not_get_past_the_limit(cloud: Cloud) -> None:
    answers = await asyncio.gather(
        *(refused(cloud.login(password="wrong password")) for _ in range(30))
    )
    assert sum(error.reason == "BAD_CREDENTIALS" for error in answers) <= 6
    assert {error.reason for error in answers} == {"BAD_CREDENTIALS", "TOO_MANY_ATTEMPTS"}


async def test_many_good_logins_at_once_succeed(cloud: Cloud) -> None:
    answers = await asyncio.gather(*(cloud.login() for _ in range(20)))
    assert len({answer.claims.token_id for answer in answers}) == 20


async def test_a_user_without_a_role_gets_no_token(cloud: Cloud) -> None:
    admin = await cloud.admin()
    await cloud.make_user(admin, "ann")
    other = await cloud.make_project(admin, "other")
    for scope in ({}, {"project": "default"}, {"project": "no such"}, {"system": True}):
        error = await refused(cloud.login("ann", **scope))
        assert isinstance(error, errors.PermissionDenied)
        assert error.reason == "NO_ROLE"
    existing = await refused(cloud.login("ann", project="other"))
    missing = await refused(cloud.login("ann", project="othex"))
    assert existing.message.replace("other", "othex") == missing.message
    assert other.metadata.id not in existing.message


async def test_with_several_projects_one_must_be_named(cloud: Cloud) -> None:
    admin = await cloud.admin()
    ann = await cloud.make_user(admin, "ann")
    for name in ("blue", "red"):
        project = await cloud.make_project(admin, name)
        await cloud.assign(admin, ann.metadata.id, project.metadata.id, Role.ROLE_READER)
    error = await refused(cloud.login("ann"))
    assert error.reason == "PROJECT_REQUIRED"
    assert "blue, red" in error.message
    assert (await cloud.login("ann", project="red")).claims.project_name == "red"


async def test_the_highest_role_counts(cloud: Cloud) -> None:
    admin = await cloud.admin()
    ann = await cloud.make_user(admin, "ann")
    blue = await cloud.make_project(admin, "blue")
    for role in (Role.ROLE_READER, Role.ROLE_MANAGER, Role.ROLE_MEMBER):
        await cloud.assign(admin, ann.metadata.id, blue.metadata.id, role)
    assert (await cloud.login("ann")).claims.role == Role.ROLE_MANAGER


async def test_what_is_for_the_system_needs_a_token_for_the_system(cloud: Cloud) -> None:
    request = user_service_pb2.ListUsersRequest()
    project = rpc.bearer((await cloud.login()).token)
    error = await refused(rpc.call(cloud.public.user.ListUsers, request, metadata=project))
    assert error.reason == "ROLE_REQUIRED"
    answer = await rpc.call(cloud.public.user.ListUsers, request, metadata=await cloud.admin())
    assert [user.metadata.name for user in answer.users] == ["admin"]
    error = await refused(rpc.call(cloud.public.user.ListUsers, request))
    assert error.reason == "TOKEN_MISSING"
    forged = jwt.encode({"sub": "x"}, "k" * 32, algorithm="HS256", headers={"kid": "x"})
    error = await refused(
        rpc.call(cloud.public.user.ListUsers, request, metadata=rpc.bearer(forged))
    )
    assert error.reason == "TOKEN_INVALID"


async def test_a_reader_of_the_system_changes_nothing(cloud: Cloud) -> None:
    admin = await cloud.admin()
    ann = await cloud.make_user(admin, "ann")
    await cloud.assign(admin, ann.metadata.id, "", Role.ROLE_READER)
    reader = await cloud.as_user("ann", system=True)
    await rpc.call(
        cloud.public.project.ListProjects,
        project_service_pb2.ListProjectsRequest(),
        metadata=reader,
    )
    error = await refused(cloud.make_user(reader, "eve"))
    assert error.reason == "ROLE_REQUIRED"


async def test_services_check_tokens_by_rpc(cloud: Cloud) -> None:
    token = (await cloud.login()).token
    claims = await rpc.call(
        cloud.service.token.CheckToken, token_service_pb2.CheckTokenRequest(token=token)
    )
    assert claims.user_name == "admin"
    error = await refused(
        rpc.call(
            cloud.service.token.CheckToken,
            token_service_pb2.CheckTokenRequest(token=token[:-4] + "AAAA"),
        )
    )
    assert error.reason == "TOKEN_INVALID"
    error = await refused(
        rpc.call(
            cloud.public.token.CheckToken,
            token_service_pb2.CheckTokenRequest(token=token),
            metadata=rpc.bearer(token),
        )
    )
    assert error.reason == "WRONG_CALLER"


async def test_keys_are_public_and_only_their_public_halves(cloud: Cloud) -> None:
    answer = await rpc.call(
        cloud.public.token.ListSigningKeys, token_service_pb2.ListSigningKeysRequest()
    )
    (key,) = answer.keys
    assert len(key.public_key) == 32
    assert key.id == jwt.get_unverified_header((await cloud.login()).token)["kid"]


async def test_endpoints_name_every_service(cloud: Cloud) -> None:
    answer = await rpc.call(
        cloud.public.endpoint.ListEndpoints, endpoint_service_pb2.ListEndpointsRequest()
    )
    assert [endpoint.service for endpoint in answer.endpoints][:2] == ["identity", "compute"]
    assert {endpoint.address for endpoint in answer.endpoints} == {""}


async def test_operations_of_the_system_are_not_a_projects(cloud: Cloud) -> None:
    admin = await cloud.admin()
    await cloud.make_user(admin, "ann")
    request = operation_pb2.ListOperationsRequest()
    seen = await rpc.call(cloud.public.operation.ListOperations, request, metadata=admin)
    assert len(seen.operations) == 1
    project = rpc.bearer((await cloud.login()).token)
    seen = await rpc.call(cloud.public.operation.ListOperations, request, metadata=project)
    assert not seen.operations
