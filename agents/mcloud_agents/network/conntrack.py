"""Flows that are under way: ended when nothing admits them any longer.

Removing a rule does not touch flows that it once admitted. Forgetting such a flow is not enough
either: the kernel takes a TCP connection up in the middle, so the end that may still send would
revive it. The flow is marked instead, and the filter drops what has the mark; it leaves the table
when both ends are silent.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyroute2 import NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import rules
from mcloud_agents.network.filters import REVOKED
from mcloud_agents.network.rules import Flow

_SUFFIXES = {socket.AF_INET: "V4", socket.AF_INET6: "V6"}  # of the attributes' names


@dataclass(frozen=True)
class Entry:
    """A flow in the kernel's table."""

    flow: Flow
    zone: int
    mark: int
    # Whose the answers are, and to whom: not those of the flow if it is translated.
    reply_source: str
    reply_destination: str
    key: NFCTAttrTuple
    family: int


def list_entries() -> Iterator[Entry]:
    """Return the flows of the calling thread's namespace."""
    # Of both families at once: the kernel walks through its whole table for each question.
    with NFCTSocket(nfgen_family=socket.AF_UNSPEC) as table:
        messages = list(table.dump())
    for message in messages:
        suffix = _SUFFIXES.get(message["nfgen_family"])
        if suffix is not None:
            yield _entry(message, message["nfgen_family"], suffix)


def _entry(message: Any, family: int, suffix: str) -> Entry:
    tuple_ = message.get_attr("CTA_TUPLE_ORIG")
    addresses, protocol = tuple_.get_attr("CTA_TUPLE_IP"), tuple_.get_attr("CTA_TUPLE_PROTO")
    reply = message.get_attr("CTA_TUPLE_REPLY").get_attr("CTA_TUPLE_IP")
    number = protocol.get_attr("CTA_PROTO_NUM")
    icmp = {rules.ICMP: "ICMP", rules.ICMPV6: "ICMPV6"}.get(number)
    port = f"CTA_PROTO_{icmp}_TYPE" if icmp else "CTA_PROTO_DST_PORT"
    flow = Flow(
        ip_version=4 if suffix == "V4" else 6,
        protocol=number,
        source=addresses.get_attr(f"CTA_IP_{suffix}_SRC"),
        destination=addresses.get_attr(f"CTA_IP_{suffix}_DST"),
        port=protocol.get_attr(port) or 0,
        code=(protocol.get_attr(f"CTA_PROTO_{icmp}_CODE") or 0) if icmp else 0,
    )
    return Entry(
        flow=flow,
        zone=message.get_attr("CTA_ZONE") or 0,
        mark=message.get_attr("CTA_MARK") or 0,
        reply_source=reply.get_attr(f"CTA_IP_{suffix}_SRC"),
        reply_destination=reply.get_attr(f"CTA_IP_{suffix}_DST"),
        key=NFCTAttrTuple.from_netlink(family, tuple_),
        family=family,
    )


def judge(
    entries: Iterable[Entry],
    ports: Iterable[pb.PortBinding],
    zones: Mapping[str, int],
    exempt: Iterable[str] = (),
) -> int:
    """Make the flows of these ports obey the rules that the ports have now.

    Args:
        entries: the flows.
        ports: all ports of the networks concerned, so that both ends of a flow are judged.
        zones: of conntrack, by network id; networks without one are in zone 0.
        exempt: addresses of services, which no rule judges.

    Returns:
        How many flows have been ended or let go on.
    """
    owners: dict[tuple[int, str], pb.PortBinding] = {}
    for port in ports:
        if port.port_security_enabled:
            for fixed in port.fixed_ips:
                owners[zones.get(port.network_id, 0), fixed.ip_address] = port
    free = set(exempt)
    changes = []
    for entry in entries:
        flow = entry.flow
        source = owners.get((entry.zone, flow.source))
        destination = owners.get((entry.zone, flow.destination))
        if (source is None and destination is None) or free & {flow.source, flow.destination}:
            continue
        admitted = (source is None or rules.admits(source.rules, rules.EGRESS, flow)) and (
            destination is None or rules.admits(destination.rules, rules.INGRESS, flow)
        )
        if admitted == bool(entry.mark & REVOKED):
            mark = entry.mark & ~REVOKED if admitted else entry.mark | REVOKED
            changes.append((entry, {"mark": mark}))
    return _change("set", changes)


def forget(entries: Iterable[Entry]) -> int:
    """Delete flows.

    Returns:
        How many were still there.
    """
    return _change("del", [(entry, {}) for entry in entries])


def _change(command: str, changes: Iterable[tuple[Entry, dict[str, int]]]) -> int:
    done = 0
    tables: dict[int, NFCTSocket] = {}
    with contextlib.ExitStack() as stack:
        for entry, attributes in changes:
            if entry.family not in tables:
                table = NFCTSocket(nfgen_family=entry.family)
                tables[entry.family] = stack.enter_context(table)
            zone = {"zone": entry.zone} if entry.zone else {}
            try:
                tables[entry.family].entry(command, tuple_orig=entry.key, **zone, **attributes)
            except NetlinkError as error:
                if error.code != errno.ENOENT:  # it ended meanwhile
                    raise
            else:
                done += 1
    return done
