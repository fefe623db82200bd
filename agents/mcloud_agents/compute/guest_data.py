"""What a guest is told about itself, in the forms that stock cloud-init reads.

The same documents go on the config drive and into the metadata service.
Sources: https://docs.openstack.org/nova/latest/user/metadata.html,
https://docs.openstack.org/nova/latest/_downloads/network_data.json (schema),
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-metadata.html
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import dataplane_pb2

# A port's binding with the segment that it is on.
Nic = tuple[dataplane_pb2.PortBinding, dataplane_pb2.NetworkSegment]

# Clients take the newest version that they know and find.
OPENSTACK_VERSIONS = (
    "2012-08-10", "2013-04-04", "2013-10-17", "2015-10-15", "2016-06-30", "2016-10-06",
    "2017-02-22", "2018-08-27", "2020-10-14", "latest",
)  # fmt: skip
EC2_VERSIONS = ("2009-04-04", "latest")


def documents(spec: domain_pb2.DomainSpec, nics: Sequence[Nic]) -> dict[str, bytes]:
    """Return every document by its path, without a leading slash.

    A path that ends in one is a listing that cannot be told from what is below it.
    """
    result: dict[str, bytes] = {}
    openstack = {
        "meta_data.json": _json(_meta_data(spec)),
        "network_data.json": _json(network_data(nics)),
        "vendor_data.json": _json({}),
        "vendor_data2.json": _json({}),
    }
    ec2 = {f"meta-data/{key}": value.encode() for key, value in _ec2(spec, nics)}
    ec2_json = {"meta-data.json": _json(_nested(_ec2(spec, nics)))}
    if spec.config.user_data:
        openstack["user_data"] = ec2["user-data"] = ec2_json["user-data"] = spec.config.user_data
    for version in OPENSTACK_VERSIONS:
        result |= {f"openstack/{version}/{name}": text for name, text in openstack.items()}
    for version in EC2_VERSIONS:
        result |= {f"{version}/{name}": text for name, text in ec2.items()}
        result |= {f"ec2/{version}/{name}": text for name, text in ec2_json.items()}
    return result


def on_drive(everything: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return those documents that belong on a config drive."""
    kept = ("openstack/", "ec2/")
    return {path: text for path, text in everything.items() if path.startswith(kept)}


def _meta_data(spec: domain_pb2.DomainSpec) -> dict[str, Any]:
    config = spec.config
    data: dict[str, Any] = {
        "uuid": spec.uuid,
        "name": spec.name,
        "hostname": spec.hostname,
        "launch_index": 0,
        "availability_zone": config.availability_zone,
        "project_id": config.project_id or spec.project_id,
        "meta": dict(sorted(config.metadata.items())),
        "devices": [],
        "dedicated_cpus": [],
    }
    if config.public_keys:
        data["public_keys"] = {key.name: key.public_key for key in config.public_keys}
        data["keys"] = [
            {"name": key.name, "type": "ssh", "data": key.public_key} for key in config.public_keys
        ]
    return data


def network_data(nics: Sequence[Nic]) -> dict[str, Any]:
    """Return network_data.json: links, networks on them, services.

    An address in a subnet with DHCP is left to DHCP; where there is none it is spelled out.
    """
    links: list[dict[str, Any]] = []
    networks: list[dict[str, Any]] = []
    servers: list[str] = []
    for binding, segment in nics:
        links.append(
            {
                "id": binding.device_name or binding.port_id,
                "vif_id": binding.port_id,
                "type": "bridge",
                "mtu": segment.mtu or None,
                "ethernet_mac_address": binding.mac,
            }
        )
        subnets = {subnet.subnet_id: subnet for subnet in segment.subnets}
        for fixed in binding.fixed_ips:
            subnet = subnets.get(fixed.subnet_id, dataplane_pb2.SubnetBinding())
            network = _network(fixed, subnet)
            network |= {
                "id": f"network{len(networks)}",
                "link": links[-1]["id"],
                "network_id": segment.network_id,
            }
            networks.append(network)
            servers += [server for server in subnet.dns_servers if server not in servers]
    services = [{"type": "dns", "address": server} for server in servers]
    return {"links": links, "networks": networks, "services": services}


def _network(fixed: dataplane_pb2.FixedIp, subnet: dataplane_pb2.SubnetBinding) -> dict[str, Any]:
    address = ipaddress.ip_address(fixed.ip_address)
    kind = f"ipv{address.version}"
    if subnet.dhcp_enabled:
        return {"type": f"{kind}_dhcp"}
    interface = ipaddress.ip_interface(f"{fixed.ip_address}/{fixed.prefix_len}")
    routes = [(route.destination_cidr, route.next_hop_ip) for route in subnet.host_routes]
    if subnet.gateway_ip:
        routes.append(("0.0.0.0/0" if address.version == 4 else "::/0", subnet.gateway_ip))
    return {
        "type": kind,
        "ip_address": fixed.ip_address,
        "netmask": str(interface.netmask),
        "routes": [
            {
                "network": str(ipaddress.ip_network(destination).network_address),
                "netmask": str(ipaddress.ip_network(destination).netmask),
                "gateway": hop,
            }
            for destination, hop in routes
        ],
        "services": [{"type": "dns", "address": server} for server in subnet.dns_servers],
    }


def _ec2(spec: domain_pb2.DomainSpec, nics: Sequence[Nic]) -> Iterator[tuple[str, str]]:
    config = spec.config
    addresses = [fixed.ip_address for binding, _ in nics for fixed in binding.fixed_ips]
    yield "ami-id", spec.root_disk.image_id
    yield "ami-launch-index", "0"
    yield "hostname", spec.hostname
    yield "instance-action", "none"
    yield "instance-id", spec.instance_id
    yield "instance-type", config.flavor_name
    yield "local-hostname", spec.hostname
    if addresses:
        yield "local-ipv4", next((a for a in addresses if ":" not in a), "")
    if nics:
        yield "mac", nics[0][0].mac
    yield "placement/availability-zone", config.availability_zone
    for index, key in enumerate(config.public_keys):
        yield f"public-keys/{index}/openssh-key", key.public_key
    if config.public_keys:
        names = (f"{index}={key.name}" for index, key in enumerate(config.public_keys))
        yield "public-keys/", "\n".join(names)
    yield "reservation-id", spec.domain_id


def _nested(pairs: Iterator[tuple[str, str]]) -> dict[str, Any]:
    """Turn paths into the nested objects that Nova's EC2 document on a drive has."""
    root: dict[str, Any] = {}
    for path, value in pairs:
        *directories, name = path.split("/")
        if not name:
            continue
        inner = root
        for directory in directories:
            inner = inner.setdefault(directory, {})
        inner[name] = value
    return root


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
