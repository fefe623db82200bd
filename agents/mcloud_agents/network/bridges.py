"""Bridges and the overlay: one bridge a network, one VXLAN device to the other hosts.

Nothing is learned from the overlay. Where a network's other ports are stands in the document, as
forwarding entries; what goes to all of them is sent once to each host that has one.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Set

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import names, namespaces
from mcloud_agents.network.links import Link, Links
from mcloud_agents.network.settings import Settings
from mcloud_base.errors import WrongState

_EVERYONE = "00:00:00:00:00:00"
# linux/neighbour.h. pyroute2 fills these in for some commands only, so they are always given.
_SELF, _MASTER, _STICKY = 0x02, 0x04, 0x20
_NOARP, _PERMANENT = 0x40, 0x80


def bridge_name(segment: pb.NetworkSegment, settings: Settings) -> str:
    """Return the bridge that a network's devices belong to.

    Raises:
        WrongState: PHYSICAL_NETWORK_MISSING, the host's settings do not name it.
    """
    if not segment.physical_network:
        return names.bridge(segment.vni)
    return physical_bridge(segment.physical_network, settings.physical_networks)


def physical_bridge(physical_network: str, bridges: Mapping[str, str]) -> str:
    """Return the bridge that leads to a network of the outside world."""
    if physical_network not in bridges:
        raise WrongState(
            "PHYSICAL_NETWORK_MISSING",
            f"no bridge leads to physical network {physical_network}; name one in the settings",
            physical_network=physical_network,
        )
    return bridges[physical_network]


def ensure_sysctls() -> None:
    """Make the kernel show bridged packets to the filter.

    Raises:
        WrongState: BRIDGE_FILTER_MISSING, the kernel has no br_netfilter.
    """
    try:
        for key in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
            namespaces.set_sysctl(f"bridge/{key}", 1)
    except FileNotFoundError as error:
        raise WrongState(
            "BRIDGE_FILTER_MISSING",
            "the kernel has no br_netfilter; load it: modprobe br_netfilter",
        ) from error


def ensure(links: Links, segment: pb.NetworkSegment, settings: Settings) -> Link:
    """Make a network's bridge and overlay device as the document says, and return the bridge."""
    if segment.physical_network:
        return links.get(bridge_name(segment, settings))
    name = names.bridge(segment.vni)
    bridge = links.ensure(
        name,
        "bridge",
        segment.network_id,
        mtu=segment.mtu,
        br_stp_state=0,
        br_forward_delay=0,
        br_mcast_snooping=0,
    )
    # A bridge would take its lowest member's address, and change it as members come and go.
    mac = "02:6d:63:" + segment.vni.to_bytes(3, "big").hex(":")
    _keep_the_host_out(name)
    links.settle(bridge, mtu=segment.mtu, address=mac, state="up")
    overlay = _ensure_vxlan(links, segment, settings, bridge)
    _ensure_forwarding(links, segment, settings, overlay)
    return bridge


def _keep_the_host_out(name: str) -> None:
    """Give the host no address and no voice on a tenant's network."""
    namespaces.set_sysctl(f"ipv6/conf/{name}/disable_ipv6", 1)
    namespaces.set_sysctl(f"ipv4/conf/{name}/arp_ignore", 8)  # Linux answers for all its devices


def _ensure_vxlan(
    links: Links, segment: pb.NetworkSegment, settings: Settings, bridge: Link
) -> Link:
    name = names.vxlan(segment.vni)
    underlay = links.get(settings.underlay_device).index if settings.underlay_device else 0
    present = links.find(name)
    if present and present.owner is not None:
        data = present.data
        same = (
            data.get("IFLA_VXLAN_ID") == segment.vni
            and data.get("IFLA_VXLAN_LOCAL") == settings.underlay_ip
            and data.get("IFLA_VXLAN_PORT") == settings.vxlan_port
            and (data.get("IFLA_VXLAN_LINK") or 0) == underlay
        )
        if not same:  # these cannot be changed
            links.remove(name)
    attributes: dict[str, object] = {
        "vxlan_id": segment.vni,
        "vxlan_local": settings.underlay_ip,
        "vxlan_port": settings.vxlan_port,
        "vxlan_learning": 0,
    }
    if underlay:
        attributes["vxlan_link"] = underlay
    overlay = links.ensure(name, "vxlan", segment.network_id, **attributes)
    namespaces.set_sysctl(f"ipv6/conf/{name}/disable_ipv6", 1)
    links.settle(overlay, mtu=segment.mtu, master=bridge.index, state="up")
    links.socket.brport("set", index=overlay.index, learning=0)
    return overlay


def _ensure_forwarding(
    links: Links, segment: pb.NetworkSegment, settings: Settings, overlay: Link
) -> None:
    remote = {p.mac: p.underlay_ip for p in segment.remote_ports}
    remote = {mac: ip for mac, ip in remote.items() if ip != settings.underlay_ip}
    tunnels = {(_EVERYONE, ip) for ip in remote.values()} | set(remote.items())
    present_tunnels: set[tuple[str, str]] = set()
    present_macs: set[str] = set()
    for message in links.socket.get_neighbours(family=socket.AF_BRIDGE):
        if message["ifindex"] != overlay.index:
            continue
        mac, destination = message.get_attr("NDA_LLADDR"), message.get_attr("NDA_DST")
        if destination:
            present_tunnels.add((mac, destination))
        elif message.get_attr("NDA_MASTER") and message["state"] == _NOARP:
            present_macs.add(mac)  # of the bridge; "permanent" would mean the device's own
    at = {"ifindex": overlay.index}
    for mac, ip in sorted(tunnels - present_tunnels):
        # One destination a port, but a list of them for what goes to everyone.
        command = "append" if mac == _EVERYONE else "replace"
        links.socket.fdb(command, lladdr=mac, dst=ip, flags=_SELF, state=_NOARP | _PERMANENT, **at)
    for mac, ip in sorted(present_tunnels - tunnels):
        if mac not in remote:  # otherwise it has just been replaced
            links.socket.fdb("del", lladdr=mac, dst=ip, flags=_SELF, state=_NOARP, **at)
    for mac in sorted(present_macs - set(remote)):
        links.socket.fdb("del", lladdr=mac, flags=_MASTER, state=_NOARP, **at)
    for mac in sorted(set(remote) - present_macs):
        links.socket.fdb("replace", lladdr=mac, flags=_MASTER, state=_NOARP, **at)


def pin(links: Links, mac: str, link: Link) -> None:
    """Keep an address at one device of a bridge, whoever else sends from it."""
    links.socket.fdb(
        "replace", ifindex=link.index, lladdr=mac, flags=_MASTER | _STICKY, state=_NOARP
    )


def ensure_membership(links: Links, bridge: Link, device: str, mtu: int) -> None:
    """Put a guest's device back into its bridge, if it is there and has lost it."""
    link = links.find(device)
    if link is not None and link.master == 0:
        links.settle(link, master=bridge.index, mtu=mtu, state="up")


def list_ours(links: Links) -> list[str]:
    """Return the bridges that are mcloud's, named by a document or not."""
    return [
        name
        for name, link in links.all().items()
        if names.BRIDGE.fullmatch(name) and link.owner is not None
    ]


def remove_unnamed(links: Links, vnis: Set[int]) -> None:
    """Remove the bridges and overlay devices of networks that the document does not name.

    A bridge stays as long as a device that is not ours hangs on it: a guest that nobody names is
    left running, and the filter lets nothing through.
    """
    present = links.all()
    for name, link in present.items():
        overlay = names.VXLAN.fullmatch(name)
        if overlay and link.owner is not None and int(overlay[1]) not in vnis:
            links.remove(name)
        bridge = names.BRIDGE.fullmatch(name)
        if bridge and link.owner is not None and int(bridge[1]) not in vnis:
            members = [m for m in present.values() if m.master == link.index]
            if all(member.owner is not None for member in members):
                links.remove(name)
