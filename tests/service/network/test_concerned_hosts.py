"""A change costs work for the hosts that it concerns, for all of them at once, and for no other."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from fakes.dataplane_host import DataplaneHost, new_domain
from mcloud.common.v1 import options_pb2, session_pb2
from mcloud.network.v1 import port_pb2, port_service_pb2
from mcloud_base import ids
from mcloud_controlplane.core import auth
from mcloud_controlplane.core.database import Database
from mcloud_controlplane.core.sessions import HostReport
from mcloud_controlplane.network import binding_store, dataplane_document, dataplane_store, model
from service.network.cloud import Cloud, refused

Rule = options_pb2.Rule

SOURCE = dataplane_store.Source()


def generation(host_id: str) -> int:
    return int(model.HostDataplane.get_by_id(host_id).generation)


def store_of(cloud: Cloud) -> Database:
    return cloud.runtime.database("network", model.open_database)


async def statements(
    store: Database, function: Callable[..., Any], *args: Any, writes: bool = False
) -> int:
    """Count the statements of a unit."""
    execute = store.peewee.execute_sql

    def read() -> int:
        count, here = 0, threading.get_ident()

        def counting(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += threading.get_ident() == here  # others read meanwhile
            return execute(*args, **options)

        store.peewee.execute_sql = counting  # type: ignore[method-assign]
        try:
            function(*args)
        finally:
            del store.peewee.execute_sql
        return count

    return await (store.write(read) if writes else store.read(read))


async def test_only_hosts_on_what_has_changed_have_something_to_do(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    store = store_of(cloud)
    networks = [(await ann.net())[0].metadata.id for _ in range(2)]
    async with AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(cloud.host(f"192.0.2.{number}"))
            for number in range(1, 7)
        ]
        groups = []
        for network in networks:
            groups.append((await ann.create("SecurityGroup", f"of {network}")).metadata.id)
        for number, host in enumerate(hosts[:5]):
            on = number % 2  # 0, 2, 4 on the first network; 1, 3 on the second; the last on none
            port = await cloud.ensure(ann.project_id, networks[on], security_group_ids=[groups[on]])
            await cloud.bind(host, port, new_domain())
        for host in hosts:
            number = await store.read(generation, host.id)
            await host.until(lambda h=host, n=number: h.generation >= n)
            await host.report(number)
        assert await store.read(lambda: SOURCE.pending(urgent=False)) == []

        port = await cloud.ensure(ann.project_id, networks[0], security_group_ids=[groups[0]])
        await cloud.bind(hosts[0], port, new_domain())
        behind = await store.read(lambda: SOURCE.pending(urgent=False))
        assert {each.host_id: each.urgent for each in behind} == {
            hosts[0].id: True,
            hosts[2].id: False,
            hosts[4].id: False,
        }
        urgent = await store.read(lambda: SOURCE.pending(urgent=True))
        assert {each.host_id for each in urgent} == {hosts[0].id}

        everybody = [host.id for host in hosts]
        assert set(await store.read(SOURCE.desired, everybody)) == {h.id for h in hosts[:5:2]}
        assert await statements(store, SOURCE.desired, everybody) == await statements(
            store, SOURCE.desired, [hosts[0].id]
        )
        assert await statements(store, SOURCE.desired, [hosts[5].id]) == 1


def reserving(project_id: str, network_id: str) -> port_service_pb2.EnsurePortRequest:
    return port_service_pb2.EnsurePortRequest(
        project_id=project_id,
        instance_id=ids.new("i"),
        port_id=ids.new("port"),
        spec=port_pb2.PortSpec(network_id=network_id),
        lease_number=1,
    )


def binding(host_id: str, port_id: str) -> tuple[auth.Caller, port_service_pb2.BindPortRequest]:
    """What the gate makes of a host's call, and its request."""
    domain = new_domain()
    named = auth.Delegation(host_id, domain, 1, frozenset(), frozenset([port_id]), frozenset())
    certificate = auth.Certificate("1", "", "", host_id=host_id)
    caller = auth.Caller(Rule.CALLER_DELEGATE, certificate=certificate, delegation=named)
    return caller, port_service_pb2.BindPortRequest(port_id=port_id, domain_id=domain)


async def test_a_port_costs_as_few_statements_however_many_there_are(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    store = store_of(cloud)
    network = (await ann.net())[0].metadata.id
    hosts = [ids.new("h") for _ in range(3)]
    counts = []
    for number in range(6):
        request = reserving(ann.project_id, network)
        ensured = await statements(store, binding_store.ensure, request, writes=True)
        call = binding(hosts[number % 3], request.port_id)
        counts.append((ensured, await statements(store, binding_store.bind, *call, writes=True)))
    # The first made the project's quota and group, and three were the first of their hosts.
    most = (10, 8) if store.is_postgresql else (7, 4)  # the one locks, the other has locked
    assert counts[3:] == [most] * 3


async def test_a_port_may_be_bound_before_its_hosts_first_session(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network = (await ann.net())[0].metadata.id
    port = await cloud.ensure(ann.project_id, network)
    host = cloud.host("192.0.2.1")
    bound = await cloud.bind(host, port, new_domain())
    assert bound.dataplane_generation > 0
    async with host:
        assert host.generation >= bound.dataplane_generation
        assert host.port(port.metadata.id)


async def test_a_repeat_finds_its_port_where_the_project_may_have_no_more(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    store = store_of(cloud)
    request = reserving(ann.project_id, (await ann.net())[0].metadata.id)
    made = await store.write(binding_store.ensure, request)
    await store.write(
        lambda: (
            model.Quota.update(port_count=1)
            .where(model.Quota.project_id == ann.project_id)
            .execute()
        )
    )
    assert await store.write(binding_store.ensure, request) == made
    more = reserving(ann.project_id, request.spec.network_id)
    assert (await refused(store.write(binding_store.ensure, more))).reason == "QUOTA_EXCEEDED"


async def test_of_what_a_host_has_told_the_newest_counts(cloud: Cloud) -> None:
    """Reports are written together: also several of a host, and some that are late."""
    ann = await cloud.member("ann")
    store = store_of(cloud)
    network = (await ann.net())[0].metadata.id
    epoch = await store.read(model.shared.epoch)
    hosts = [ids.new("h") for _ in range(2)]
    requests = [reserving(ann.project_id, network) for _ in hosts]
    reached = []
    for host, request in zip(hosts, requests, strict=True):
        await store.write(binding_store.ensure, request)
        bound = await store.write(binding_store.bind, *binding(host, request.port_id))
        reached.append(bound.dataplane_generation)

    def report(host: int, generation: int, sequence: int, incarnation: int = 1) -> HostReport:
        told = session_pb2.Observed(
            id=hosts[host], generation=generation, sequence=sequence, epoch=epoch
        )
        return HostReport(hosts[host], incarnation, told)

    def look() -> list[tuple[int, int, int, str]]:
        rows = [model.HostDataplane.get_by_id(host) for host in hosts]
        ports = [model.Port.get_by_id(request.port_id) for request in requests]
        return [
            (row.observed_generation, row.incarnation, row.sequence, port.state)
            for row, port in zip(rows, ports, strict=True)
        ]

    await store.write(
        SOURCE.observed, [report(0, 1, 1), report(0, 0, 2), report(1, reached[1], 1)], epoch
    )
    assert await store.read(look) == [(0, 1, 2, "BUILD"), (reached[1], 1, 1, "ACTIVE")]
    late = [report(0, reached[0], 1), report(0, reached[0], 2), report(1, 0, 9, incarnation=0)]
    await store.write(SOURCE.observed, late, epoch)
    assert await store.read(look) == [(0, 1, 2, "BUILD"), (reached[1], 1, 1, "ACTIVE")]
    await store.write(SOURCE.observed, [report(0, reached[0], 1, incarnation=2)], epoch)
    assert (await store.read(look))[0] == (reached[0], 2, 1, "ACTIVE")


async def test_after_any_change_whoever_it_concerns_has_a_new_generation(cloud: Cloud) -> None:
    """What is worked out for many hosts is what is worked out for each; and no change is missed."""
    draw = random.Random(7)  # noqa: S311
    ann = await cloud.member("ann")
    store = store_of(cloud)
    networks = [(await ann.net(f"10.{number}.0.0/24"))[0].metadata.id for number in range(3)]
    groups = [(await ann.create("SecurityGroup", f"g{number}")).metadata.id for number in range(3)]
    bound: list[tuple[Any, str]] = []
    rules: list[str] = []

    async def bind(hosts: list[DataplaneHost]) -> None:
        chosen = draw.sample(groups, draw.randint(1, 2))
        port = await cloud.ensure(ann.project_id, draw.choice(networks), security_group_ids=chosen)
        domain = new_domain()
        await cloud.bind(draw.choice(hosts), port, domain)
        bound.append((port, domain))

    async def unbind(_: list[DataplaneHost]) -> None:
        if bound:
            port, domain = bound.pop(draw.randrange(len(bound)))
            await cloud.unbind(port, domain)
            await cloud.release(port)

    async def add_rule(_: list[DataplaneHost]) -> None:
        rule = await ann.create(
            "SecurityGroupRule",
            security_group_id=draw.choice(groups),
            direction=1,
            ip_version=4,
            protocol="tcp",
            port_min=(number := len(rules) + 1),
            port_max=number,
            remote_group_id=draw.choice(groups),
        )
        rules.append(rule.metadata.id)

    async def delete_rule(_: list[DataplaneHost]) -> None:
        if rules and rules[-1]:
            await ann.delete("SecurityGroupRule", rules[-1])
            rules[-1] = ""

    async def seen(hosts: list[DataplaneHost]) -> dict[str, tuple[int, bytes]]:
        def look() -> dict[str, tuple[int, bytes]]:
            ids = [host.id for host in hosts]
            documents = dataplane_document.documents(ids)
            for id_ in ids:
                assert dataplane_document.documents([id_]) == {id_: documents[id_]}
            return {id_: (generation(id_), documents[id_].content) for id_ in ids}

        return await store.read(look)

    async with AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(cloud.host(f"192.0.2.{number}"))
            for number in range(1, 5)
        ]
        before = await seen(hosts)
        for change in draw.choices((bind, unbind, add_rule, delete_rule), (4, 2, 2, 1), k=30):
            await change(hosts)
            after = await seen(hosts)
            for host in hosts:
                (number, document), (new_number, new_document) = before[host.id], after[host.id]
                assert (new_number > number) or document == new_document, change.__name__
            before = after
