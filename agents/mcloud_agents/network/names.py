"""What the dataplane calls its things in the kernel, and how it knows them again.

An interface belongs to it if its name has the form given here and its alias says so; a network
namespace belongs to it if its loopback interface does. The alias also names the owner, so that
what is on the host can be told without any record. Linux gives a name fifteen characters.
"""

from __future__ import annotations

import re

TABLE = "mcloud"  # of nftables, in each family that is used
METADATA_IP = "169.254.169.254"

_ALIAS = "mcloud "
_TAIL = "[0-9a-z]{11}"
BRIDGE = re.compile(r"mcbr(\d{1,8})")
VXLAN = re.compile(r"mcvx(\d{1,8})")
SERVICE_LINK = re.compile(r"mcsv(\d{1,8})")
LEG_LINK = re.compile(f"mcrl{_TAIL}")
GATEWAY_LINK = re.compile(f"mcrg{_TAIL}")
SERVICE_NAMESPACE = re.compile(r"mcsvc-(\d{1,8})")
ROUTER_NAMESPACE = re.compile(f"mcr-{_TAIL}")


def alias(owner_id: str) -> str:
    """Return the alias of an interface made for `owner_id`."""
    return _ALIAS + owner_id


def owner(alias_text: str) -> str | None:
    """Return whom an interface was made for; None if it is not ours."""
    return alias_text.removeprefix(_ALIAS) if alias_text.startswith(_ALIAS) else None


def bridge(vni: int) -> str:
    """Return the name of an overlay network's bridge."""
    return f"mcbr{vni}"


def vxlan(vni: int) -> str:
    """Return the name of the device by which an overlay network reaches other hosts."""
    return f"mcvx{vni}"


def service_link(vni: int) -> str:
    """Return the name of the bridge's end of the cable to the network's services."""
    return f"mcsv{vni}"


def service_namespace(vni: int) -> str:
    """Return the name of the namespace with a network's DHCP and metadata services."""
    return f"mcsvc-{vni}"


def router_namespace(router_id: str) -> str:
    """Return the name of a router's namespace."""
    return f"mcr-{router_id[-11:]}"


def leg_link(port_id: str) -> str:
    """Return the name of the bridge's end of a router's cable to a network."""
    return f"mcrl{port_id[-11:]}"


def gateway_link(port_id: str) -> str:
    """Return the name of the bridge's end of a router's cable to the outside."""
    return f"mcrg{port_id[-11:]}"


def leg_device(port_id: str) -> str:
    """Return the name of the router's end of its cable to a network."""
    return f"leg-{port_id[-11:]}"


def gateway_device(port_id: str) -> str:
    """Return the name of the router's end of its cable to the outside."""
    return f"gw-{port_id[-11:]}"
