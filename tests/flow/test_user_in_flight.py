"""Work that was accepted goes on when its user may do nothing any more; new requests are refused.

What hosts ask for carries a token of theirs, delegated by the control plane for one domain; the
user's own is not needed after the request.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from google.protobuf import field_mask_pb2, timestamp_pb2

from flow.fault_cloud import Operation
from flow.fault_world import World
from mcloud.common.v1 import options_pb2
from mcloud_base import errors, ids, rpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

PASSWORD = "correct horse"
_LIFE_S = 4  # of a login that is to run out; longer than a request takes


class User:
    """A member of the administrator's project, and a login of hers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.name = f"ann-{ids.request_id()}"

    async def join(self) -> None:
        user = await self.world.mutate(
            "identity.UserService/CreateUser",
            system=True,
            name=self.name,
            password=PASSWORD,
            spec={},
        )
        self.id = user.resource.id
        projects = await self.world.call("identity.ProjectService/ListProjects", system=True)
        (project,) = [each for each in projects.projects if each.metadata.name == "default"]
        spec = {
            "user_id": self.id,
            "project_id": project.metadata.id,
            "role": options_pb2.Rule.ROLE_MEMBER,
        }
        assignment = await self.world.mutate(
            "identity.RoleAssignmentService/CreateRoleAssignment", system=True, spec=spec
        )
        self.assignment_id = assignment.resource.id
        self.metadata = await self._login(password={"user_name": self.name, "password": PASSWORD})

    async def _login(self, **credential: Any) -> rpc.Metadata:
        stub, request = self.world.method(
            "identity.TokenService/CreateToken",
            project="" if "application_credential" in credential else "default",
            **credential,
        )
        return rpc.bearer((await rpc.call(stub, request, timeout_s=30)).token)

    async def call(self, method: str, **fields: Any) -> Any:
        stub, request = self.world.method(method, **fields)
        return await rpc.call(stub, request, metadata=self.metadata, timeout_s=30)

    # --- what becomes of her --------------------------------------------------------------------

    async def login_runs_out(self) -> None:
        """Wait for it: the token was drawn with a credential that ends."""

    async def is_disabled(self) -> None:
        await self.world.mutate(
            "identity.UserService/UpdateUser",
            system=True,
            id=self.id,
            spec={"disabled": True},
            update_mask=field_mask_pb2.FieldMask(paths=["spec.disabled"]),
        )

    async def loses_her_role(self) -> None:
        await self.world.mutate(
            "identity.RoleAssignmentService/DeleteRoleAssignment",
            system=True,
            id=self.assignment_id,
        )

    async def draw_short_login(self) -> None:
        """Log in with an application credential that will soon have ended."""
        ends = timestamp_pb2.Timestamp(seconds=int(time.time()) + _LIFE_S)
        made = await self.call(
            "identity.ApplicationCredentialService/CreateApplicationCredential",
            request_id=ids.request_id(),
            name="short",
            spec={"expire_time": ends},
        )
        self.metadata = await self._login(
            application_credential={
                "id": made.application_credential.metadata.id,
                "secret": made.secret,
            }
        )


FATES = {
    "login_runs_out": "TOKEN_EXPIRED",
    "is_disabled": "TOKEN_REVOKED",
    "loses_her_role": "TOKEN_REVOKED",
}


@pytest.mark.parametrize("fate", FATES)
async def test_a_creation_goes_on_without_its_user(world: World, fate: str) -> None:
    """Whatever becomes of her before the first step; the receipt says whose it was."""
    await world.prepare("create_instance")
    user = User(world)
    await user.join()
    if fate == "login_runs_out":
        await user.draw_short_login()
    list_method = "compute.InstanceService/ListInstances"

    async def befall(operation_id: str) -> None:
        await getattr(user, fate)()

        async def is_refused() -> bool:
            try:
                await user.call(list_method)
            except errors.Unauthenticated as error:
                return error.reason == FATES[fate]
            return False

        await world.until(is_refused)

    world.saboteur.plan = {("create_instance", 0, "do", "before"): befall}
    operation = await user.call("compute.InstanceService/CreateInstance", **world.new_instance())
    world.subjects["instance"] = operation.resource.id
    ended = await world.ended(operation)

    assert ended.state == Operation.STATE_SUCCEEDED, ended
    assert not world.saboteur.plan
    assert (await world.find("instance")).status.state
    with pytest.raises(errors.Unauthenticated, match=FATES[fate]):
        await user.call("compute.InstanceService/DeleteInstance", **world.by_id("instance"))
    if fate != "login_runs_out":
        assert ended.caller_id == user.id
    else:
        assert ended.caller_id.startswith("cred-")
    await world.prepare("create_instance")
    await world.require_clean()


async def test_a_creation_goes_on_after_the_deadline_of_its_call(world: World) -> None:
    await world.prepare("create_instance")
    user = User(world)
    await user.join()
    deadline_s = 5.0  # longer than a request takes
    stub, request = world.method("compute.InstanceService/CreateInstance", **world.new_instance())
    end = time.monotonic() + deadline_s

    async def pass_by(operation_id: str) -> None:
        await asyncio.sleep(max(end - time.monotonic(), 0))  # until then, and no fixed time

    world.saboteur.plan = {("create_instance", 0, "do", "before"): pass_by}
    operation = await rpc.call(stub, request, metadata=user.metadata, timeout_s=deadline_s)
    world.subjects["instance"] = operation.resource.id
    ended = await world.ended(operation)

    assert ended.state == Operation.STATE_SUCCEEDED, ended
    assert {step.attempt for step in ended.steps} == {1}
    await world.prepare("create_instance")
    await world.require_clean()
