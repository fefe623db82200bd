"""Everything of mcloud's network that is on a host, whether or not a document names it."""

from __future__ import annotations

from mcloud.common.v1.session_pb2 import Artifact
from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import dhcp, links, names, nft, routers
from mcloud_agents.network.settings import Settings


def artifacts(document: pb.HostDataplane, settings: Settings) -> list[Artifact]:
    """Return the things on the host with the ids of those they are for, where these are known.

    Bridges and routers say themselves whose they are; taps, filters and DHCP entries are known by
    the document, so what it does not name has no owner.
    """
    by_device = {port.device_name: port.port_id for port in document.ports}
    by_mac = {
        (network.vni, port.mac): port.port_id
        for network in document.networks
        for port in document.ports
        if port.network_id == network.network_id
    }
    found = []
    with links.opened() as host:
        present = host.all()
    ours = {link.index for name, link in present.items() if names.BRIDGE.fullmatch(name)}
    for name, link in present.items():
        if names.BRIDGE.fullmatch(name):
            found.append(Artifact(kind=Artifact.KIND_BRIDGE, name=name, owner_id=link.owner or ""))
        elif name in by_device or (link.master in ours and link.owner is None):
            owner = by_device.get(name, "")
            found.append(Artifact(kind=Artifact.KIND_TAP, name=name, owner_id=owner))
    for item in nft.list_table("inet", names.TABLE):
        chain = item.get("chain", {}).get("name", "")
        if chain.startswith("in-"):
            owner = by_device.get(chain.removeprefix("in-"), "")
            found.append(Artifact(kind=Artifact.KIND_FILTER, name=chain, owner_id=owner))
    for vni, mac in dhcp.list_entries(settings):
        owner = by_mac.get((vni, mac), "")
        found.append(Artifact(kind=Artifact.KIND_DHCP_ENTRY, name=f"{vni}/{mac}", owner_id=owner))
    for namespace, owner in routers.list_routers().items():
        found.append(Artifact(kind=Artifact.KIND_ROUTER, name=namespace, owner_id=owner))
    return found
