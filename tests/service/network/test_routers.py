"""Routers and floating addresses: the way in and out, and what hosts are told of it."""

from __future__ import annotations

from typing import Any

from fakes.dataplane_host import DataplaneHost, new_domain
from mcloud.network.v1 import dataplane_pb2
from mcloud_base import errors
from service.network.cloud import Cloud, User, refused


async def outside(admin: User, cidr: str = "203.0.113.0/28", **spec: Any) -> str:
    network = await admin.create("Network", "out", external=True, physical_network="outside")
    await admin.create(
        "Subnet", network_id=network.metadata.id, cidr=cidr, dhcp_disabled=True, **spec
    )
    return str(network.metadata.id)


def router(host: DataplaneHost) -> dataplane_pb2.RouterBinding | None:
    return host.document.routers[0] if host.document.routers else None


def remote_ports(host: DataplaneHost, network_id: str) -> list[dataplane_pb2.RemotePort]:
    segment = host.segment(network_id)
    return list(segment.remote_ports) if segment else []


async def test_a_guest_is_reached_under_a_floating_address(cloud: Cloud) -> None:
    admin, ann = await cloud.admin(), await cloud.member("ann")
    external = await outside(admin)
    network, subnet = await ann.net()
    async with cloud.host("192.0.2.1", "gateway") as gateway, cloud.host("192.0.2.2") as guests:
        made = await ann.create("Router", external_network_id=external)
        assert made.status.host_id == gateway.id
        assert made.status.gateway_ip == "203.0.113.2"
        joined = await ann.leg("Add", made.metadata.id, subnet.metadata.id)
        assert [i.ip_address for i in joined.status.interfaces] == ["10.0.0.1"]
        port = await cloud.ensure(ann.project_id, network.metadata.id)
        await cloud.bind(guests, port, new_domain())
        fip = await ann.create("FloatingIp", external_network_id=external, port_id=port.metadata.id)
        assert fip.status.floating_ip_address == "203.0.113.3"
        assert fip.status.fixed_ip_address == "10.0.0.3"
        assert fip.status.router_id == made.metadata.id

        def translated() -> list[tuple[str, str]]:
            found = router(gateway)
            return (
                [(f.floating_ip_address, f.fixed_ip_address) for f in found.floating_ips]
                if found
                else []
            )

        await gateway.until(lambda: translated() == [("203.0.113.3", "10.0.0.3")])
        found = router(gateway)
        assert found is not None
        assert found.gateway.ip_address == "203.0.113.2"
        assert found.gateway.next_hop_ip == "203.0.113.1"
        assert found.gateway.physical_network == "outside"
        assert (found.gateway.prefix_len, found.gateway.snat_enabled) == (28, True)
        (leg,) = found.interfaces
        assert (leg.ip_address, leg.prefix_len) == ("10.0.0.1", 24)
        wire = gateway.segment(external)
        assert wire is not None
        assert wire.physical_network == "outside"
        assert not wire.remote_ports
        assert not wire.subnets[0].service_ip
        assert not wire.subnets[0].dhcp_enabled

        # Each learns of the other's end of the overlay.
        inside = gateway.segment(network.metadata.id)
        assert inside is not None
        assert [p.mac for p in inside.remote_ports] == [port.status.mac]
        await guests.until(
            lambda: [p.mac for p in remote_ports(guests, network.metadata.id)] == [leg.mac]
        )

        for reason, attempt in (
            ("INTERFACE_IN_USE", ann.leg("Remove", made.metadata.id, subnet.metadata.id)),
            ("ROUTER_IN_USE", ann.delete("Router", made.metadata.id)),
            (
                "ROUTER_IN_USE",
                ann.update("Router", made.metadata.id, "spec.external_network_id", spec={}),
            ),
            (
                "PORT_HAS_FLOATING_IP",
                ann.create("FloatingIp", external_network_id=external, port_id=port.metadata.id),
            ),
        ):
            assert (await refused(attempt)).reason == reason

        await ann.update("FloatingIp", fip.metadata.id, "spec.port_id", spec={})
        await gateway.until(lambda: translated() == [])
        await ann.update(
            "FloatingIp", fip.metadata.id, "spec.port_id", spec={"port_id": port.metadata.id}
        )
        await gateway.until(translated)

        # The guest goes; its floating address stays and leads nowhere.
        await cloud.unbind(port, (await ann.get("Port", port.metadata.id)).status.domain_id)
        await cloud.release(port)
        await gateway.until(lambda: translated() == [])
        left = await ann.get("FloatingIp", fip.metadata.id)
        assert (left.spec.port_id, left.status.fixed_ip_address) == ("", "")

        await ann.delete("FloatingIp", fip.metadata.id)
        await ann.leg("Remove", made.metadata.id, subnet.metadata.id)
        await gateway.until(lambda: router(gateway) and not router(gateway).interfaces)
        await ann.update("Router", made.metadata.id, "spec.external_network_id", spec={})
        await gateway.until(lambda: router(gateway) and not router(gateway).HasField("gateway"))
        await ann.delete("Router", made.metadata.id)
        await gateway.until(lambda: not gateway.document.routers)
        await gateway.until(lambda: not gateway.document.networks)
        assert not (await ann.list("Port")).ports
        await admin.delete("Network", external)


async def test_a_router_waits_for_the_first_host(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    _, subnet = await ann.net()
    made = await ann.create("Router", description="r")
    await ann.leg("Add", made.metadata.id, subnet.metadata.id)
    assert not (await ann.get("Router", made.metadata.id)).status.host_id
    async with cloud.host("192.0.2.1") as first:
        assert router(first)
        assert len(router(first).interfaces) == 1
        assert (await ann.get("Router", made.metadata.id)).status.host_id == first.id
        # It stays where it is, whoever comes.
        async with cloud.host("192.0.2.2", "gateway") as second:
            assert not second.document.routers
        await first.report()
        (leg,) = (await ann.list("Port")).ports
        assert leg.status.owner_type == "router"
        assert leg.status.state == leg.status.STATE_ACTIVE
        assert (await refused(ann.delete("Port", leg.metadata.id))).reason == "PORT_IN_USE"


async def test_what_cannot_be_joined_is_refused(cloud: Cloud) -> None:
    admin, ann = await cloud.admin(), await cloud.member("ann")
    external = await outside(admin, "203.0.113.0/29")
    network, subnet = await ann.net()
    id_ = network.metadata.id
    first = await ann.create("Router", external_network_id=external)
    second = await ann.create("Router", description="r")
    bare = await ann.create("Subnet", network_id=id_, cidr="10.5.0.0/24", gateway_disabled=True)
    six = await ann.create("Subnet", network_id=id_, cidr="fd00::/64")
    _, twin = await ann.net()
    await ann.leg("Add", first.metadata.id, subnet.metadata.id)
    port = await ann.create("Port", network_id=(await ann.net("10.6.0.0/24"))[0].metadata.id)
    for reason, attempt in (
        ("NETWORK_NOT_EXTERNAL", ann.create("Router", external_network_id=id_)),
        ("ADDRESS_IN_USE", ann.leg("Add", second.metadata.id, subnet.metadata.id)),
        ("SUBNET_WITHOUT_GATEWAY", ann.leg("Add", first.metadata.id, bare.metadata.id)),
        ("BAD_FIELD", ann.leg("Add", first.metadata.id, six.metadata.id)),
        ("SUBNET_OVERLAPS", ann.leg("Add", first.metadata.id, twin.metadata.id)),
        (
            "NO_ROUTE_TO_PORT",
            ann.create("FloatingIp", external_network_id=external, port_id=port.metadata.id),
        ),
        ("NETWORK_NOT_EXTERNAL", ann.create("FloatingIp", external_network_id=id_)),
        (
            "BAD_FIELD",
            ann.create(
                "FloatingIp", external_network_id=external, floating_ip_address="203.0.113.1"
            ),
        ),
        (
            "BAD_FIELD",
            ann.create("FloatingIp", external_network_id=external, floating_ip_address="10.0.0.9"),
        ),
    ):
        assert (await refused(attempt)).reason == reason, reason
    certain = await ann.create(
        "FloatingIp", external_network_id=external, floating_ip_address="203.0.113.5"
    )
    assert certain.status.floating_ip_address == "203.0.113.5"
    error = await refused(
        ann.create("FloatingIp", external_network_id=external, floating_ip_address="203.0.113.5")
    )
    assert error.reason == "ADDRESS_IN_USE"
    for _ in range(3):
        await ann.create("FloatingIp", external_network_id=external)
    error = await refused(ann.create("FloatingIp", external_network_id=external))
    assert isinstance(error, errors.Exhausted)
    assert error.reason == "NO_FREE_ADDRESS"
    # What was refused left no port behind: a gateway, a leg, a user's, four floating ones.
    assert len((await ann.list("Port")).ports) == 7
