"""Security groups: the default, rules in their one form, and what hosts are told of them."""

from __future__ import annotations

from fakes.dataplane_host import DataplaneHost, new_domain
from mcloud.network.v1 import dataplane_pb2, security_group_pb2
from mcloud_base import errors
from service.network.cloud import Cloud, refused

Spec = security_group_pb2.SecurityGroupRuleSpec
INGRESS, EGRESS = Spec.DIRECTION_INGRESS, Spec.DIRECTION_EGRESS


async def test_the_default_group_is_made_when_first_needed(cloud: Cloud) -> None:
    ann, bob = await cloud.member("ann"), await cloud.member("bob")
    (group,) = (await ann.list("SecurityGroup")).security_groups
    assert group.metadata.name == "default"
    assert (await ann.list("SecurityGroup")).security_groups == [group]
    rules = [
        (rule.spec.direction, rule.spec.ip_version, rule.spec.remote_group_id)
        for rule in group.status.rules
    ]
    id_ = group.metadata.id
    assert sorted(rules) == [(1, 4, id_), (1, 6, id_), (2, 4, ""), (2, 6, "")]
    network, _ = await bob.net()
    port = await bob.create("Port", network_id=network.metadata.id)
    (other,) = (await bob.list("SecurityGroup")).security_groups
    assert port.status.security_group_ids == [other.metadata.id]
    assert other.status.port_count == 1
    error = await refused(bob.delete("SecurityGroup", other.metadata.id))
    assert error.reason == "SECURITY_GROUP_IN_USE"
    error = await refused(ann.create("SecurityGroup", "default"))
    assert error.reason == "SECURITY_GROUP_NAME_TAKEN"
    await ann.delete("SecurityGroup", id_)


async def test_rules_have_one_form_and_stand_once(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    group = await ann.create("SecurityGroup", "web")
    id_ = group.metadata.id

    async def rule(**spec: object) -> Spec:
        made = await ann.create("SecurityGroupRule", security_group_id=id_, **spec)
        assert isinstance(made, security_group_pb2.SecurityGroupRule)
        return made.spec

    ssh = await rule(direction=INGRESS, protocol="6", port_min=22)
    assert (ssh.protocol, ssh.port_min, ssh.port_max, ssh.ip_version) == ("tcp", 22, 22, 4)
    ping = await rule(direction=INGRESS, ip_version=6, protocol="icmp")
    assert ping.protocol == "ipv6-icmp"
    anywhere = await rule(direction=INGRESS, protocol="udp", remote_cidr="::/0")
    assert (anywhere.ip_version, anywhere.remote_cidr) == (6, "")
    for spec in (
        {"direction": INGRESS, "protocol": "tcp", "port_min": 22, "port_max": 22},
        {"direction": INGRESS, "protocol": "58", "ip_version": 6},
        {"direction": INGRESS, "protocol": "udp", "ip_version": 6},
        {"direction": EGRESS, "ip_version": 4, "remote_cidr": "0.0.0.0/0"},
    ):
        assert (await refused(rule(**spec))).reason == "RULE_EXISTS", spec
    for spec in (
        {"direction": INGRESS, "remote_cidr": "10.0.0.0/8", "remote_group_id": id_},
        {"direction": INGRESS, "remote_cidr": "10.0.0.0/8", "ip_version": 6},
        {"direction": INGRESS, "port_min": 80},
        {"direction": INGRESS, "protocol": "tcp", "port_min": 80, "port_max": 79},
        {"direction": INGRESS, "protocol": "icmp", "port_max": 1},
        {"direction": INGRESS, "protocol": "icmp", "port_min": 256},
        {"direction": INGRESS, "protocol": "ipv6-icmp"},
        {"direction": INGRESS, "protocol": "300"},
    ):
        assert (await refused(rule(**spec))).reason == "BAD_RULE", spec
    unknown = await refused(rule(direction=INGRESS, ip_version=5))
    assert unknown.reason == "BAD_REQUEST"
    bob = await cloud.member("bob")
    foreign = await bob.create("SecurityGroup", "web")
    error = await refused(rule(direction=INGRESS, remote_group_id=foreign.metadata.id))
    assert error.reason == "SECURITY_GROUP_NOT_FOUND"
    (made,) = [r for r in (await ann.get("SecurityGroup", id_)).status.rules if r.spec == ssh]
    error = await refused(bob.delete("SecurityGroupRule", made.metadata.id))
    assert error.reason == "SECURITY_GROUP_RULE_NOT_FOUND"
    await ann.delete("SecurityGroupRule", made.metadata.id)
    assert await rule(direction=INGRESS, protocol="tcp", port_min=22) == ssh
    assert isinstance(error, errors.NotFound)


def remotes(host: DataplaneHost, port_id: str) -> list[str]:
    """What a port's rules about IPv4 groups let in."""
    port = host.port(port_id)
    assert port is not None
    return sorted(
        cidr
        for rule in port.rules
        if rule.remote_is_group and rule.ip_version == 4
        for cidr in rule.remote_cidrs
    )


async def test_members_and_rules_reach_the_hosts_that_they_concern(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    other_network, _ = await ann.net("10.7.0.0/24")
    web = await ann.create("SecurityGroup", "web")
    db = await ann.create("SecurityGroup", "db")
    await ann.create(
        "SecurityGroupRule",
        security_group_id=db.metadata.id,
        direction=INGRESS,
        protocol="tcp",
        port_min=5432,
        remote_group_id=web.metadata.id,
    )
    error = await refused(ann.delete("SecurityGroup", web.metadata.id))
    assert error.reason == "SECURITY_GROUP_IN_USE"
    server = await cloud.ensure(
        ann.project_id, network.metadata.id, security_group_ids=[db.metadata.id]
    )
    # On a network of its own: a router may join the two.
    client = await cloud.ensure(
        ann.project_id, other_network.metadata.id, security_group_ids=[web.metadata.id]
    )
    async with (
        cloud.host("192.0.2.1") as first,
        cloud.host("192.0.2.2") as second,
        cloud.host("192.0.2.3") as third,
    ):
        await cloud.bind(first, server, new_domain())
        await first.until(lambda: first.port(server.metadata.id))
        assert remotes(first, server.metadata.id) == []
        domain = new_domain()
        await cloud.bind(second, client, domain)
        await first.until(lambda: remotes(first, server.metadata.id) == ["10.7.0.3/32"])

        # A change of rules reaches the group's host, and no other one.
        await second.until(lambda: second.port(client.metadata.id))
        before = second.generation
        rule = await ann.create(
            "SecurityGroupRule", security_group_id=db.metadata.id, direction=INGRESS, protocol="udp"
        )

        def udp() -> list[dataplane_pb2.EffectiveRule]:
            port = first.port(server.metadata.id)
            assert port is not None
            return [r for r in port.rules if r.protocol == "udp"]

        await first.until(udp)
        await ann.delete("SecurityGroupRule", rule.metadata.id)
        await first.until(lambda: not udp())
        assert (second.generation, third.generation) == (before, 1)

        # A member that changes its groups, and one that goes.
        await ann.update(
            "Port", client.metadata.id, "spec.security_group_ids", spec={"security_group_ids": []}
        )
        await first.until(lambda: remotes(first, server.metadata.id) == [])
        await ann.update(
            "Port",
            client.metadata.id,
            "spec.security_group_ids",
            spec={"security_group_ids": [web.metadata.id]},
        )
        await first.until(lambda: remotes(first, server.metadata.id) == ["10.7.0.3/32"])
        await cloud.unbind(client, domain)
        await first.until(lambda: remotes(first, server.metadata.id) == [])


async def test_a_port_without_port_security_has_neither_groups_nor_rules(cloud: Cloud) -> None:
    ann = await cloud.member("ann")
    network, _ = await ann.net()
    port = await cloud.ensure(ann.project_id, network.metadata.id, port_security_disabled=True)
    assert not port.status.security_group_ids
    async with cloud.host("192.0.2.1") as host:
        bound = await cloud.bind(host, port, new_domain())
        assert not bound.binding.port_security_enabled
        assert not bound.binding.rules
