"""The document of a host's dataplane: what moves it, who gets it, what is recorded of it."""

from __future__ import annotations

import asyncio
import threading

from fakes.dataplane_host import DataplaneHost, new_domain
from mcloud.network.v1 import port_pb2
from mcloud_controlplane.network import dataplane_store, model
from service.network.cloud import Cloud, eventually

State = port_pb2.PortStatus


def remote(host: DataplaneHost, network_id: str) -> list[tuple[str, str]]:
    segment = host.segment(network_id)
    return [(p.mac, p.underlay_ip) for p in segment.remote_ports] if segment else []


async def test_hosts_learn_where_a_networks_other_ports_are(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, subnet = await ann.net()
    id_ = network.metadata.id
    ports = [await cloud.ensure(ann.project_id, id_) for _ in range(2)]
    domains = [new_domain(), new_domain()]
    async with cloud.host("192.0.2.1") as first, cloud.host("192.0.2.2") as second:
        await cloud.bind(first, ports[0], domains[0])
        await first.until(lambda: first.segment(id_))
        assert remote(first, id_) == []
        await cloud.bind(second, ports[1], domains[1])
        await first.until(lambda: remote(first, id_) == [(ports[1].status.mac, "192.0.2.2")])
        await second.until(lambda: remote(second, id_) == [(ports[0].status.mac, "192.0.2.1")])
        segments = [host.segment(id_) for host in (first, second)]
        assert segments[0]
        assert segments[1]
        assert segments[0].service_mac == segments[1].service_mac
        assert int(segments[0].service_mac[:2], 16) & 3 == 2  # local, of one interface
        assert segments[0].subnets == segments[1].subnets

        await ann.update(
            "Subnet", subnet.metadata.id, "spec.dns_servers", spec={"dns_servers": ["9.9.9.9"]}
        )
        for host in (first, second):
            await host.until(lambda h=host: list(h.segment(id_).subnets[0].dns_servers))

        await cloud.unbind(ports[1], domains[1])
        await first.until(lambda: remote(first, id_) == [])
        await second.until(lambda: not second.document.networks)


async def test_a_host_that_moves_is_found_at_its_new_address(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    id_ = network.metadata.id
    ports = [await cloud.ensure(ann.project_id, id_) for _ in range(2)]
    moving = cloud.host("192.0.2.2")
    async with cloud.host("192.0.2.1") as staying:
        async with moving:
            await cloud.bind(staying, ports[0], new_domain())
            await cloud.bind(moving, ports[1], new_domain())
            await staying.until(lambda: remote(staying, id_))
        moving.underlay_ip, moving.generation, moving.incarnation = "192.0.2.9", 0, 2
        async with moving:
            # A session begins with everything, also where nothing has changed.
            assert moving.port(ports[1].metadata.id)
            await staying.until(lambda: remote(staying, id_)[0][1] == "192.0.2.9")


async def test_only_what_is_newer_is_recorded(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    port = await cloud.ensure(ann.project_id, network.metadata.id)
    store = cloud.runtime.database("network", model.open_database)

    async def state() -> int:
        return int((await ann.get("Port", port.metadata.id)).status.state)

    async def row() -> tuple[int, int]:
        found = await store.read(lambda: model.HostDataplane.get_by_id(host.id))
        return found.observed_generation, found.sequence

    async with cloud.host("192.0.2.1") as host:
        bound = await cloud.bind(host, port, new_domain())
        reached = bound.dataplane_generation
        await host.until(lambda: host.generation >= reached)
        await host.report(reached - 1)
        assert await state() == State.STATE_BUILD
        await host.report(reached, epoch="of another life")
        assert await row() == (0, 2)
        await host.report(reached - 1, error="no bridge")
        found = await store.read(lambda: model.HostDataplane.get_by_id(host.id))
        assert found.error
        assert await state() == State.STATE_BUILD
        await host.report(reached)
        assert await state() == State.STATE_ACTIVE
        await host.report(reached - 1, sequence=2)
        assert await row() == (reached, 4)
        assert await state() == State.STATE_ACTIVE


async def test_what_the_host_has_is_not_sent_again(cloud: Cloud) -> None:
    store = cloud.runtime.database("network", model.open_database)
    source = dataplane_store.Source()
    async with cloud.host("192.0.2.1") as host:
        assert len((await store.read(source.desired, [host.id]))[host.id]) == 1
        await host.report()
        assert await store.read(source.desired, [host.id]) == {}
        (whole,) = await store.read(source.everything, host.id)
        assert (whole.id, whole.generation, whole.absent) == (host.id, 1, False)


async def test_ports_bound_at_the_same_time_do_not_miss_each_other(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    id_ = network.metadata.id
    async with cloud.host("192.0.2.1") as first, cloud.host("192.0.2.2") as second:
        for _ in range(5):
            ports = [await cloud.ensure(ann.project_id, id_) for _ in range(4)]
            hosts = [first, second, first, second]
            domains = [new_domain() for _ in ports]
            await asyncio.gather(*map(cloud.bind, hosts, ports, domains))
            addresses = {f"{port.status.fixed_ips[0].ip_address}/32" for port in ports}
            for host in (first, second):
                here = [p for p, h in zip(ports, hosts, strict=True) if h is host]
                there = {p.status.mac for p, h in zip(ports, hosts, strict=True) if h is not host}

                def whole(
                    host: DataplaneHost = host,
                    there: set[str] = there,
                    addresses: set[str] = addresses,
                    here: list[port_pb2.Port] = here,
                ) -> bool:
                    bound = [host.port(port.metadata.id) for port in here]
                    members = [
                        set(rule.remote_cidrs)
                        for port in bound
                        if port
                        for rule in port.rules
                        if rule.remote_is_group and rule.ip_version == 4
                    ]
                    return (
                        {mac for mac, _ in remote(host, id_)} == there
                        and all(bound)
                        and members == [addresses] * len(here)
                    )

                await host.until(whole)
            await asyncio.gather(*map(cloud.unbind, ports, domains))
            for port in ports:
                await cloud.release(port)


async def test_the_document_costs_the_same_number_of_statements_for_many_ports(
    cloud: Cloud,
) -> None:
    ann = await cloud.member("ann")
    store = cloud.runtime.database("network", model.open_database)
    source = dataplane_store.Source()
    count: list[str] = []
    counted = [0]
    execute = store.peewee.execute_sql

    def counting(sql: str, *args: object, **kwargs: object) -> object:
        if threading.get_ident() == counted[0]:
            count.append(sql)
        return execute(sql, *args, **kwargs)

    async def statements(host_id: str) -> int:
        def read() -> int:
            count.clear()
            counted[0] = threading.get_ident()  # other hosts' sessions read meanwhile
            store.peewee.execute_sql = counting
            try:
                source.everything(host_id)
            finally:
                del store.peewee.execute_sql
            return len(count)

        return await store.read(read)

    async with cloud.host("192.0.2.1") as host, cloud.host("192.0.2.2") as other:
        seen = []
        for size in (1, 4):
            for _ in range(size):
                network, _ = await ann.net()
                for where in (host, other):
                    port = await cloud.ensure(ann.project_id, network.metadata.id)
                    await cloud.bind(where, port, new_domain())

            async def settled(size: int = size) -> bool:
                return len(host.document.ports) >= size

            await eventually(settled)
            seen.append(await statements(host.id))
        assert seen[0] == seen[1]
        assert seen[0] <= 14
