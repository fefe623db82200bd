"""Interfaces, addresses and routes of the calling thread's network namespace.

Source: https://man7.org/linux/man-pages/man7/rtnetlink.7.html, through pyroute2.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mcloud_agents.network import names
from mcloud_base.errors import WrongState

IFF_UP = 1


@dataclass(frozen=True)
class Link:
    """An interface as the kernel has it."""

    index: int
    name: str
    kind: str  # "bridge", "vxlan", "veth", "tun", …; empty for hardware
    alias: str
    mac: str
    mtu: int
    master: int  # index of its bridge; 0 if none
    up: bool
    data: Mapping[str, Any]  # what the kind has of its own: IFLA_VXLAN_ID, …

    @property
    def owner(self) -> str | None:
        """Whom it was made for; None if it is not ours."""
        return names.owner(self.alias)


class Links:
    """One netlink socket, and what is asked through it."""

    def __init__(self, socket_: IPRoute) -> None:
        self.socket = socket_

    def all(self) -> dict[str, Link]:
        """Return the interfaces by name."""
        found = map(_link, self.socket.get_links())
        return {link.name: link for link in found}

    def find(self, name: str) -> Link | None:
        """Return an interface, or None."""
        try:
            # Only the one: taking the messages of all apart is what a pass spends its time with.
            (message,) = self.socket.link("get", ifname=name)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise
        return _link(message)

    def get(self, name: str) -> Link:
        """Return an interface that must be there."""
        link = self.find(name)
        if link is None:
            raise WrongState("DEVICE_MISSING", f"this host has no interface {name}", device=name)
        return link

    def ensure(self, name: str, kind: str, owner_id: str, **attributes: object) -> Link:
        """Make an interface of ours, or return the one that is there.

        One without any alias was left by a run that ended between making and marking it.

        Raises:
            WrongState: DEVICE_NOT_OURS, something else has the name.
        """
        link = self.find(name)
        if link is None:
            self.socket.link("add", ifname=name, kind=kind, **attributes)
            link = self.get(name)
        elif link.kind != kind or (link.alias and link.owner is None):
            raise WrongState(
                "DEVICE_NOT_OURS",
                f"interface {name} exists and is not mcloud's; rename it",
                device=name,
            )
        self.settle(link, ifalias=names.alias(owner_id))
        return link

    def settle(self, link: Link, **wanted: Any) -> None:
        """Bring attributes to the values given: ifalias, mtu, address, master, state ("up")."""
        present = {
            "ifalias": link.alias,
            "mtu": link.mtu,
            "address": link.mac,
            "master": link.master,
            "state": "up" if link.up else "down",
        }
        changes = {key: value for key, value in wanted.items() if present[key] != value}
        if changes:
            self.socket.link("set", index=link.index, **changes)

    def remove(self, name: str) -> None:
        """Remove an interface of ours, if it is there."""
        link = self.find(name)
        if link is not None and link.owner is not None:
            self.socket.link("del", index=link.index)

    def ensure_addresses(self, link: Link, wanted: set[str]) -> set[str]:
        """Bring an interface's IPv4 addresses ("10.0.0.1/24") to these.

        Returns:
            Those that were added.
        """
        present = {
            f"{message.get_attr('IFA_LOCAL')}/{message['prefixlen']}"
            for message in self.socket.get_addr(family=socket.AF_INET, index=link.index)
        }
        for address in sorted(present - wanted):
            ip, prefix = address.split("/")
            self.socket.addr("del", index=link.index, address=ip, prefixlen=int(prefix))
        for address in sorted(wanted - present):
            ip, prefix = address.split("/")
            self.socket.addr("replace", index=link.index, address=ip, prefixlen=int(prefix))
        return wanted - present

    def ensure_default_route(self, gateway: str, link: Link) -> None:
        """Bring the IPv4 default route to this next hop; an empty one means no such route."""
        for message in self.socket.get_default_routes(family=socket.AF_INET):
            found = (message.get_attr("RTA_GATEWAY"), message.get_attr("RTA_OIF"))
            if gateway and found == (gateway, link.index):
                return
            self.socket.route("del", dst="default", gateway=found[0], oif=found[1])
        if gateway:
            self.socket.route("add", dst="default", gateway=gateway, oif=link.index)


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=(info.get_attr("IFLA_INFO_KIND") if info else None) or "",
        alias=message.get_attr("IFLA_IFALIAS") or "",
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU"),
        master=message.get_attr("IFLA_MASTER") or 0,
        up=bool(message["flags"] & IFF_UP),
        data=dict(data["attrs"]) if data and "attrs" in data else {},
    )


@contextmanager
def opened() -> Iterator[Links]:
    """Open a netlink socket in the calling thread's namespace."""
    with IPRoute() as socket_:
        yield Links(socket_)


def announce(device: str, mac: str, ip: str) -> None:
    """Tell the neighbours on a device who has an address now (gratuitous ARP, RFC 5227)."""
    hardware = bytes.fromhex(mac.replace(":", ""))
    address = ipaddress.IPv4Address(ip).packed
    request = b"\x00\x01\x08\x00\x06\x04\x00\x01" + hardware + address + bytes(6) + address
    frame = b"\xff" * 6 + hardware + b"\x08\x06" + request
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((device, 0))
        sender.send(frame)
