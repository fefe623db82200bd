"""The thinnest path that a boot needs, over real channels."""

from __future__ import annotations

from fakes.dataplane_host import new_domain
from mcloud.common.v1 import operation_pb2
from mcloud.network.v1 import dataplane_pb2, port_pb2, port_service_pb2
from mcloud_base import errors, ids, rpc
from service.network.cloud import Cloud, eventually, refused


async def test_a_port_goes_from_reserved_to_active_to_gone(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, subnet = await ann.net(dns_servers=["9.9.9.9"])
    network_id = network.metadata.id
    assert network.status.mtu == 1450
    assert (subnet.status.gateway_ip, subnet.status.service_ip) == ("10.0.0.1", "10.0.0.2")
    assert subnet.status.free_address_count == 252

    instance, domain = ids.new("i"), new_domain()
    port = await cloud.ensure(ann.project_id, network_id, instance)
    assert port.status.state == port_pb2.PortStatus.STATE_DOWN
    assert [ip.ip_address for ip in port.status.fixed_ips] == ["10.0.0.3"]
    assert port.status.mac.startswith("fa:16:3e:")
    again = await cloud.ensure(
        ann.project_id, network_id, instance, port_id=port.metadata.id, lease_number=2
    )
    assert again == port

    async with cloud.host("192.0.2.1") as host, cloud.host("192.0.2.2") as other:
        assert not host.document.ports
        call = host.ports.BindPort(
            port_service_pb2.BindPortRequest(
                port_id=port.metadata.id, domain_id=domain, generation=1
            ),
            metadata=await cloud.delegate(host, ann.project_id, domain, port.metadata.id),
            timeout=30,
        )
        bound = await call
        step = operation_pb2.OperationStep.FromString(
            dict(await call.trailing_metadata())["mcloud-step-bin"]
        )
        assert (step.number, step.name, step.service) == (13, "network authorizes", "network")
        assert step.end_time.ToMicroseconds() >= step.start_time.ToMicroseconds() > 0
        assert bound.binding.device_name == "tap" + port.metadata.id[-11:]
        assert bound.binding.hostname == "guest"
        assert bound.network.vni == network.status.vni
        await host.until(lambda: host.generation >= bound.dataplane_generation)
        whole = host.port(port.metadata.id)
        assert whole
        # The rules come with the dataplane; whoever binds is not told them.
        assert not bound.binding.rules
        told = dataplane_pb2.PortBinding.FromString(whole.SerializeToString())
        told.ClearField("rules")
        assert told == bound.binding
        segment = host.segment(network_id)
        assert segment == bound.network
        assert segment.subnets[0].dns_servers == ["9.9.9.9"]
        assert await cloud.bind(host, port, domain) == bound
        directions = [(rule.direction, rule.ip_version) for rule in whole.rules]
        assert sorted(directions) == [
            (dataplane_pb2.EffectiveRule.DIRECTION_INGRESS, 4),
            (dataplane_pb2.EffectiveRule.DIRECTION_INGRESS, 6),
            (dataplane_pb2.EffectiveRule.DIRECTION_EGRESS, 4),
            (dataplane_pb2.EffectiveRule.DIRECTION_EGRESS, 6),
        ]

        elsewhere = await refused(cloud.bind(other, port, domain))
        assert elsewhere.reason == "PORT_BOUND_ELSEWHERE"
        seen = await ann.get("Port", port.metadata.id)
        assert seen.status.state == port_pb2.PortStatus.STATE_BUILD
        await host.report()
        seen = await ann.get("Port", port.metadata.id)
        assert seen.status.state == port_pb2.PortStatus.STATE_ACTIVE

        assert (await refused(cloud.release(port, 2))).reason == "PORT_BOUND"
        gone = await cloud.unbind(port, domain)
        assert (gone.status.host_id, gone.status.domain_id) == ("", "")
        await host.until(lambda: not host.document.ports)
        late = await refused(cloud.bind(host, port, domain))
        assert late.reason == "ID_RETIRED"
        await cloud.release(port, 2)
        await cloud.release(port, 2)
        assert (await refused(cloud.bind(host, port, new_domain()))).reason == "ID_RETIRED"
        missing = await refused(ann.get("Port", port.metadata.id))
        assert isinstance(missing, errors.NotFound)
        late = await refused(
            cloud.ensure(
                ann.project_id, network_id, instance, port_id=port.metadata.id, lease_number=3
            )
        )
        assert late.reason == "ID_RETIRED"


async def test_only_what_the_token_names_is_bound(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    port = await cloud.ensure(ann.project_id, network.metadata.id)
    other = await cloud.ensure(ann.project_id, network.metadata.id)
    host, domain = cloud.host("192.0.2.1"), new_domain()
    metadata = await cloud.delegate(host, ann.project_id, domain, port.metadata.id)
    for request in (
        port_service_pb2.BindPortRequest(port_id=other.metadata.id, domain_id=domain),
        port_service_pb2.BindPortRequest(port_id=port.metadata.id, domain_id=new_domain()),
    ):
        error = await refused(rpc.call(host.ports.BindPort, request, metadata=metadata))
        assert error.reason == "NOT_DELEGATED"
        assert isinstance(error, errors.PermissionDenied)


async def test_a_users_port_is_taken_and_given_back(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    own = await ann.create(
        "Port",
        network_id=network.metadata.id,
        fixed_ips=[port_pb2.FixedIpRequest(ip_address="10.0.0.77")],
        mac="52:54:00:00:00:01",
    )
    taken = await cloud.ensure(ann.project_id, "", port_id=own.metadata.id, existing=True)
    assert taken.status.owner_type == "instance"
    assert taken.status.fixed_ips[0].ip_address == "10.0.0.77"
    second = await refused(cloud.ensure(ann.project_id, "", port_id=own.metadata.id, existing=True))
    assert second.reason == "PORT_IN_USE"
    assert (await refused(ann.delete("Port", own.metadata.id))).reason == "PORT_IN_USE"
    bob = await cloud.member("bob")
    foreign = await refused(
        cloud.ensure(bob.project_id, "", port_id=own.metadata.id, existing=True)
    )
    assert foreign.reason == "PORT_NOT_FOUND"

    await cloud.release(taken)
    free = await ann.get("Port", own.metadata.id)
    assert free.status.owner_type == ""
    await cloud.ensure(ann.project_id, "", port_id=own.metadata.id, existing=True)
    back = await refused(
        cloud.ensure(
            ann.project_id, "", taken.status.owner_id, port_id=own.metadata.id, existing=True
        )
    )
    assert back.reason == "ID_RETIRED"


async def test_an_overtaken_runner_reserves_nothing(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    port = await cloud.ensure(ann.project_id, network.metadata.id, lease_number=5)
    stale = await refused(
        cloud.ensure(
            ann.project_id,
            network.metadata.id,
            port.status.owner_id,
            port_id=port.metadata.id,
            lease_number=4,
        )
    )
    assert stale.reason == "STALE_LEASE"
    assert (await refused(cloud.release(port, lease_number=4))).reason == "STALE_LEASE"
    await cloud.release(port, lease_number=5)

    async def deleted() -> bool:
        return not (await ann.list("Port")).ports

    assert await eventually(deleted)
