"""The dataplane of two hosts over real packets: overlay, DHCP, metadata, filters, routers.

Guests are namespaces behind devices named like taps; all else is what a host has.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes import wire
from fakes.wire import Guest, Host, Refused, await_true
from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_base import ids

pytestmark = pytest.mark.host

INGRESS = pb.EffectiveRule.DIRECTION_INGRESS
EGRESS = pb.EffectiveRule.DIRECTION_EGRESS
NETWORK, OTHER_NETWORK = ids.new("net"), ids.new("net")
SUBNET, OTHER_SUBNET = ids.new("sub"), ids.new("sub")
ROUTER = ids.new("rtr")
LEG, GATEWAY = ids.new("port"), ids.new("port")
VNI, OTHER_VNI = 70001, 70002  # beyond the 16 bits of a conntrack zone
SERVICE_MAC = "fa:16:3e:ff:00:02"
FOREIGN = """
table inet mine {
    chain forward {
        type filter hook forward priority 10; policy accept;
        ip daddr 192.0.2.1 drop
    }
}
"""


def allow(direction: pb.EffectiveRule.Direction.ValueType, **rule: object) -> pb.EffectiveRule:
    return pb.EffectiveRule(direction=direction, ip_version=4, **rule)  # type: ignore[arg-type]


LEAVE = allow(EGRESS)
PING = allow(INGRESS, protocol="icmp", remote_cidrs=["10.0.0.0/24"])
TCP_8000 = allow(INGRESS, protocol="tcp", port_min=8000, port_max=8000)


def segment(
    network_id: str = NETWORK, subnet_id: str = SUBNET, vni: int = VNI, **more: object
) -> pb.NetworkSegment:
    subnet = pb.SubnetBinding(
        subnet_id=subnet_id,
        cidr="10.0.0.0/24",
        gateway_ip="10.0.0.1",
        service_ip="10.0.0.2",
        dhcp_enabled=True,
        host_routes=[pb.HostRoute(destination_cidr="10.9.0.0/16", next_hop_ip="10.0.0.9")],
    )
    return pb.NetworkSegment(
        network_id=network_id,
        vni=vni,
        mtu=1450,
        subnets=[subnet],
        service_mac=SERVICE_MAC,
        **more,  # type: ignore[arg-type]
    )


class Port:
    """A guest with the binding of its port."""

    def __init__(self, host: Host, number: int, network_id: str = NETWORK, tag: str = "a") -> None:
        self.ip = f"10.0.0.{number}"
        self.mac = f"fa:16:3e:00:{ord(tag):02x}:{number:02x}"
        self.guest = Guest(host, f"guest-{tag}{number}", self.mac)
        port_id = ids.new("port")
        subnet = SUBNET if network_id == NETWORK else OTHER_SUBNET
        self.binding = pb.PortBinding(
            port_id=port_id,
            network_id=network_id,
            mac=self.mac,
            fixed_ips=[pb.FixedIp(subnet_id=subnet, ip_address=self.ip, prefix_len=24)],
            hostname=f"vm-{tag}{number}",
            port_security_enabled=True,
            rules=[LEAVE, PING],
            device_name=f"tap{port_id[-11:]}",
        )

    def allow(self, *rules: pb.EffectiveRule) -> None:
        del self.binding.rules[:]
        self.binding.rules.extend(rules)

    def plug(self) -> None:
        tap = self.guest.host.ask("ensure_tap", self.binding.port_id)
        assert tap["mac"] == self.mac
        self.guest.plug(tap["bridge"], tap["device"])

    def boot(self) -> dict[str, str]:
        self.plug()
        lease = self.guest.get_lease()
        assert lease.get("ip") == self.ip, lease
        return lease

    @property
    def remote(self) -> pb.RemotePort:
        return pb.RemotePort(mac=self.mac, underlay_ip=self.guest.host.underlay_ip)


def document(*ports: Port, segments: list[pb.NetworkSegment] | None = None) -> pb.HostDataplane:
    return pb.HostDataplane(
        networks=segments or [segment()], ports=[port.binding for port in ports]
    )


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with (
        wire.host(tmp_path / "h1", "172.30.0.1") as one,
        wire.host(tmp_path / "h2", "172.30.0.2") as two,
    ):
        wire.connect(one, two)
        one.start_agent()
        two.start_agent()
        yield one, two


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    physical = {"external": "br-ex"}
    with wire.host(tmp_path / "h1", "172.30.0.1", physical_networks=physical) as one:
        one.run("ip", "link", "add", "eth0", "type", "bridge")
        one.run("ip", "link", "set", "eth0", "up")
        one.start_agent()
        yield one


def test_guests_get_addresses_and_reach_each_other(host: Host) -> None:
    one, two = Port(host, 11), Port(host, 12)
    status = host.apply(document(one, two))
    assert status == {"networkCount": 1, "portCount": 2}
    print(f"apply with two ports: {host.seconds:.3f} s")
    lease = one.boot()
    two.boot()

    assert lease["mtu"] == "1450"
    assert lease["hostname"] == "vm-a11"
    assert lease["domain"] == "mcloud.internal"
    assert lease["dns"] == "10.0.0.2"
    assert lease["staticroutes"] == (
        "169.254.169.254/32 10.0.0.2 10.9.0.0/16 10.0.0.9 0.0.0.0/0 10.0.0.1"
    )
    assert one.guest.pings(two.ip)
    assert two.guest.pings(one.ip)
    names = one.guest.run("busybox", "nslookup", "vm-a12.mcloud.internal", "10.0.0.2")
    assert two.ip in names


def test_a_port_that_no_document_names_is_cut_off(host: Host) -> None:
    known, stranger = Port(host, 11), Port(host, 13)
    host.apply(document(known))
    known.boot()
    with pytest.raises(Refused, match="PORT_NOT_ON_HOST"):
        host.ask("ensure_tap", stranger.binding.port_id)
    stranger.guest.plug(f"mcbr{VNI}", stranger.binding.device_name)
    stranger.guest.run("ip", "addr", "add", "10.0.0.13/24", "dev", "eth0")

    assert stranger.guest.get_lease(tries=2) == {}
    assert stranger.guest.cannot_ping(known.ip)
    assert stranger.guest.cannot_ping("10.0.0.2")
    assert known.guest.cannot_ping(stranger.ip)


def test_metadata_are_told_by_address_and_only_to_those_who_may_ask(host: Host) -> None:
    one, two, open_ = Port(host, 11), Port(host, 12), Port(host, 14)
    open_.binding.port_security_enabled = False
    host.apply(document(one, two, open_))
    for port in (one, two, open_):
        bodies = {
            "openstack/latest/meta_data.json": f'{{"uuid": "{port.ip}"}}',
            "latest/meta-data/instance-id": port.ip,
            "latest/meta-data/public-keys/": "0=key",
            "latest/meta-data/public-keys/0/openssh-key": "ssh-ed25519 AAAA",
            "latest/user-data": "#!/bin/sh",
        }
        host.ask("documents", {port.binding.port_id: bodies})
        port.boot()

    assert one.guest.http("/latest/meta-data/instance-id") == (200, b"10.0.0.11")
    assert two.guest.http("/latest/meta-data/instance-id") == (200, b"10.0.0.12")
    assert one.guest.http("/openstack/latest/meta_data.json") == (200, b'{"uuid": "10.0.0.11"}')
    assert one.guest.http("/openstack") == (200, b"latest")
    assert one.guest.http("/latest/meta-data/") == (200, b"instance-id\npublic-keys/")
    assert one.guest.http("/latest/meta-data/public-keys") == (200, b"0=key")
    assert one.guest.http("/latest/nothing")[0] == 404
    assert one.guest.http("/latest/user-data", method="PUT")[0] == 405
    assert one.guest.http("/latest/user-data", "X-Forwarded-For: 10.0.0.12")[0] == 403
    assert open_.guest.http("/latest/meta-data/instance-id")[0] == 404


def test_rules_open_and_close_and_cut_what_is_under_way(host: Host) -> None:
    client, server = Port(host, 11), Port(host, 12)
    server.allow(LEAVE, PING, TCP_8000)
    host.apply(document(client, server))
    client.boot()
    server.boot()

    with talking(client.guest, server.ip, server.guest) as talk:
        server.allow(LEAVE, PING)
        host.apply(document(client, server))
        # The server sends on and on, and its own rules let it: that must not revive the flow.
        assert ends_in_silence(talk)
        assert not connects(client, server), "no rule admits it"

        server.allow(LEAVE, PING, TCP_8000)
        client.allow(PING)
        host.apply(document(client, server))
        assert not connects(client, server), "the client may not leave"
        client.allow(LEAVE)
        host.apply(document(client, server))
        assert connects(client, server)
        assert server.guest.cannot_ping(client.ip)


def test_a_change_of_rules_leaves_other_flows_alone(host: Host) -> None:
    client, server = Port(host, 11), Port(host, 12)
    server.allow(LEAVE, PING, TCP_8000)
    host.apply(document(client, server))
    client.boot()
    server.boot()

    with talking(client.guest, server.ip, server.guest) as talk:
        server.allow(LEAVE, allow(INGRESS, protocol="tcp", port_min=7000, port_max=9000))
        host.apply(document(client, server))
        assert talk.stdout
        for _ in range(20):
            assert talk.stdout.readline() == "tick\n"


def test_flows_do_not_pass_to_the_next_one_who_has_the_address(host: Host) -> None:
    client, server = Port(host, 11), Port(host, 12)
    server.allow(LEAVE, PING, TCP_8000)
    host.apply(document(client, server))
    client.boot()
    server.boot()
    with talking(client.guest, server.ip, server.guest):
        assert server.ip in flows(host)
        host.run("ip", "link", "del", server.binding.device_name)  # its guest is gone
        following = Port(host, 12, tag="b")
        following.allow(LEAVE, PING, TCP_8000)
        host.apply(document(client, following))
        assert server.ip not in flows(host)


def flows(host: Host) -> str:
    """The addresses of all flows through guests' rules."""
    program = (
        "from mcloud_agents.network import conntrack\n"
        "for e in conntrack.list_entries(): print(e.zone, e.flow.source, e.flow.destination)"
    )
    listed = host.run(sys.executable, "-c", program).splitlines()
    return "\n".join(line for line in listed if not line.startswith("0 "))


@contextlib.contextmanager
def talking(client: Guest, address: str, server: Guest) -> Iterator[subprocess.Popen[str]]:
    """Have a server that sends for ever, and a client that listens to it."""
    with contextlib.ExitStack() as stack:
        for guest, program in ((server, SERVER), (client, CLIENT)):
            process = guest.popen(sys.executable, "-uc", program, address, stdout=subprocess.PIPE)
            assert process.stdout
            stack.callback(process.wait, wire.DEADLINE_S)
            stack.callback(process.kill)
            stack.callback(process.stdout.close)
            assert process.stdout.readline() in ("listening\n", "tick\n")
        yield process


def ends_in_silence(talk: subprocess.Popen[str]) -> bool:
    assert talk.wait(wire.DEADLINE_S) == 0
    assert talk.stdout
    return talk.stdout.read().splitlines()[-1] == "silence"


SERVER = """
import socket, threading, time
def talk(peer):
    try:
        while True:
            peer.send(b"tick"); time.sleep(0.1)
    except OSError:
        pass
s = socket.create_server(("", 8000)); print("listening")
while True:
    threading.Thread(target=talk, args=(s.accept()[0],), daemon=True).start()
"""
CLIENT = """
import socket, sys
c = socket.create_connection((sys.argv[1], 8000), timeout=10)
c.settimeout(3)
try:
    while c.recv(4): print("tick")
    print("closed")
except TimeoutError:
    print("silence")
"""


def connects(client: Port, server: Port) -> bool:
    program = f"import socket; socket.create_connection(('{server.ip}', 8000), timeout=2)"
    return client.guest.succeeds(sys.executable, "-c", program)


def test_a_guest_can_only_be_itself(host: Host) -> None:
    honest, liar = Port(host, 11), Port(host, 12)
    liar.allow(LEAVE, allow(INGRESS))
    honest.allow(LEAVE, allow(INGRESS))
    host.apply(document(honest, liar))
    honest.boot()
    liar.boot()
    assert liar.guest.pings(honest.ip)
    guest = liar.guest

    guest.run("ip", "addr", "add", "10.0.0.99/32", "dev", "eth0")
    assert guest.cannot_ping(honest.ip, "-I", "10.0.0.99"), "another address"
    guest.run("ip", "link", "set", "eth0", "address", "fa:16:3e:99:99:99")
    assert guest.cannot_ping(honest.ip), "another MAC"
    guest.run("ip", "link", "set", "eth0", "address", liar.mac)
    await_true(lambda: guest.pings(honest.ip), "honest again")

    # ARP: what it says about others does not arrive.
    honest.guest.run("ip", "neigh", "flush", "all")
    frame = (
        "import socket\n"
        "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('eth0', 0))\n"
        f"m = bytes.fromhex('{liar.mac}'.replace(':', ''))\n"
        "arp = bytes.fromhex('0001080006040002')\n"
        "ip = bytes([10, 0, 0, 1])\n"
        "s.send(b'\\xff' * 6 + m + b'\\x08\\x06' + arp + m + ip + b'\\xff' * 6 + ip)\n"
        # A VLAN tag around IP, which br_netfilter would not look into.
        f"h = bytes.fromhex('{honest.mac}'.replace(':', ''))\n"
        "s.send(h + m + bytes.fromhex('810000070800') + bytes(60))\n"
    )
    guest.run(sys.executable, "-c", frame)
    guest.run("busybox", "arping", "-c", "1", "-U", "-I", "eth0", "10.0.0.1", check=False)
    chain = host.run("nft", "list", "chain", "bridge", "mcloud", f"from-{liar.binding.device_name}")
    counts = {
        line.split(" counter")[0].strip(): int(found[1])
        for line in chain.splitlines()
        if (found := re.search(r"packets (\d+)", line))
    }
    assert counts[f"ether saddr != {liar.mac}"] >= 2
    assert counts["arp saddr ip != { 0.0.0.0, 10.0.0.12 }"] >= 1
    assert "10.0.0.1 " not in honest.guest.run("ip", "neigh")

    # A DHCP server in a guest is heard by nobody.
    rogue = guest.popen(
        *("dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0"),
        *("--bind-dynamic", "--dhcp-range=10.0.0.50,10.0.0.60", "--leasefile-ro"),
        *("--user=root", "--dhcp-authoritative"),
        stderr=subprocess.DEVNULL,
    )
    assert honest.guest.get_lease()["serverid"] == "10.0.0.2"
    os.kill(wire.child_of(rogue.pid), signal.SIGKILL)
    rogue.wait(wire.DEADLINE_S)

    liar.binding.port_security_enabled = False
    host.apply(document(honest, liar))
    assert guest.pings(honest.ip, "-I", "10.0.0.99"), "with port security off it may"


def test_the_host_is_no_neighbour_of_its_guests(host: Host) -> None:
    host.run("ip", "addr", "add", "172.30.0.1/24", "dev", "eth0")
    port = Port(host, 11)
    port.binding.port_security_enabled = False
    host.apply(document(port))
    port.boot()
    port.guest.run("ip", "route", "add", "172.30.0.1/32", "dev", "eth0")

    assert port.guest.cannot_ping("172.30.0.1")
    link = host.run("ip", "-o", "link", "show", f"mcbr{VNI}")
    bridge_mac = link.partition("link/ether ")[2].split()[0]
    port.guest.run("ip", "neigh", "replace", "172.30.0.1", "lladdr", bridge_mac, "dev", "eth0")
    assert port.guest.cannot_ping("172.30.0.1")


def test_ipv6_is_judged_by_rules_of_its_own(host: Host) -> None:
    one, two = Port(host, 11), Port(host, 12)
    leave = pb.EffectiveRule(direction=EGRESS, ip_version=6)
    ping6 = pb.EffectiveRule(
        direction=INGRESS, ip_version=6, protocol="ipv6-icmp", remote_cidrs=["fd00::/64"]
    )
    for port in (one, two):
        address = f"fd00::{port.ip.rpartition('.')[2]}"
        port.binding.fixed_ips.add(subnet_id=ids.new("sub"), ip_address=address, prefix_len=64)
    one.allow(leave)
    two.allow(leave, ping6)
    host.apply(document(one, two))
    for port in (one, two):
        port.plug()
        address = port.binding.fixed_ips[1].ip_address
        port.guest.run("ip", "addr", "add", f"{address}/64", "dev", "eth0")

    await_true(lambda: one.guest.pings("fd00::12", tries=1), "addresses are usable")
    assert two.guest.cannot_ping("fd00::11"), "no rule admits it"
    one.guest.run("ip", "addr", "add", "fd00::99/64", "dev", "eth0", "nodad")
    assert one.guest.cannot_ping("fd00::12", "-I", "fd00::99")
    two.allow(leave)
    host.apply(document(one, two))
    assert one.guest.cannot_ping("fd00::12")


def test_the_overlay_joins_hosts_and_keeps_networks_apart(hosts: tuple[Host, Host]) -> None:
    h1, h2 = hosts
    a1, a2 = Port(h1, 11), Port(h2, 12)
    b1, b2 = Port(h1, 11, OTHER_NETWORK, "b"), Port(h2, 13, OTHER_NETWORK, "b")

    def desired(here: list[Port], there: list[Port]) -> pb.HostDataplane:
        segments = []
        for network, subnet, vni in (
            (NETWORK, SUBNET, VNI),
            (OTHER_NETWORK, OTHER_SUBNET, OTHER_VNI),
        ):
            remote = [p.remote for p in there if p.binding.network_id == network]
            segments.append(segment(network, subnet, vni, remote_ports=remote))
        return document(*here, segments=segments)

    h1.apply(desired([a1, b1], [a2, b2]))
    h2.apply(desired([a2, b2], [a1, b1]))
    for port in (a1, a2, b1, b2):
        port.boot()
    # 1450 bytes of MTU: 1422 of payload, not to be fragmented.
    assert a1.guest.pings(a2.ip, "-M", "do", "-s", "1422")
    assert b2.guest.pings(b1.ip)
    assert a1.guest.cannot_ping("10.0.0.13"), "an address of the other network"
    neighbours = a1.guest.run("ip", "neigh", "show", a2.ip)
    assert a2.mac in neighbours

    # The service's address is the same on both hosts, and each guest has its own host's.
    for port in (a1, a2):
        port.guest.run("ip", "neigh", "flush", "all")
        assert port.guest.pings("10.0.0.2", tries=1)
        assert SERVICE_MAC in port.guest.run("ip", "neigh", "show", "10.0.0.2")
    fdb = h1.run("bridge", "fdb", "show", "br", f"mcbr{VNI}")
    assert [line.split()[2] for line in fdb.splitlines() if line.startswith(SERVICE_MAC)] == [
        f"mcsv{VNI}"
    ]
    # No flooding to a host without ports there, and none to a port that has moved away.
    h1.apply(desired([a1, b1], [b2]))
    assert "172.30.0.2" not in h1.run("bridge", "fdb", "show", "dev", f"mcvx{VNI}")
    assert a2.mac not in h1.run("bridge", "fdb", "show", "dev", f"mcvx{VNI}")
    assert "172.30.0.2" in h1.run("bridge", "fdb", "show", "dev", f"mcvx{OTHER_VNI}")
    assert b1.guest.pings(b2.ip)


def outside(host: Host) -> Guest:
    """Give a host a bridge to the outside world, and somebody out there."""
    host.run("ip", "link", "add", "br-ex", "type", "bridge")
    host.run("ip", "link", "set", "br-ex", "up")
    world = Guest(host, "world", "02:00:00:00:00:01")
    world.plug("br-ex", "uplink")
    world.run("ip", "addr", "add", "203.0.113.1/24", "dev", "eth0")
    return world


def router(*floating: tuple[str, str]) -> pb.RouterBinding:
    return pb.RouterBinding(
        router_id=ROUTER,
        interfaces=[
            pb.RouterInterfaceBinding(
                port_id=LEG,
                network_id=NETWORK,
                mac="fa:16:3e:aa:00:01",
                ip_address="10.0.0.1",
                prefix_len=24,
            )
        ],
        gateway=pb.ExternalGateway(
            port_id=GATEWAY,
            network_id=OTHER_NETWORK,
            physical_network="external",
            mac="fa:16:3e:aa:00:02",
            ip_address="203.0.113.10",
            prefix_len=24,
            next_hop_ip="203.0.113.1",
            snat_enabled=True,
        ),
        floating_ips=[
            pb.FloatingIpBinding(
                floating_ip_id=ids.new("fip"), floating_ip_address=public, fixed_ip_address=fixed
            )
            for public, fixed in floating
        ],
    )


def test_a_router_translates_and_floating_addresses_come_and_go(host: Host) -> None:
    world = outside(host)
    one, two = Port(host, 11), Port(host, 12)
    ping = allow(INGRESS, protocol="icmp")
    for port in (one, two):
        port.allow(LEAVE, ping)
    desired = document(one, two)
    desired.routers.append(router())
    host.apply(desired)
    one.boot()
    two.boot()

    assert one.guest.pings("203.0.113.1"), "out, under the router's address"
    world.run("ip", "route", "add", "10.0.0.0/24", "via", "203.0.113.10")
    assert world.cannot_ping(one.ip), "nobody outside begins a conversation"
    assert world.cannot_ping("203.0.113.20")

    del desired.routers[:]
    desired.routers.append(router(("203.0.113.20", one.ip), ("203.0.113.21", two.ip)))
    host.apply(desired)
    assert world.pings("203.0.113.20")
    assert world.pings("203.0.113.21")
    assert one.guest.pings("203.0.113.21"), "from a neighbour, through the router and back"
    seen = world.popen(sys.executable, "-uc", WHO, stdout=subprocess.PIPE)
    assert seen.stdout
    assert seen.stdout.readline() == "listening\n"
    one.guest.run(
        sys.executable, "-c", "import socket\nsocket.create_connection(('203.0.113.1', 9))"
    )
    assert seen.stdout.readline() == "203.0.113.20\n", "out, under its floating address"
    seen.stdout.close()
    seen.wait(wire.DEADLINE_S)

    one.allow(LEAVE, ping, TCP_8000)
    desired.ports[0].CopyFrom(one.binding)
    host.apply(desired)
    with talking(world, "203.0.113.20", one.guest) as talk:
        del desired.routers[0].floating_ips[0]
        host.apply(desired)
        assert ends_in_silence(talk)
    desired.routers[0].floating_ips.append(
        pb.FloatingIpBinding(floating_ip_address="203.0.113.20", fixed_ip_address=one.ip)
    )
    one.allow(LEAVE)
    host.apply(
        pb.HostDataplane(
            networks=desired.networks, ports=[one.binding, two.binding], routers=desired.routers
        )
    )
    assert world.cannot_ping("203.0.113.20"), "its group does not admit it"
    del desired.routers[0].floating_ips[:]
    host.apply(desired)
    assert world.cannot_ping("203.0.113.21"), "no longer there"
    assert two.guest.pings("203.0.113.1")

    del desired.routers[:]
    host.apply(desired)
    assert "mcr-" not in host.run("ip", "netns")
    assert one.guest.cannot_ping("203.0.113.1")


WHO = """
import socket
s = socket.create_server(("", 9)); print("listening")
print(s.accept()[1][0])
"""


def test_a_second_time_changes_nothing_and_an_empty_document_removes_all(host: Host) -> None:
    outside(host)
    subprocess.run(host.inside("nft", "-f", "-"), input=FOREIGN, text=True, check=True)
    host.run("ip", "link", "add", "virbr0", "type", "bridge")
    host.run("ip", "netns", "add", "mcr-somebody-else")
    before = host.facts()
    one, two = Port(host, 11), Port(host, 12)
    desired = document(one, two)
    desired.routers.append(router(("203.0.113.20", one.ip)))
    host.apply(desired)
    print(f"first: {host.seconds:.3f} s")
    first, servers = host.facts(), dhcp_servers(host)
    assert first != before
    assert len(servers) == 1

    host.apply(desired)
    print(f"again: {host.seconds:.3f} s")
    assert wire.difference(first, host.facts()) == ""
    assert dhcp_servers(host) == servers

    kinds = [kind for kind, _, _ in host.ask("artifacts")]
    assert sorted(kinds) == sorted(
        ["KIND_BRIDGE", "KIND_ROUTER"] + ["KIND_FILTER", "KIND_DHCP_ENTRY"] * 2
    )
    assert {owner for _, _, owner in host.ask("artifacts")} == {
        NETWORK,
        ROUTER,
        one.binding.port_id,
        two.binding.port_id,
    }

    host.apply(pb.HostDataplane())
    assert wire.difference(before, host.facts()) == ""
    assert dhcp_servers(host) == []
    assert host.ask("artifacts") == []


def dhcp_servers(host: Host) -> list[int]:
    return [int(pid) for pid in host.run("pidof", "dnsmasq", check=False).split()]


def test_an_agent_that_is_killed_takes_everything_over(host: Host) -> None:
    world = outside(host)
    one, two = Port(host, 11), Port(host, 12)
    one.allow(LEAVE, allow(INGRESS, protocol="icmp"))
    desired = document(one, two)
    desired.routers.append(router(("203.0.113.20", one.ip)))
    host.apply(desired)
    one.boot()
    two.boot()
    before, servers = host.facts(), dhcp_servers(host)

    host.kill_agent()
    assert one.guest.pings(two.ip)
    assert world.pings("203.0.113.20")
    assert one.guest.get_lease()["ip"] == one.ip, "DHCP needs no agent"
    host.start_agent()  # alone: no control plane sends a document
    assert wire.difference(before, host.facts()) == ""
    assert dhcp_servers(host) == servers
    host.ask("documents", {one.binding.port_id: {"latest/meta-data/instance-id": "one"}})
    assert one.guest.http("/latest/meta-data/instance-id") == (200, b"one")
    tap = host.ask("ensure_tap", one.binding.port_id)
    assert tap["bridge"] == f"mcbr{VNI}"

    host.kill_agent()
    host.start_agent()
    host.apply(document(two))
    assert "mcr-" not in host.run("ip", "netns"), "removed by an agent that did not make it"
    assert one.guest.cannot_ping(two.ip)


def test_what_is_broken_by_others_is_repaired(host: Host) -> None:
    one, two = Port(host, 11), Port(host, 12)
    desired = document(one, two)
    host.apply(desired)
    one.boot()
    two.boot()
    (server,) = dhcp_servers(host)
    host.run("kill", "-9", str(server))
    await_true(lambda: dhcp_servers(host) not in ([], [server]), "a new DHCP server runs")
    assert one.guest.get_lease()["ip"] == one.ip

    good = host.facts()
    host.run("nft", "flush", "chain", "inet", "mcloud", f"in-{one.binding.device_name}")
    host.run("ip", "link", "set", one.binding.device_name, "nomaster")
    host.run("ip", "link", "del", f"mcvx{VNI}")
    host.run("ip", "link", "set", f"mcbr{VNI}", "mtu", "1400")
    host.apply(desired)
    assert host.run("nft", "-s", "list", "ruleset") in good
    assert two.guest.pings(one.ip)
    assert f"mcvx{VNI}" in host.run("ip", "link", "show", "master", f"mcbr{VNI}")

    # The namespace with the services: everything in it has to come again.
    host.run("ip", "netns", "del", f"mcsvc-{VNI}")
    host.run("ip", "link", "del", f"mcsv{VNI}")
    host.apply(desired)
    assert one.guest.get_lease()["ip"] == one.ip
    host.ask("documents", {one.binding.port_id: {"latest/meta-data/instance-id": "one"}})
    assert one.guest.http("/latest/meta-data/instance-id") == (200, b"one")


def test_a_bridge_with_a_guest_stays_until_the_guest_goes(host: Host) -> None:
    port, other = Port(host, 11), Port(host, 12)
    host.apply(document(port, other))
    port.boot()
    other.boot()
    host.apply(pb.HostDataplane())

    assert port.guest.cannot_ping(other.ip)
    owners = {(kind, owner) for kind, _, owner in host.ask("artifacts")}
    assert owners == {("KIND_BRIDGE", NETWORK), ("KIND_TAP", "")}
    host.apply(document(port, other))
    assert port.guest.pings(other.ip)
    host.apply(pb.HostDataplane())
    port.guest.unplug(port.binding.device_name)
    other.guest.unplug(other.binding.device_name)
    host.apply(pb.HostDataplane())
    assert host.ask("artifacts") == []


def test_a_fault_in_one_object_leaves_the_others_alone(host: Host) -> None:
    port = Port(host, 11)
    desired = document(port)
    desired.networks.append(segment(OTHER_NETWORK, OTHER_SUBNET, OTHER_VNI, physical_network="lan"))
    with pytest.raises(Refused, match="PHYSICAL_NETWORK_MISSING"):
        host.apply(desired)
    port.boot()

    host.run("ip", "link", "add", f"mcbr{OTHER_VNI}", "type", "ifb")
    desired.networks[1].physical_network = ""
    with pytest.raises(Refused, match="DEVICE_NOT_OURS"):
        host.apply(desired)
    assert "ifb" in host.run("ip", "-d", "link", "show", f"mcbr{OTHER_VNI}")
    desired.ports[0].hostname = "x\ndhcp-script=/bin/sh"
    with pytest.raises(Refused, match="DATAPLANE_INVALID"):
        host.apply(desired)


def test_guests_on_a_network_of_the_outside_world(host: Host) -> None:
    world = outside(host)
    port = Port(host, 11)
    host.apply(document(port, segments=[segment(physical_network="external")]))
    port.boot()
    world.run("ip", "addr", "add", "10.0.0.50/24", "dev", "eth0")

    assert port.guest.pings("10.0.0.50")
    assert world.pings(port.ip)
    assert world.cannot_ping("10.0.0.2"), "services are for this host's guests"
    port.allow(LEAVE)
    host.apply(document(port, segments=[segment(physical_network="external")]))
    assert world.cannot_ping(port.ip)
    assert world.get_lease(tries=2) == {}


def test_two_hundred_ports(host: Host) -> None:
    ports = [Port(host, number) for number in range(10, 210)]
    for port in ports:
        port.allow(LEAVE, PING, TCP_8000)
    times = []
    for rules in ([LEAVE, PING], [LEAVE], [LEAVE]):
        ports[0].allow(*rules)
        host.apply(document(*ports))
        times.append(f"{host.seconds:.2f} s")
    print("200 ports: first, one changed, a repeat:", ", ".join(times))
    assert len(host.ask("artifacts")) == 1 + 2 * len(ports)
