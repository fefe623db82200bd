"""Routers: a namespace each, with a cable to every network, translation, and a way out."""

from __future__ import annotations

from collections.abc import Mapping, Set

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import bridges, conntrack, links, names, namespaces, nft, services
from mcloud_agents.network import expressions as x
from mcloud_agents.network.links import Link, Links
from mcloud_agents.network.settings import Settings
from mcloud_agents.network.state import State

_SYSCTLS = {
    "ipv4/ip_forward": 1,
    # Each device answers for its own addresses only: the outside must not see the inside.
    "ipv4/conf/all/arp_ignore": 1,
    "ipv4/conf/all/arp_announce": 2,
    "ipv4/conf/default/arp_notify": 1,
}


def build_table(router: pb.RouterBinding) -> list[nft.Command]:
    """Return the commands that replace a router's translation and filter."""
    table = x.Table("ip", names.TABLE)
    table.base_chain("prerouting", "nat", "prerouting", -100)
    table.base_chain("postrouting", "nat", "postrouting", 100)
    table.base_chain("forward", "filter", "forward", 0)
    if router.HasField("gateway"):
        _add_translation(table, router)
    return nft.replace_table("ip", names.TABLE, table.commands())


def _add_translation(table: x.Table, router: pb.RouterBinding) -> None:
    gateway = router.gateway
    outside = names.gateway_device(gateway.port_id)
    floating = {f.floating_ip_address: f.fixed_ip_address for f in router.floating_ips}
    inside = x.networks(f"{leg.ip_address}/{leg.prefix_len}" for leg in router.interfaces)
    source, destination = x.payload("ip", "saddr"), x.payload("ip", "daddr")
    leaves = x.match(x.meta("oifname"), outside)
    if floating:
        table.rule(
            "prerouting", {"dnat": {"addr": x.value_map(destination, x.anonymous_map(floating))}}
        )
        back = {fixed: public for public, fixed in floating.items()}
        table.rule(
            "postrouting", leaves, {"snat": {"addr": x.value_map(source, x.anonymous_map(back))}}
        )
        if router.interfaces:
            # A guest that asks for a neighbour's floating address must get its answer through
            # the router too, not straight from the neighbour.
            table.rule(
                "postrouting",
                x.match(x.meta("oifname"), outside, "!="),
                x.match(source, inside),
                x.match(x.conntrack("status"), "dnat", "in"),
                {"masquerade": None},
            )
    if gateway.snat_enabled:
        if router.interfaces:
            table.rule(
                "postrouting",
                leaves,
                x.match(source, inside),
                {"snat": {"addr": gateway.ip_address}},
            )
        # Behind translation nobody outside begins a conversation, but with a floating address.
        arrives = x.match(x.meta("iifname"), outside)
        states = x.match(x.conntrack("state"), ["established", "related"], "in")
        table.rule("forward", arrives, states, x.ACCEPT)
        translated = x.match(x.conntrack("status"), "dnat", "in")
        table.rule("forward", arrives, translated, x.ACCEPT)
        table.rule("forward", arrives, *x.DROP)


def ensure(
    host: Links,
    router: pb.RouterBinding,
    bridge_by_network: Mapping[str, Link],
    settings: Settings,
    state: State,
) -> None:
    """Make a router as the document says."""
    namespace = names.router_namespace(router.router_id)
    services.ensure_namespace(namespace, router.router_id)
    with namespaces.entered(namespace):
        for key, value in _SYSCTLS.items():
            namespaces.set_sysctl(key, value)
        # Before it can forward anything.
        ensure_table(namespace, build_table(router), state)
    for leg in router.interfaces:
        services.ensure_cable(
            host,
            names.leg_link(leg.port_id),
            leg.port_id,
            bridge=bridge_by_network[leg.network_id],
            namespace=namespace,
            device=names.leg_device(leg.port_id),
            mac=leg.mac,
        )
        _settle(namespace, names.leg_device(leg.port_id), leg, set())
    if router.HasField("gateway"):
        _ensure_gateway(host, router, settings)
    _remove_unnamed_devices(host, router)
    _end_flows(namespace, router)


def _ensure_gateway(host: Links, router: pb.RouterBinding, settings: Settings) -> None:
    gateway = router.gateway
    namespace = names.router_namespace(router.router_id)
    bridge = bridges.physical_bridge(gateway.physical_network, settings.physical_networks)
    device = names.gateway_device(gateway.port_id)
    services.ensure_cable(
        host,
        names.gateway_link(gateway.port_id),
        gateway.port_id,
        bridge=host.get(bridge),
        namespace=namespace,
        device=device,
        mac=gateway.mac,
    )
    _settle(namespace, device, gateway, {f.floating_ip_address for f in router.floating_ips})
    with namespaces.entered(namespace), links.opened() as inside:
        inside.ensure_default_route(gateway.next_hop_ip, inside.get(device))


def _settle(
    namespace: str,
    device: str,
    leg: pb.RouterInterfaceBinding | pb.ExternalGateway,
    floating: Set[str],
) -> None:
    """Give a router's device its addresses, and tell the neighbours of new ones."""
    wanted = {f"{leg.ip_address}/{leg.prefix_len}", *(f"{address}/32" for address in floating)}
    with namespaces.entered(namespace), links.opened() as inside:
        for address in inside.ensure_addresses(inside.get(device), wanted):
            links.announce(device, leg.mac, address.split("/")[0])


def ensure_table(name: str, commands: list[nft.Command], state: State) -> None:
    """Bring the mcloud table of the thread's namespace to this content."""
    built, listed = state.load_digests(name)
    table = [("ip", names.TABLE)]
    if nft.digest(commands) != built or nft.digest_tables(table) != listed:
        nft.run(commands)
        state.save_digests(name, nft.digest(commands), nft.digest_tables(table))


def _remove_unnamed_devices(host: Links, router: pb.RouterBinding) -> None:
    """Unplug what the router no longer has; the host's end of a cable goes with the other."""
    wanted = {names.leg_device(leg.port_id) for leg in router.interfaces}
    if router.HasField("gateway"):
        wanted.add(names.gateway_device(router.gateway.port_id))
    with namespaces.entered(names.router_namespace(router.router_id)), links.opened() as inside:
        for name, link in inside.all().items():
            if link.kind == "veth" and name not in wanted:
                inside.socket.link("del", index=link.index)


def _end_flows(namespace: str, router: pb.RouterBinding) -> None:
    """Forget the flows through addresses that the router no longer has."""
    fixed = {f.floating_ip_address: f.fixed_ip_address for f in router.floating_ips}
    public = {f.fixed_ip_address: f.floating_ip_address for f in router.floating_ips}
    own = {router.gateway.ip_address, *(leg.ip_address for leg in router.interfaces)}

    def is_stale(entry: conntrack.Entry) -> bool:
        asked, answers = entry.flow.destination, entry.reply_source
        sender, shown = entry.flow.source, entry.reply_destination
        if asked != answers and fixed.get(asked) != answers:
            return True
        return sender != shown and shown not in own and public.get(sender) != shown

    with namespaces.entered(namespace):
        conntrack.forget(filter(is_stale, conntrack.list_entries()))


def remove_unnamed(host: Links, router_ids: Set[str], state: State) -> None:
    """Remove the routers that the document does not name."""
    wanted = {names.router_namespace(router_id) for router_id in router_ids}
    for name in namespaces.list_names():
        if (
            names.ROUTER_NAMESPACE.fullmatch(name)
            and name not in wanted
            and services.owner_of(name) is not None
        ):
            with namespaces.entered(name), links.opened() as inside:
                for link in inside.all().values():
                    if link.kind == "veth":  # at once: a namespace ends when the kernel finds time
                        inside.socket.link("del", index=link.index)
            namespaces.remove(name)
            state.save_digests(name, "", "")


def list_routers() -> dict[str, str]:
    """Return the routers on this host: id by name of the namespace."""
    found = {}
    for name in namespaces.list_names():
        if names.ROUTER_NAMESPACE.fullmatch(name):
            found[name] = services.owner_of(name) or ""
    return found
