"""ApplicationCredentialService: a part of a user's rights, for a program."""

from __future__ import annotations

import time
from typing import Any

from mcloud.common.v1 import operation_pb2
from mcloud.identity.v1 import (
    application_credential_pb2,
    application_credential_service_pb2,
    token_service_pb2,
)
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.core import convert
from service.identity.cloud import Cloud, Role, eventually, refused

pb = application_credential_service_pb2


async def make(
    cloud: Cloud, metadata: rpc.Metadata, name: str = "robot", **spec: Any
) -> pb.CreateApplicationCredentialResponse:
    request = pb.CreateApplicationCredentialRequest(
        request_id=ids.request_id(),
        name=name,
        spec=application_credential_pb2.ApplicationCredentialSpec(**spec),
    )
    return await rpc.call(
        cloud.public.credential.CreateApplicationCredential, request, metadata=metadata
    )


async def login(
    cloud: Cloud, made: pb.CreateApplicationCredentialResponse, **scope: Any
) -> token_service_pb2.CreateTokenResponse:
    secret = token_service_pb2.ApplicationCredentialSecret(
        id=made.application_credential.metadata.id, secret=made.secret
    )
    return await rpc.call(
        cloud.public.token.CreateToken,
        token_service_pb2.CreateTokenRequest(application_credential=secret, **scope),
    )


async def make_manager(cloud: Cloud) -> rpc.Metadata:
    admin = await cloud.admin()
    ann = await cloud.make_user(admin, "ann")
    blue = await cloud.make_project(admin, "blue")
    await cloud.assign(admin, ann.metadata.id, blue.metadata.id, Role.ROLE_MANAGER)
    return await cloud.as_user("ann")


async def test_a_credential_has_a_reduced_role(cloud: Cloud) -> None:
    ann = await make_manager(cloud)
    made = await make(cloud, ann, role=Role.ROLE_READER)
    claims = (await login(cloud, made)).claims
    assert claims.principal_id == made.application_credential.metadata.id
    assert (claims.user_name, claims.project_name) == ("ann", "blue")
    assert claims.role == Role.ROLE_READER
    whole = await make(cloud, ann, "whole")
    assert (await login(cloud, whole, project="blue")).claims.role == Role.ROLE_MANAGER
    error = await refused(make(cloud, ann, "more", role=Role.ROLE_ADMIN))
    assert isinstance(error, errors.PermissionDenied)
    assert error.reason == "ROLE_REQUIRED"


async def test_a_credential_is_good_in_its_project_only(cloud: Cloud) -> None:
    made = await make(cloud, await make_manager(cloud))
    for scope in ({"project": "default"}, {"system": True}):
        assert (await refused(login(cloud, made, **scope))).reason == "NO_ROLE"
    made.secret += "x"
    assert (await refused(login(cloud, made))).reason == "BAD_CREDENTIALS"


async def test_a_credential_makes_no_others(cloud: Cloud) -> None:
    ann = await make_manager(cloud)
    made = await make(cloud, ann)
    other = await make(cloud, ann, "other")
    robot = rpc.bearer((await login(cloud, made)).token)
    assert (await refused(make(cloud, robot, "more"))).reason == "PASSWORD_REQUIRED"
    assert (await refused(delete(cloud, robot, other))).reason == "PASSWORD_REQUIRED"
    await delete(cloud, robot, made)


async def delete(
    cloud: Cloud, metadata: rpc.Metadata, made: pb.CreateApplicationCredentialResponse
) -> operation_pb2.Operation:
    return await rpc.call(
        cloud.public.credential.DeleteApplicationCredential,
        pb.DeleteApplicationCredentialRequest(
            request_id=ids.request_id(), id=made.application_credential.metadata.id
        ),
        metadata=metadata,
    )


async def test_deleting_a_credential_ends_its_tokens_and_no_others(cloud: Cloud) -> None:
    ann = await make_manager(cloud)
    made = await make(cloud, ann)
    token = (await login(cloud, made)).token
    await delete(cloud, ann, made)
    error = await refused(
        rpc.call(cloud.service.token.CheckToken, token_service_pb2.CheckTokenRequest(token=token))
    )
    assert error.reason == "TOKEN_REVOKED"
    assert (await refused(login(cloud, made))).reason == "BAD_CREDENTIALS"
    assert (await refused(delete(cloud, ann, made))).reason == "APPLICATION_CREDENTIAL_NOT_FOUND"


async def test_tokens_end_with_the_credential(cloud: Cloud) -> None:
    ann = await make_manager(cloud)
    soon = convert.timestamp(time.time_ns() // 1000 + 3_000_000)
    made = await make(cloud, ann, expire_time=soon)
    answer = await login(cloud, made)
    assert answer.claims.expire_time.seconds <= soon.seconds

    async def expired() -> str:
        try:
            await rpc.call(
                cloud.public.operation.ListOperations,
                operation_pb2.ListOperationsRequest(),
                metadata=rpc.bearer(answer.token),
            )
        except errors.Unauthenticated as error:
            return error.reason
        return ""

    assert await eventually(expired) == "TOKEN_EXPIRED"

    async def refused_login() -> str:
        try:
            await login(cloud, made)
        except errors.Unauthenticated as error:
            return error.reason
        return ""

    assert await eventually(refused_login) == "BAD_CREDENTIALS"
    past = convert.timestamp(1_000_000)
    assert (await refused(make(cloud, ann, "past", expire_time=past))).reason == "BAD_FIELD"


async def test_credentials_are_their_users_and_names_are_taken_once(cloud: Cloud) -> None:
    ann = await make_manager(cloud)
    admin = rpc.bearer((await cloud.login()).token)
    made = await make(cloud, ann)
    get = pb.GetApplicationCredentialRequest(id=made.application_credential.metadata.id)
    call = cloud.public.credential.GetApplicationCredential
    assert (await rpc.call(call, get, metadata=ann)) == made.application_credential
    error = await refused(rpc.call(call, get, metadata=admin))
    assert error.reason == "APPLICATION_CREDENTIAL_NOT_FOUND"
    assert (await refused(make(cloud, ann))).reason == "CREDENTIAL_NAME_TAKEN"
    for metadata, names in ((ann, ["robot"]), (admin, [])):
        page = await rpc.call(
            cloud.public.credential.ListApplicationCredentials,
            pb.ListApplicationCredentialsRequest(),
            metadata=metadata,
        )
        assert [item.metadata.name for item in page.application_credentials] == names
    page = await rpc.call(
        cloud.public.credential.ListApplicationCredentials,
        pb.ListApplicationCredentialsRequest(all_projects=True),
        metadata=await cloud.admin(),
    )
    assert [item.metadata.name for item in page.application_credentials] == ["robot"]


async def test_a_repeated_request_does_not_show_the_secret_again(cloud: Cloud) -> None:
    ann = await make_manager(cloud)
    request = pb.CreateApplicationCredentialRequest(request_id=ids.request_id(), name="robot")
    call = cloud.public.credential.CreateApplicationCredential
    made = await rpc.call(call, request, metadata=ann)
    error = await refused(rpc.call(call, request, metadata=ann))
    assert error.reason == "ALREADY_ISSUED"
    assert error.metadata["id"] == made.application_credential.metadata.id
    request.name = "another"
    assert (await refused(rpc.call(call, request, metadata=ann))).reason == "REQUEST_ID_REUSED"
