"""A control plane is lost, and comes back from a backup, while its host's guests run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fakes.daemon import Daemon
from fakes.light_host import Gate, LightHost
from fixtures_postgresql import DATABASES, Server, postgresql_server  # noqa: F401
from mcloud.common.v1 import operation_pb2, session_pb2
from mcloud.compute.v1 import instance_pb2, instance_service_pb2
from mcloud.conductor.v1 import (
    domain_pb2,
    domain_service_pb2,
    domain_service_pb2_grpc,
    verify_service_pb2,
    verify_service_pb2_grpc,
)
from mcloud.image.v1 import image_service_pb2, image_service_pb2_grpc
from mcloud_base import errors, ids, rpc, tls
from mcloud_controlplane.core import pki
from service.compute.instances import Instances
from service.core.cloud import Client, refused

State = instance_pb2.InstanceStatus
Domain = domain_pb2.DomainStatus
Operation = operation_pb2.Operation
Finding = verify_service_pb2.Finding
DEADLINE_S = 120
_schemas = count(1)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def daemons(
    request: pytest.FixtureRequest, tmp_path: Path, free_ports: Callable[[int], list[int]]
) -> Iterator[tuple[Daemon, Daemon]]:
    """The control plane that is lost, and the one that takes its place at the same address."""
    ports = free_ports(2)
    databases = ["sqlite", "sqlite"]
    if request.param == "postgresql":
        server = request.getfixturevalue("postgresql_server")
        databases = [_schema(server) for _ in range(2)]
    found = tuple(
        Daemon(tmp_path / name, tmp_path / name / "state", ports, database)
        for name, database in zip(("lost", "restored"), databases, strict=True)
    )
    yield found  # type: ignore[misc]
    for each in found:
        each.kill()


def _schema(server: Server) -> str:
    schema = f"restore{next(_schemas)}"
    for name in DATABASES:
        server.execute(f"CREATE SCHEMA {schema}", name)
    return server.url("{name}", schema)


@pytest.fixture
async def host(tmp_path: Path, daemons: tuple[Daemon, Daemon]) -> AsyncIterator[LightHost]:
    lost, _ = daemons
    await asyncio.to_thread(lost.start)
    authority, key, id_ = lost.plane.authority(), tls.new_key(), ids.new("h")
    certificate = authority.issue_host(tls.signing_request(key, id_), id_, "127.0.0.1")
    identity = tls.Identity(key, pki._pem(certificate), authority.certificate)
    gate = Gate()
    async with LightHost(tmp_path / "host", lost.plane.internal, identity, id_, probe=gate) as made:
        made.gate = gate  # type: ignore[attr-defined]
        yield made


async def eventually(look: Callable[[], Awaitable[Any]]) -> Any:
    """Look until something is found; while the control plane is away nothing is."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                if found := await look():
                    return found
            except errors.Unavailable:
                pass
            await asyncio.sleep(0.1)


async def boot(instances: Instances, name: str) -> str:
    ended = await instances.wait(await instances.create(name))
    assert ended.state == Operation.STATE_SUCCEEDED, ended.error
    return ended.resource.id


async def change(instances: Instances, verb: str, id_: str) -> None:
    ended = await instances.wait(await instances.change(verb, id_))
    assert ended.state == Operation.STATE_SUCCEEDED, ended.error


async def domains_of(client: Client) -> dict[str, domain_pb2.Domain]:
    """Return the domains that are not gone, by instance."""
    stub = domain_service_pb2_grpc.DomainServiceStub(client.public)
    request = domain_service_pb2.ListDomainsRequest()
    listed = await rpc.call(stub.ListDomains, request, metadata=await client.login())
    return {each.instance_id: each for each in listed.domains if not each.HasField("absent_time")}


async def unknown_on_hosts(client: Client) -> list[verify_service_pb2.Finding]:
    """Return all that is wrong."""
    stub = verify_service_pb2_grpc.VerifyServiceStub(client.public)
    found = []
    call = stub.Verify(
        verify_service_pb2.VerifyRequest(), metadata=await client.login(), timeout=DEADLINE_S
    )
    async for answer in rpc.received(call):
        if answer.HasField("finding"):
            found.append(answer.finding)
        else:
            assert not answer.summary.silent_host_ids
    return found


async def test_guests_outlive_the_control_plane_and_what_it_has_forgotten(
    daemons: tuple[Daemon, Daemon], host: LightHost, tmp_path: Path
) -> None:
    lost, restored = daemons
    gate: Gate = host.gate  # type: ignore[attr-defined]
    file = tmp_path / "backup.tar"
    client = lost.client()
    instances = await Instances(client).prepare()
    await eventually(lambda: _is_up(client))
    kept = await boot(instances, "kept")
    halted, doomed = await boot(instances, "halted"), await boot(instances, "doomed")
    resumed = await boot(instances, "resumed")
    await change(instances, "Stop", resumed)
    gate.shut = True
    building = await instances.create("building")
    await gate.reached.wait()

    done = await asyncio.to_thread(lost.run, "backup", "--to", str(file))
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mode & 0o777 == 0o600

    # What the backup does not know of.
    gate.open.set()
    assert (await instances.wait(building)).state == Operation.STATE_SUCCEEDED
    revision = (await _list(instances)).revision
    await change(instances, "Delete", doomed)
    await change(instances, "Stop", halted)
    await change(instances, "Start", resumed)
    await change(instances, "Reboot", kept)
    late = await boot(instances, "late")
    late_domain = (await instances.get(late)).status.domain_id
    before = {each.name: each.state for each in await host.driver.list()}
    boots = _boots(host)
    await client.close()
    lost.kill()

    done = await asyncio.to_thread(restored.run, "restore", "--from", str(file))
    assert done.returncode == 0, done.stderr
    again = await asyncio.to_thread(restored.run, "restore", "--from", str(file))
    assert "RESTORE_TARGET_NOT_EMPTY" in again.stderr
    await asyncio.to_thread(restored.start)
    client = restored.client()
    after = Instances(client)
    after.who = instances.who
    assert (await refused(after.get(kept))).reason == "TOKEN_INVALID"
    after.who = await client.login(instances.project, instances.project)

    async def settled() -> bool:
        rows = await domains_of(client)
        reached = {id_ for id_, each in rows.items() if each.observed_generation == each.generation}
        return reached == {kept, halted, resumed, building.resource.id} == rows.keys()

    await eventually(settled)
    ended = await after.wait(building)  # it was running, and goes on with the guest that is there
    assert ended.state == Operation.STATE_SUCCEEDED, ended.error
    states = {each.metadata.id: each.status for each in (await _list(after)).instances}
    assert states.keys() == {kept, halted, resumed, building.resource.id, doomed}
    assert states[kept].state == states[resumed].state == State.STATE_ACTIVE
    assert states[building.resource.id].state == State.STATE_ACTIVE
    assert states[halted].state == State.STATE_SHUTOFF
    assert states[doomed].state == State.STATE_ERROR
    assert states[doomed].fault.reason == "DOMAIN_LOST"
    assert host.id in states[doomed].fault.message

    # Nothing was started, stopped or removed on the host, and all that was there is.
    assert _boots(host) == boots
    assert {each.name: each.state for each in await host.driver.list()} == before
    findings = await unknown_on_hosts(client)
    assert {each.owner_id for each in findings} == {late_domain}, findings
    assert {each.kind for each in findings} == {Finding.KIND_UNKNOWN_ARTIFACT}
    kinds = {each.artifact_kind for each in findings}
    assert kinds == {session_pb2.Artifact.KIND_DOMAIN, session_pb2.Artifact.KIND_OVERLAY}

    watch = after.stub.WatchInstances(
        instance_service_pb2.WatchInstancesRequest(from_revision=revision),
        metadata=after.who,
        timeout=DEADLINE_S,
    )
    with pytest.raises(errors.OutOfRange):
        await anext(aiter(rpc.received(watch)))
    # It is a cloud again: what it knows can be changed, images are whole, what is lost goes.
    await change(after, "Reboot", kept)
    assert _boots(host)[kept] == boots[kept] + 1
    await change(after, "Delete", doomed)
    await change(after, "Delete", kept)
    after.flavor_id, after.image_id = instances.flavor_id, instances.image_id
    assert await _size_of_image(client, after) == 1 << 20
    await boot(after, "kept")  # its name is free
    await client.close()


def _boots(host: LightHost) -> dict[str, int]:
    """Return how often each guest was started."""
    found = {}
    for guest in host.driver.guests.values():
        assert guest.domain.identity is not None
        found[guest.domain.identity.instance_id] = guest.boot_count
    return found


async def _is_up(client: Client) -> bool:
    from mcloud.compute.v1 import host_pb2, host_service_pb2, host_service_pb2_grpc

    stub = host_service_pb2_grpc.HostServiceStub(client.public)
    request = host_service_pb2.ListHostsRequest()
    listed = await rpc.call(stub.ListHosts, request, metadata=await client.login())
    return any(each.status.state == host_pb2.HostStatus.STATE_UP for each in listed.hosts)


async def _list(instances: Instances) -> instance_service_pb2.ListInstancesResponse:
    request = instance_service_pb2.ListInstancesRequest()
    found: instance_service_pb2.ListInstancesResponse = await instances.call(
        "ListInstances", request
    )
    return found


async def _size_of_image(client: Client, instances: Instances) -> int:
    stub = image_service_pb2_grpc.ImageServiceStub(client.public)
    request = image_service_pb2.DownloadImageRequest(id=instances.image_id)
    size = 0
    async for part in rpc.received(
        stub.DownloadImage(request, metadata=instances.who, timeout=DEADLINE_S)
    ):
        size += len(part.chunk)
    return size
