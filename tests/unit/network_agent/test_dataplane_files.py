"""What the dataplane writes and remembers, and what it refuses."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import dhcp, filters, names, validation
from mcloud_agents.network.services import Service
from mcloud_agents.network.settings import Settings
from mcloud_agents.network.state import Numbers, State
from mcloud_base import ids
from mcloud_base.errors import DataLoss, InvalidArgument


def document() -> pb.HostDataplane:
    network_id, subnet_id = ids.new("net"), ids.new("sub")
    port_id = ids.new("port")
    return pb.HostDataplane(
        networks=[
            pb.NetworkSegment(
                network_id=network_id,
                vni=100,
                mtu=1450,
                service_mac="fa:16:3e:ff:00:02",
                subnets=[
                    pb.SubnetBinding(
                        subnet_id=subnet_id,
                        cidr="10.0.0.0/24",
                        gateway_ip="10.0.0.1",
                        service_ip="10.0.0.2",
                        dhcp_enabled=True,
                    )
                ],
            )
        ],
        ports=[
            pb.PortBinding(
                port_id=port_id,
                network_id=network_id,
                mac="fa:16:3e:00:00:01",
                hostname="web",
                device_name=f"tap{port_id[-11:]}",
                fixed_ips=[pb.FixedIp(subnet_id=subnet_id, ip_address="10.0.0.5")],
            )
        ],
    )


def test_numbers_stay_and_are_not_given_out_again_at_once() -> None:
    first = Numbers().give_out(["port-a", "port-b"], ["net-a"])
    second = first.give_out(["port-b", "port-c"], ["net-b"])

    assert second.ports["port-b"] == first.ports["port-b"]
    assert second.ports["port-c"] not in first.ports.values()
    assert second.zones["net-b"] != first.zones["net-a"]
    assert first.ports["port-a"] > filters.OPEN_PORT
    third = second.give_out(["port-b", "port-c", "port-d"], ["net-b"])
    assert third.ports["port-d"] == first.ports["port-a"]


def test_state_outlives_the_process(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    assert state.load_document() is None
    state.save_document(document())
    state.save_numbers(Numbers({"port-a": 16}, {"net-a": 20000}))
    again = State(tmp_path / "state")

    assert again.load_document() is not None
    assert again.load_numbers() == Numbers({"port-a": 16}, {"net-a": 20000})
    assert stat.S_IMODE((tmp_path / "state" / "document").stat().st_mode) == 0o600


def test_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "document").write_bytes(b"\xff\xff")
    with pytest.raises(DataLoss, match="DATAPLANE_STATE_DAMAGED"):
        State(tmp_path).load_document()


def test_dhcp_configuration(tmp_path: Path) -> None:
    desired = document()
    settings = Settings("192.0.2.1", runtime_dir=tmp_path)
    service = Service(desired.networks[0].network_id, "mcsvc-100", 1, "eth0")
    text = dhcp.configuration(desired.networks[0], service, settings)
    wanted = (
        "dhcp-range=set:subnet0,10.0.0.0,static,255.255.255.0,86400",
        "dhcp-option=tag:subnet0,option:router,10.0.0.1",
        "dhcp-option=tag:subnet0,121,169.254.169.254/32,10.0.0.2,0.0.0.0/0,10.0.0.1",
        "dhcp-option=tag:subnet0,option:dns-server,10.0.0.2",
        "dhcp-option=option:mtu,1450",
    )
    assert set(wanted) <= set(text.splitlines())
    hosts = dhcp.host_lines(desired.networks[0], desired.ports)
    assert hosts == ["fa:16:3e:00:00:01,10.0.0.5,web,86400"]

    # Without a gateway dnsmasq would name itself as router, if option 3 were not empty.
    desired.networks[0].subnets[0].gateway_ip = ""
    text = dhcp.configuration(desired.networks[0], service, settings)
    assert "dhcp-option=tag:subnet0,option:router\n" in text
    assert "0.0.0.0/0" not in text


def test_a_server_is_known_by_its_arguments_not_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("1")  # somebody's, but no DHCP server of ours
    assert dhcp.find(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.ports.add().CopyFrom(d.ports[0]), "twice"),
        (lambda d: d.networks.add().CopyFrom(d.networks[0]), "twice"),
        (lambda d: setattr(d.ports[0], "network_id", ids.new("net")), "not in the document"),
        (lambda d: setattr(d.ports[0], "hostname", "a\ndhcp-script=/x"), "no host name"),
        (lambda d: setattr(d.ports[0], "device_name", "eth0"), "no device name"),
        (lambda d: setattr(d.ports[0], "mac", "FA:16:3E:00:00:01"), "no MAC address"),
        (lambda d: setattr(d.ports[0].fixed_ips[0], "ip_address", "10.0.0"), "no IP address"),
        (lambda d: setattr(d.networks[0], "vni", 0), "VNI 0"),
        (lambda d: setattr(d.networks[0], "network_id", "net-../../x"), "malformed"),
        (lambda d: setattr(d.networks[0].subnets[0], "cidr", "10.0.0.0"), ""),
        (lambda d: d.networks[0].remote_ports.add(mac="x", underlay_ip="192.0.2.1"), "no MAC"),
        (
            lambda d: d.networks[0].remote_ports.extend(
                pb.RemotePort(mac="fa:16:3e:00:00:07", underlay_ip=address)
                for address in ("192.0.2.1", "192.0.2.1", "192.0.2")
            ),
            "no IP address",
        ),
        (lambda d: d.ports[0].rules.add(direction=1, ip_version=4, protocol="x"), "protocol"),
        (
            lambda d: d.ports[0].rules.add(direction=1, ip_version=4, remote_cidrs=["::/0"]),
            "IP version 4",
        ),
        (
            lambda d: d.ports[0].rules.add(
                direction=1, ip_version=4, protocol="tcp", port_min=9, port_max=8
            ),
            "empty port range",
        ),
    ],
)
def test_what_is_wrong_in_a_document_is_named(change: object, message: str) -> None:
    desired = document()
    validation.check(desired)
    assert callable(change)
    change(desired)
    if message:
        with pytest.raises(InvalidArgument, match=message):
            validation.check(desired)
    else:
        validation.check(desired)  # a single address is a range too


def test_names_fit_into_fifteen_characters() -> None:
    port_id, router_id = ids.new("port"), ids.new("rtr")
    made = (
        names.bridge((1 << 24) - 1),
        names.vxlan((1 << 24) - 1),
        names.service_link((1 << 24) - 1),
        names.leg_link(port_id),
        names.gateway_link(port_id),
        names.leg_device(port_id),
        names.gateway_device(port_id),
    )
    assert max(map(len, made)) <= 15
    assert names.ROUTER_NAMESPACE.fullmatch(names.router_namespace(router_id))
    assert names.owner(names.alias(router_id)) == router_id
    assert names.owner("somebody's") is None


def test_link_local_address_of_a_mac() -> None:
    assert filters.link_local("fa:16:3e:00:00:11") == "fe80::f816:3eff:fe00:11"
