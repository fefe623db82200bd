"""The namespace of a network's own services on this host: its address, its cable, its sockets.

DHCP and metadata have one address and one MAC in a network, the same on every host, so that
a guest that moves to another host finds them where they were.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence, Set
from dataclasses import dataclass

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import bridges, links, names, namespaces
from mcloud_agents.network.links import Link, Links
from mcloud_base.errors import WrongState

_DEVICE = "eth0"
_METADATA_PORT = 80
_BACKLOG = 64


@dataclass(frozen=True)
class Service:
    """A namespace that is in place."""

    network_id: str
    namespace: str
    identity: int  # of the namespace: a new one of the same name has another
    interface: str


def served_subnets(segment: pb.NetworkSegment) -> Sequence[pb.SubnetBinding]:
    """Return the subnets in which the network's services have an address."""
    return [
        subnet
        for subnet in segment.subnets
        if subnet.service_ip and ipaddress.ip_network(subnet.cidr, strict=False).version == 4
    ]


def ensure_namespace(name: str, owner_id: str) -> None:
    """Make a namespace of ours. Its loopback interface says whose it is.

    Raises:
        WrongState: NAMESPACE_NOT_OURS, something else has the name.
    """
    namespaces.ensure(name)
    with namespaces.entered(name), links.opened() as inside:
        present = inside.all()
        loopback = present["lo"]
        if loopback.owner is None and len(present) > 1:  # without a mark, but in use
            raise WrongState(
                "NAMESPACE_NOT_OURS", f"namespace {name} exists and is not mcloud's", namespace=name
            )
        inside.settle(loopback, ifalias=names.alias(owner_id), state="up")
        namespaces.set_sysctl("ipv6/conf/all/disable_ipv6", 1)
        namespaces.set_sysctl("ipv6/conf/default/disable_ipv6", 1)


def ensure_cable(
    host: Links, name: str, owner_id: str, *, bridge: Link, namespace: str, device: str, mac: str
) -> None:
    """Connect a namespace to a bridge of the host.

    Args:
        host: in the host's namespace.
        name: of the host's end.
        owner_id: of what the cable is for.
        bridge: into which the host's end goes.
        namespace: where the other end is.
        device: name of the other end.
        mac: of the other end.
    """
    with namespaces.entered(namespace), links.opened() as inside:
        far = inside.find(device)
    if far is None:
        host.remove(name)  # its other end is elsewhere, or not marked yet
    # Made inside at once, so that the name of the other end clashes with nothing out here.
    peer = {"ifname": device, "net_ns_fd": namespace, "address": mac}
    near = host.ensure(name, "veth", owner_id, mtu=bridge.mtu, peer=peer)
    namespaces.set_sysctl(f"ipv6/conf/{name}/disable_ipv6", 1)
    # As libvirt's taps have it: a bridge takes its lowest member's address, and this is none.
    host.settle(near, address=f"fe{mac[2:]}", mtu=bridge.mtu, master=bridge.index, state="up")
    with namespaces.entered(namespace), links.opened() as inside:
        inside.settle(inside.get(device), address=mac, mtu=bridge.mtu, state="up")


def ensure(host: Links, segment: pb.NetworkSegment, bridge: Link) -> Service:
    """Make a network's service namespace; its segment has at least one served subnet."""
    namespace = names.service_namespace(segment.vni)
    name = names.service_link(segment.vni)
    ensure_namespace(namespace, segment.network_id)
    ensure_cable(
        host,
        name,
        segment.network_id,
        bridge=bridge,
        namespace=namespace,
        device=_DEVICE,
        mac=segment.service_mac,
    )
    bridges.pin(host, segment.service_mac, host.get(name))
    addresses = {f"{names.METADATA_IP}/32"}
    for subnet in served_subnets(segment):
        prefix = ipaddress.ip_network(subnet.cidr, strict=False).prefixlen
        addresses.add(f"{subnet.service_ip}/{prefix}")
    with namespaces.entered(namespace), links.opened() as inside:
        inside.ensure_addresses(inside.get(_DEVICE), addresses)
    return Service(segment.network_id, namespace, namespaces.identity(namespace), _DEVICE)


def metadata_socket(service: Service) -> socket.socket:
    """Open the socket on which a network's metadata are served."""
    with namespaces.entered(service.namespace):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((names.METADATA_IP, _METADATA_PORT))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def owner_of(namespace: str) -> str | None:
    """Return whom a namespace was made for; None if it is not ours."""
    with namespaces.entered(namespace), links.opened() as inside:
        return inside.all()["lo"].owner


def remove_unnamed(host: Links, vnis: Set[int]) -> None:
    """Remove the service namespaces of networks that the document does not name."""
    for name in namespaces.list_names():
        found = names.SERVICE_NAMESPACE.fullmatch(name)
        if found and int(found[1]) not in vnis and owner_of(name) is not None:
            host.remove(names.service_link(int(found[1])))
            namespaces.remove(name)
