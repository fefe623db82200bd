"""Users, projects and role assignments: made once, changed, watched, paged, deleted."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from mcloud.common.v1 import metadata_pb2, operation_pb2
from mcloud.identity.v1 import (
    project_service_pb2,
    role_assignment_service_pb2,
    user_pb2,
    user_service_pb2,
)
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.identity import model
from service.identity.cloud import PASSWORD, Cloud, Role, refused, unpack


def create_user(name: str = "ann", **values: Any) -> user_service_pb2.CreateUserRequest:
    values = {"request_id": ids.request_id(), "password": PASSWORD, **values}
    request = user_service_pb2.CreateUserRequest(name=name, **values)
    request.spec.SetInParent()
    return request


async def names(cloud: Cloud, admin: rpc.Metadata, **request: Any) -> list[str]:
    page = await rpc.call(
        cloud.public.user.ListUsers,
        user_service_pb2.ListUsersRequest(**request),
        metadata=admin,
    )
    return [user.metadata.name for user in page.users]


async def test_a_repeat_returns_the_first_operation(cloud: Cloud) -> None:
    admin = await cloud.admin()
    request = create_user()
    first = await rpc.call(cloud.public.user.CreateUser, request, metadata=admin)
    again = await rpc.call(cloud.public.user.CreateUser, request, metadata=admin)
    assert first == again
    assert first.state == operation_pb2.Operation.STATE_SUCCEEDED
    assert await names(cloud, admin) == ["admin", "ann"]
    request.name = "bob"
    error = await refused(rpc.call(cloud.public.user.CreateUser, request, metadata=admin))
    assert error.reason == "REQUEST_ID_REUSED"


async def test_of_many_at_once_one_gets_the_name(cloud: Cloud) -> None:
    admin = await cloud.admin()
    answers = await asyncio.gather(
        *(rpc.call(cloud.public.user.CreateUser, create_user(), metadata=admin) for _ in range(6)),
        return_exceptions=True,
    )
    failed = [answer for answer in answers if isinstance(answer, errors.Error)]
    assert [error.reason for error in failed] == ["USER_NAME_TAKEN"] * 5


async def test_validate_only_writes_nothing(cloud: Cloud) -> None:
    admin = await cloud.admin()
    database = cloud.runtime.database("identity", model.open_database)

    def counts() -> list[int]:
        tables = [*model.shared.models(), *model.MODELS]
        return [table.select().count() for table in tables] + [model.shared.revision()]

    before = await database.read(counts)
    request = create_user(validate_only=True)
    operation = await rpc.call(cloud.public.user.CreateUser, request, metadata=admin)
    assert not operation.id
    assert unpack(operation, user_pb2.User).metadata.name == "ann"
    taken = create_user("admin", validate_only=True)
    error = await refused(rpc.call(cloud.public.user.CreateUser, taken, metadata=admin))
    assert error.reason == "USER_NAME_TAKEN"
    assert await database.read(counts) == before
    request.validate_only = False
    await rpc.call(cloud.public.user.CreateUser, request, metadata=admin)


async def test_secrets_stand_in_no_operation_log_or_answer(cloud: Cloud) -> None:
    with structlog.testing.capture_logs() as logged:
        admin = await cloud.admin()
        await cloud.make_user(admin, "ann")
        ann = (
            await rpc.call(
                cloud.public.user.ListUsers,
                user_service_pb2.ListUsersRequest(filter='name="ann"'),
                metadata=admin,
            )
        ).users[0]
        await cloud.assign(admin, ann.metadata.id, "", Role.ROLE_READER)
        await refused(cloud.login("ann", "a wrong password"))
        change = user_service_pb2.ChangePasswordRequest(
            request_id=ids.request_id(), current_password=PASSWORD, new_password="battery staple"
        )
        own = await cloud.as_user("ann", system=True)
        operation = await rpc.call(cloud.public.user.ChangePassword, change, metadata=own)
        assert operation.response.Unpack(user_pb2.User())
    page = await rpc.call(
        cloud.public.operation.ListOperations,
        operation_pb2.ListOperationsRequest(),
        metadata=admin,
    )
    assert len(page.operations) == 3
    database = cloud.runtime.database("identity", model.open_database)
    (hashed,) = await database.read(
        lambda: [row.password_hash for row in model.User.select().where(model.User.name == "ann")]
    )
    everything = f"{page} {ann} {operation} {logged}"
    for secret in (PASSWORD, "battery staple", "a wrong password", cloud.admin_password, hashed):
        assert secret not in everything
    assert "***" in everything


async def test_the_repeat_of_a_change_of_password_finds_it_done(cloud: Cloud) -> None:
    admin = await cloud.admin()
    admin_id = (await cloud.login()).claims.user_id
    request = user_service_pb2.ChangePasswordRequest(
        request_id=ids.request_id(),
        current_password=cloud.admin_password,
        new_password="battery staple",
    )
    first = await rpc.call(cloud.public.user.ChangePassword, request, metadata=admin)
    admin = rpc.bearer((await cloud.login(password="battery staple", system=True)).token)
    again = await rpc.call(cloud.public.user.ChangePassword, request, metadata=admin)
    assert first == again
    request.request_id = ids.request_id()
    error = await refused(rpc.call(cloud.public.user.ChangePassword, request, metadata=admin))
    assert error.reason == "BAD_CREDENTIALS"
    request.current_password = ""
    request.user_id = admin_id
    error = await refused(rpc.call(cloud.public.user.ChangePassword, request, metadata=admin))
    assert error.reason == "BAD_FIELD"


async def test_only_administrators_act_on_others(cloud: Cloud) -> None:
    admin = await cloud.admin()
    ann = await cloud.make_user(admin, "ann")
    await cloud.assign(admin, ann.metadata.id, "", Role.ROLE_READER)
    own = await cloud.as_user("ann", system=True)
    admin_id = (await cloud.login()).claims.user_id
    error = await refused(
        rpc.call(
            cloud.public.user.RevokeTokens,
            user_service_pb2.RevokeTokensRequest(request_id=ids.request_id(), user_id=admin_id),
            metadata=own,
        )
    )
    assert error.reason == "ROLE_REQUIRED"
    error = await refused(
        rpc.call(
            cloud.public.user.ChangePassword,
            user_service_pb2.ChangePasswordRequest(
                request_id=ids.request_id(), user_id=admin_id, new_password="taken over"
            ),
            metadata=own,
        )
    )
    assert error.reason == "ROLE_REQUIRED"
    await cloud.login()


async def test_an_update_changes_what_its_mask_names(cloud: Cloud) -> None:
    admin = await cloud.admin()
    ann = await cloud.make_user(admin, "ann", labels={"team": "red"})
    request = user_service_pb2.UpdateUserRequest(
        request_id=ids.request_id(),
        id=ann.metadata.id,
        resource_version=ann.metadata.resource_version,
        update_mask={"paths": ["name", "spec.description"]},
        name="anna",
        spec=user_pb2.UserSpec(description="new", email="ignored@example.org"),
    )
    changed = unpack(
        await rpc.call(cloud.public.user.UpdateUser, request, metadata=admin), user_pb2.User
    )
    assert changed.metadata.name == "anna"
    assert changed.metadata.labels == {"team": "red"}
    assert (changed.spec.description, changed.spec.email) == ("new", "ann@example.org")
    for values, reason in (
        ({"resource_version": ann.metadata.resource_version}, "VERSION_CONFLICT"),
        ({"name": "admin"}, "USER_NAME_TAKEN"),
        ({"name": ""}, "BAD_FIELD"),
        ({"update_mask": {"paths": ["password_hash"]}}, "BAD_UPDATE_MASK"),
        ({"id": ids.new("u")}, "USER_NOT_FOUND"),
    ):
        wrong = user_service_pb2.UpdateUserRequest(
            **{
                "request_id": ids.request_id(),
                "id": ann.metadata.id,
                "update_mask": {"paths": ["name"]},
                "name": "another",
                **values,
            }
        )
        error = await refused(rpc.call(cloud.public.user.UpdateUser, wrong, metadata=admin))
        assert error.reason == reason


async def test_pages_and_filters(cloud: Cloud) -> None:
    admin = await cloud.admin()
    for name in ("carl", "ann", "bob"):
        await cloud.make_user(admin, name, labels={"team": "red" if name == "bob" else "blue"})
    assert await names(cloud, admin, order_by="name") == ["admin", "ann", "bob", "carl"]
    assert await names(cloud, admin, filter='labels.team="blue" AND disabled=false') == [
        "carl",
        "ann",
    ]
    found: list[str] = []
    token = ""
    while True:
        page = await rpc.call(
            cloud.public.user.ListUsers,
            user_service_pb2.ListUsersRequest(page_size=3, page_token=token, order_by="name desc"),
            metadata=admin,
        )
        found += [user.metadata.name for user in page.users]
        if not (token := page.next_page_token):
            break
    assert found == ["carl", "bob", "ann", "admin"]


async def test_a_watch_misses_nothing_after_a_list(cloud: Cloud) -> None:
    admin = await cloud.admin()
    page = await rpc.call(
        cloud.public.project.ListProjects,
        project_service_pb2.ListProjectsRequest(),
        metadata=admin,
    )
    blue = await cloud.make_project(admin, "blue")
    await cloud.make_user(admin, "ann")  # of no concern
    await rpc.call(
        cloud.public.project.DeleteProject,
        project_service_pb2.DeleteProjectRequest(request_id=ids.request_id(), id=blue.metadata.id),
        metadata=admin,
    )
    red = await cloud.make_project(admin, "red")
    stream = cloud.public.project.WatchProjects(
        project_service_pb2.WatchProjectsRequest(from_revision=page.revision), metadata=admin
    )
    async with asyncio.timeout(10):
        seen = [await stream.read() for _ in range(3)]
    stream.cancel()
    assert {(event.type, event.project.metadata.id) for event in seen} == {
        (metadata_pb2.CHANGE_TYPE_DELETED, blue.metadata.id),
        (metadata_pb2.CHANGE_TYPE_ADDED, red.metadata.id),
    }
    assert seen[-1].project == red


async def test_somebody_always_administers_the_system(cloud: Cloud) -> None:
    admin = await cloud.admin()
    admin_id = (await cloud.login()).claims.user_id
    page = await rpc.call(
        cloud.public.role.ListRoleAssignments,
        role_assignment_service_pb2.ListRoleAssignmentsRequest(
            filter=f'user_id="{admin_id}" AND project_id=""'
        ),
        metadata=admin,
    )
    (mine,) = page.role_assignments

    async def attempt(kind: str) -> Any:
        request_id = ids.request_id()
        if kind == "role":
            return await rpc.call(
                cloud.public.role.DeleteRoleAssignment,
                role_assignment_service_pb2.DeleteRoleAssignmentRequest(
                    request_id=request_id, id=mine.metadata.id
                ),
                metadata=admin,
            )
        if kind == "disable":
            return await rpc.call(
                cloud.public.user.UpdateUser,
                user_service_pb2.UpdateUserRequest(
                    request_id=request_id,
                    id=admin_id,
                    update_mask={"paths": ["spec.disabled"]},
                    spec=user_pb2.UserSpec(disabled=True),
                ),
                metadata=admin,
            )
        return await rpc.call(
            cloud.public.user.DeleteUser,
            user_service_pb2.DeleteUserRequest(request_id=request_id, id=admin_id),
            metadata=admin,
        )

    for kind in ("role", "disable", "delete"):
        error = await refused(attempt(kind))
        assert isinstance(error, errors.WrongState)
        assert error.reason == "LAST_ADMIN"
    # Two administrators who remove each other at once: one remains.
    ann = await cloud.make_user(admin, "ann")
    other = await cloud.assign(admin, ann.metadata.id, "", Role.ROLE_ADMIN)
    answers = await asyncio.gather(
        *(
            rpc.call(
                cloud.public.role.DeleteRoleAssignment,
                role_assignment_service_pb2.DeleteRoleAssignmentRequest(
                    request_id=ids.request_id(), id=id_
                ),
                metadata=admin,
            )
            for id_ in (mine.metadata.id, other.metadata.id)
        ),
        return_exceptions=True,
    )
    left = [answer for answer in answers if isinstance(answer, errors.Error)]
    assert len(left) == 1
    assert left[0].reason in ("LAST_ADMIN", "TOKEN_REVOKED")


async def test_roles_are_given_once_to_users_that_exist(cloud: Cloud) -> None:
    admin = await cloud.admin()
    ann = (await cloud.make_user(admin, "ann")).metadata.id
    blue = (await cloud.make_project(admin, "blue")).metadata.id
    await cloud.assign(admin, ann, blue, Role.ROLE_MEMBER)
    error = await refused(cloud.assign(admin, ann, blue, Role.ROLE_MEMBER))
    assert error.reason == "ROLE_ASSIGNED"
    assert "member" in error.message
    error = await refused(cloud.assign(admin, ids.new("u"), blue, Role.ROLE_MEMBER))
    assert error.reason == "USER_NOT_FOUND"
    error = await refused(cloud.assign(admin, ann, ids.new("p"), Role.ROLE_MEMBER))
    assert error.reason == "PROJECT_NOT_FOUND"
    error = await refused(
        rpc.call(
            cloud.public.project.DeleteProject,
            project_service_pb2.DeleteProjectRequest(request_id=ids.request_id(), id=blue),
            metadata=admin,
        )
    )
    assert error.reason == "PROJECT_IN_USE"
    await rpc.call(
        cloud.public.user.DeleteUser,
        user_service_pb2.DeleteUserRequest(request_id=ids.request_id(), id=ann),
        metadata=admin,
    )
    page = await rpc.call(
        cloud.public.role.ListRoleAssignments,
        role_assignment_service_pb2.ListRoleAssignmentsRequest(filter=f'user_id="{ann}"'),
        metadata=admin,
    )
    assert not page.role_assignments
    await cloud.make_user(admin, "ann")  # the name is free
