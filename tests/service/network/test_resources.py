"""Networks, subnets and ports as users make, see, change and delete them."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from mcloud.common.v1 import metadata_pb2
from mcloud.network.v1 import network_service_pb2, port_pb2, subnet_pb2
from mcloud_base import errors, ids, rpc
from mcloud_controlplane.network import model
from service.network.cloud import Cloud, Rule, refused

FixedIp = port_pb2.FixedIpRequest
Pool = subnet_pb2.AllocationPool


async def test_another_projects_things_do_not_exist(cloud: Cloud) -> None:
    ann, bob = await cloud.member("ann"), await cloud.member("bob")
    network, subnet = await ann.net()
    port = await ann.create("Port", network_id=network.metadata.id)
    group = await ann.create("SecurityGroup", "web")
    router = await ann.create("Router", description="r")
    for kind, resource in (
        ("Network", network),
        ("Subnet", subnet),
        ("Port", port),
        ("SecurityGroup", group),
        ("Router", router),
    ):
        for attempt in (bob.get, bob.delete):
            error = await refused(attempt(kind, resource.metadata.id))
            assert isinstance(error, errors.NotFound), (kind, error)
    error = await refused(bob.create("Port", network_id=network.metadata.id))
    assert error.reason == "NETWORK_NOT_FOUND"
    error = await refused(bob.create("Subnet", network_id=network.metadata.id, cidr="10.1.0.0/24"))
    assert error.reason == "NETWORK_NOT_FOUND"
    own, _ = await bob.net()
    error = await refused(
        bob.create("Port", network_id=own.metadata.id, security_group_ids=[group.metadata.id])
    )
    assert error.reason == "SECURITY_GROUP_NOT_FOUND"
    assert [n.metadata.id for n in (await bob.list("Network")).networks] == [own.metadata.id]
    assert len((await bob.list("Subnet")).subnets) == 1
    assert not (await bob.list("Port")).ports


async def test_shared_and_external_networks_are_the_administrators(cloud: Cloud) -> None:
    ann, admin = await cloud.member("ann", Rule.ROLE_ADMIN), await cloud.admin()
    for spec in ({"shared": True}, {"external": True, "physical_network": "outside"}):
        error = await refused(ann.create("Network", **spec))
        assert error.reason == "ROLE_REQUIRED"
    error = await refused(admin.create("Network", external=True))
    assert "physical_network" in error.message
    watch = ann.stubs.network.WatchNetworks(
        network_service_pb2.WatchNetworksRequest(
            from_revision=(await ann.list("Network")).revision
        ),
        metadata=ann.metadata,
    )
    everybodys = await admin.create("Network", "everybodys", shared=True)
    outside = await admin.create("Network", "out", external=True, physical_network="outside")
    async with asyncio.timeout(30):
        seen = [(await anext(aiter(watch))).network.metadata.name for _ in range(2)]
    assert seen == ["everybodys", "out"]
    watch.cancel()
    assert outside.status.mtu == 1500
    for network, cidr in ((everybodys, "10.9.0.0/24"), (outside, "203.0.113.0/24")):
        await admin.create("Subnet", network_id=network.metadata.id, cidr=cidr)
    found = await ann.list("Network")
    assert {n.metadata.name for n in found.networks} == {"everybodys", "out"}
    assert len((await ann.list("Subnet")).subnets) == 2
    found = await ann.list("Network", filter="external=true")
    assert [n.metadata.name for n in found.networks] == ["out"]

    port = await ann.create("Port", network_id=everybodys.metadata.id)
    assert port.status.fixed_ips[0].ip_address == "10.9.0.3"
    error = await refused(
        ann.create(
            "Port",
            network_id=everybodys.metadata.id,
            fixed_ips=[FixedIp(ip_address="10.9.0.1")],
        )
    )
    assert error.reason == "ADDRESS_IN_USE"
    error = await refused(
        ann.create("Port", network_id=everybodys.metadata.id, port_security_disabled=True)
    )
    assert error.reason == "NOT_OWNER"
    error = await refused(ann.create("Port", network_id=outside.metadata.id))
    assert error.reason == "NETWORK_NOT_SHARED"
    for attempt in (
        ann.delete("Network", everybodys.metadata.id),
        ann.create("Subnet", network_id=everybodys.metadata.id, cidr="10.8.0.0/24"),
    ):
        error = await refused(attempt)
        assert isinstance(error, errors.PermissionDenied)
        assert error.reason == "NOT_OWNER"


async def test_subnets_lay_out_gateway_service_and_pools(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network = await ann.create("Network", mtu=1300)
    id_ = network.metadata.id
    assert network.status.mtu == 1300

    async def subnet(cidr: str, **spec: object) -> subnet_pb2.Subnet:
        made = await ann.create("Subnet", network_id=id_, cidr=cidr, **spec)
        assert isinstance(made, subnet_pb2.Subnet)
        return made

    def layout(made: subnet_pb2.Subnet) -> tuple[str, str, int]:
        status = made.status
        return status.gateway_ip, status.service_ip, status.free_address_count

    assert layout(await subnet("10.0.0.0/24")) == ("10.0.0.1", "10.0.0.2", 252)
    high = await subnet("10.0.1.0/24", gateway_ip="10.0.1.254")
    assert layout(high) == ("10.0.1.254", "10.0.1.1", 252)
    none = await subnet("10.0.2.0/24", gateway_disabled=True)
    assert layout(none) == ("", "10.0.2.1", 253)
    pooled = await subnet(
        "10.0.3.0/24",
        allocation_pools=[
            Pool(first_ip="10.0.3.100", last_ip="10.0.3.109"),
            Pool(first_ip="10.0.3.2", last_ip="10.0.3.11"),
        ],
    )
    assert layout(pooled) == ("10.0.3.1", "10.0.3.12", 20)
    whole = await subnet(
        "10.0.4.0/29", allocation_pools=[Pool(first_ip="10.0.4.2", last_ip="10.0.4.6")]
    )
    assert layout(whole) == ("10.0.4.1", "10.0.4.2", 4)
    six = await subnet("fd00:1::/64")
    assert layout(six)[:2] == ("fd00:1::1", "fd00:1::2")

    for reason, cidr, spec in (
        ("SUBNET_OVERLAPS", "10.0.0.128/25", {}),
        ("BAD_GATEWAY", "10.1.0.0/24", {"gateway_ip": "10.2.0.1"}),
        ("BAD_GATEWAY", "10.1.0.0/24", {"gateway_ip": "10.1.0.255"}),
        ("BAD_GATEWAY", "10.1.0.0/24", {"gateway_ip": "fd00::1"}),
        (
            "BAD_POOL",
            "10.1.0.0/24",
            {"allocation_pools": [Pool(first_ip="10.1.0.1", last_ip="10.1.0.9")]},
        ),
        (
            "BAD_POOL",
            "10.1.0.0/24",
            {"allocation_pools": [Pool(first_ip="10.1.0.9", last_ip="10.1.1.9")]},
        ),
        (
            "BAD_POOL",
            "10.1.0.0/24",
            {
                "allocation_pools": [
                    Pool(first_ip="10.1.0.5", last_ip="10.1.0.9"),
                    Pool(first_ip="10.1.0.9", last_ip="10.1.0.12"),
                ]
            },
        ),
        ("BAD_FIELD", "10.1.0.0/30", {}),
        ("BAD_FIELD", "fd00::/48", {}),
        ("BAD_REQUEST", "10.1.0.1/24", {}),
    ):
        error = await refused(subnet(cidr, **spec))
        assert error.reason == reason, (cidr, spec)

    # One address of each version, of the first subnet that has one.
    port = await ann.create("Port", network_id=id_)
    assert [ip.ip_address for ip in port.status.fixed_ips] == ["10.0.0.3", "fd00:1::3"]
    assert [ip.prefix_len for ip in port.status.fixed_ips] == [24, 64]
    changed = await ann.update(
        "Subnet", six.metadata.id, "spec.dns_servers", spec={"dns_servers": ["fd00:1::53"]}
    )
    assert changed.spec.dns_servers == ["fd00:1::53"]
    assert changed.spec.cidr == "fd00:1::/64"


async def test_a_port_gets_the_addresses_that_it_asks_for(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, subnet = await ann.net("10.0.0.0/29")
    id_ = network.metadata.id

    async def port(*wanted: FixedIp, **spec: object) -> list[str]:
        made = await ann.create("Port", network_id=id_, fixed_ips=wanted, **spec)
        return [ip.ip_address for ip in made.status.fixed_ips]

    assert await port(FixedIp(ip_address="10.0.0.5")) == ["10.0.0.5"]
    assert await port(FixedIp(subnet_id=subnet.metadata.id), FixedIp()) == [
        "10.0.0.6",
        "10.0.0.3",
    ]
    assert await port(mac="52:54:00:00:00:07") == ["10.0.0.4"]
    for reason, wanted, spec in (
        ("ADDRESS_IN_USE", FixedIp(ip_address="10.0.0.5"), {}),
        ("ADDRESS_IN_USE", FixedIp(ip_address="10.0.0.2"), {}),
        ("BAD_FIELD", FixedIp(ip_address="10.0.0.7"), {}),
        ("BAD_FIELD", FixedIp(ip_address="10.0.1.5"), {}),
        ("BAD_FIELD", FixedIp(ip_address="fd00::5"), {}),
        ("SUBNET_NOT_FOUND", FixedIp(subnet_id=ids.new("sub")), {}),
        ("NO_FREE_ADDRESS", FixedIp(), {}),
        ("MAC_IN_USE", FixedIp(), {"mac": "52:54:00:00:00:07"}),
        ("BAD_FIELD", FixedIp(), {"mac": "01:00:5e:00:00:07"}),
        ("ROLE_REQUIRED", FixedIp(), {"port_security_disabled": True}),
    ):
        error = await refused(port(wanted, **spec))
        assert error.reason == reason, wanted
    # What was refused left nothing behind.
    assert len((await ann.list("Port")).ports) == 3
    found = await ann.list("Port", filter='ip_address="10.0.0.6"')
    assert [p.status.fixed_ips[0].ip_address for p in found.ports] == ["10.0.0.6"]
    for kind, resource, reason in (
        ("Subnet", subnet, "SUBNET_IN_USE"),
        ("Network", network, "NETWORK_IN_USE"),
    ):
        error = await refused(ann.delete(kind, resource.metadata.id))
        assert error.reason == reason
        assert found.ports[0].metadata.id in error.message
    assert (await ann.get("Subnet", subnet.metadata.id)).status.free_address_count == 0
    for made in (await ann.list("Port")).ports:
        await ann.delete("Port", made.metadata.id)
    assert (await ann.get("Subnet", subnet.metadata.id)).status.free_address_count == 4
    await ann.delete("Network", id_)
    assert not (await ann.list("Subnet")).subnets


async def test_a_retry_makes_nothing_twice_and_a_dry_run_nothing(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    request_id = ids.request_id()
    fields = {"request_id": request_id, "name": "a", "spec": {"description": "d"}}
    first = await ann.mutate("Network", "Create", **fields)
    assert await ann.mutate("Network", "Create", **fields) == first
    tried = await ann.mutate(
        "Network", "Create", name="b", spec={"description": "d"}, validate_only=True
    )
    assert tried.metadata.id
    assert len((await ann.list("Network")).networks) == 1
    renamed = await ann.update("Network", first.metadata.id, "name", name="z")
    assert renamed.metadata.name == "z"
    error = await refused(
        ann.mutate(
            "Network",
            "Update",
            id=first.metadata.id,
            resource_version=first.metadata.resource_version,
            update_mask={"paths": ["name"]},
            name="y",
        )
    )
    assert error.reason == "VERSION_CONFLICT"
    error = await refused(ann.update("Network", first.metadata.id, "spec.mtu", spec={"mtu": 1300}))
    assert error.reason == "BAD_UPDATE_MASK"


async def test_quotas_are_counted_from_rows(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, subnet = await ann.net()
    store = cloud.runtime.database("network", model.open_database)

    def limit() -> None:
        model.Quota.update(
            network_count=1,
            subnet_count=1,
            port_count=1,
            security_group_count=2,
            security_group_rule_count=6,
            router_count=1,
        ).where(model.Quota.project_id == ann.project_id).execute()

    await store.write(limit)
    port = await ann.create("Port", network_id=network.metadata.id)
    group = await ann.create("SecurityGroup", "web")
    await ann.create("Router", description="r")
    for attempt in (
        ann.create("Network", description="d"),
        ann.create("Subnet", network_id=network.metadata.id, cidr="10.1.0.0/24"),
        ann.create("Port", network_id=network.metadata.id),
        cloud.ensure(ann.project_id, network.metadata.id),
        ann.create("SecurityGroup", "db"),
        ann.create(
            "SecurityGroupRule", security_group_id=group.metadata.id, direction=1, protocol="tcp"
        ),
        ann.create("Router", description="r"),
    ):
        error = await refused(attempt)
        assert isinstance(error, errors.Exhausted)
        assert error.reason == "QUOTA_EXCEEDED"
    await ann.delete("Port", port.metadata.id)
    await cloud.ensure(ann.project_id, network.metadata.id)
    assert subnet.metadata.id


async def test_lists_and_watches_fit_together(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    made = [
        await ann.create("Port", f"p{number}", network_id=network.metadata.id)
        for number in range(5)
    ]
    names, token = [], ""
    while True:
        page = await ann.list("Port", page_size=2, page_token=token, order_by="name desc")
        names += [port.metadata.name for port in page.ports]
        if not (token := page.next_page_token):
            break
    assert names == ["p4", "p3", "p2", "p1", "p0"]

    from mcloud.network.v1 import port_service_pb2

    watch = ann.stubs.port.WatchPorts(
        port_service_pb2.WatchPortsRequest(from_revision=page.revision), metadata=ann.metadata
    )
    await ann.update("Port", made[0].metadata.id, "name", name="first")
    await ann.delete("Port", made[1].metadata.id)
    async with asyncio.timeout(30):
        changed, deleted = [await anext(aiter(watch)) for _ in range(2)]
    assert changed.type == metadata_pb2.CHANGE_TYPE_MODIFIED
    assert changed.port.metadata.name == "first"
    assert deleted.type == metadata_pb2.CHANGE_TYPE_DELETED
    assert deleted.port.metadata.id == made[1].metadata.id
    watch.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await anext(aiter(watch))


async def test_the_ports_of_instances_are_listed_for_verification(cloud: Cloud) -> None:
    from mcloud.network.v1 import port_service_pb2

    ann = await cloud.member("ann")
    network, _ = await ann.net()
    await ann.create("Port", network_id=network.metadata.id)
    owned = [await cloud.ensure(ann.project_id, network.metadata.id) for _ in range(3)]
    found, after = [], ""
    while True:
        answer = await rpc.call(
            cloud.service.port.ListOwnedPorts,
            port_service_pb2.ListOwnedPortsRequest(after_id=after),
        )
        if not answer.ports:
            break
        found += [port.metadata.id for port in answer.ports]
        after = found[-1]
    assert found == sorted(port.metadata.id for port in owned)
