"""What guests are told, and the drive it stands on."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

import pycdlib
import pytest

from fakes import domains
from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import dataplane_pb2
from mcloud_agents.compute import config_drive, guest_data
from mcloud_agents.network import metadata

KEY = domain_pb2.PublicKey(name="my_key", public_key="ssh-ed25519 AAAA me@home")


def nic(**subnet: object) -> guest_data.Nic:
    values: dict[str, object] = {"subnet_id": "sub-1", "cidr": "10.0.0.0/24"}
    return (
        dataplane_pb2.PortBinding(
            port_id="port-1",
            mac="fa:16:3e:00:00:01",
            device_name="tap1",
            fixed_ips=[
                dataplane_pb2.FixedIp(subnet_id="sub-1", ip_address="10.0.0.5", prefix_len=24)
            ],
        ),
        dataplane_pb2.NetworkSegment(
            network_id="net-1",
            mtu=1450,
            subnets=[dataplane_pb2.SubnetBinding(**(values | subnet))],  # type: ignore[arg-type]
        ),
    )


@pytest.fixture
def spec() -> domain_pb2.DomainSpec:
    config = domain_pb2.GuestConfig(
        public_keys=[KEY],
        metadata={"role": "web"},
        user_data=b"\x00#!/bin/sh\n\xff",
        availability_zone="nova",
        project_id="p-1",
        flavor_name="m1.small",
    )
    return domains.spec(config=config)


def test_openstack_documents(spec: domain_pb2.DomainSpec) -> None:
    documents = guest_data.documents(spec, [nic(dhcp_enabled=True)])
    data = json.loads(documents["openstack/latest/meta_data.json"])
    assert data["uuid"] == spec.uuid
    assert data["name"] == "stack_testvm"
    assert data["hostname"] == "stack-testvm"
    assert data["public_keys"] == {"my_key": KEY.public_key}
    assert data["keys"] == [{"name": "my_key", "type": "ssh", "data": KEY.public_key}]
    assert data["meta"] == {"role": "web"}
    assert (data["availability_zone"], data["project_id"]) == ("nova", "p-1")
    assert data["launch_index"] == 0
    for version in guest_data.OPENSTACK_VERSIONS:
        assert documents[f"openstack/{version}/user_data"] == spec.config.user_data
    assert json.loads(documents["openstack/2018-08-27/vendor_data.json"]) == {}


def test_network_with_dhcp() -> None:
    told = guest_data.network_data([nic(dhcp_enabled=True, dns_servers=["9.9.9.9"])])
    (link,), (network,) = told["links"], told["networks"]
    assert link["ethernet_mac_address"] == "fa:16:3e:00:00:01"
    assert link["mtu"] == 1450
    assert network["type"] == "ipv4_dhcp"
    assert network["link"] == link["id"]
    assert told["services"] == [{"type": "dns", "address": "9.9.9.9"}]


def test_network_without_dhcp() -> None:
    route = dataplane_pb2.HostRoute(destination_cidr="10.9.0.0/16", next_hop_ip="10.0.0.9")
    told = guest_data.network_data([nic(gateway_ip="10.0.0.1", host_routes=[route])])
    (network,) = told["networks"]
    assert network["type"] == "ipv4"
    assert (network["ip_address"], network["netmask"]) == ("10.0.0.5", "255.255.255.0")
    assert network["routes"] == [
        {"network": "10.9.0.0", "netmask": "255.255.0.0", "gateway": "10.0.0.9"},
        {"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"},
    ]


def served(documents: Mapping[str, bytes], path: str) -> bytes | None:
    """What the metadata service says to a guest."""
    reply = metadata.answer(metadata.Request("GET", path, False), documents)
    return reply.body if reply.status == HTTPStatus.OK else None


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("latest/meta-data/instance-type", "m1.small"),
        ("2009-04-04/meta-data/local-ipv4", "10.0.0.5"),
        ("latest/meta-data/public-keys/", "0=my_key"),
        ("latest/meta-data/public-keys", "0=my_key"),
        ("latest/meta-data/public-keys/0/", "openssh-key"),
        ("latest/meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA me@home"),
        ("latest/meta-data/placement/availability-zone", "nova"),
        ("openstack", "\n".join(sorted(guest_data.OPENSTACK_VERSIONS))),
    ],
)
def test_the_service_answers(spec: domain_pb2.DomainSpec, path: str, answer: str) -> None:
    documents = guest_data.documents(spec, [nic(dhcp_enabled=True)])
    assert served(documents, path) == answer.encode()


@pytest.mark.parametrize("path", ["latest/meta-data/public-keys", "latest/user-data"])
def test_no_key_and_no_data_are_no_documents(path: str) -> None:
    assert served(guest_data.documents(domains.spec(), []), path) is None


def test_the_listing_of_meta_data_leads_everywhere(spec: domain_pb2.DomainSpec) -> None:
    documents = guest_data.documents(spec, [nic(dhcp_enabled=True)])
    listing = served(documents, "latest/meta-data/")
    assert listing is not None
    assert b"public-keys/" in listing.split()
    for name in listing.decode().split():
        assert served(documents, f"latest/meta-data/{name}") is not None


def test_the_drive_is_what_others_read(spec: domain_pb2.DomainSpec, tmp_path: Path) -> None:
    path = tmp_path / "config-drive.iso"
    documents = guest_data.on_drive(guest_data.documents(spec, [nic(dhcp_enabled=True)]))
    config_drive.write(path, documents)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    blkid = subprocess.run(
        ["blkid", "-p", "-o", "export", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert "LABEL=config-2\n" in blkid
    assert "TYPE=iso9660\n" in blkid
    image = pycdlib.PyCdlib()
    image.open(str(path))
    try:
        for name, text in documents.items():
            for form in ("rr_path", "joliet_path"):
                found = io.BytesIO()
                image.get_file_from_iso_fp(found, **{form: f"/{name}"})
                assert found.getvalue() == text
    finally:
        image.close()
