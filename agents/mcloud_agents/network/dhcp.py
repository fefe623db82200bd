"""DHCP for a host's own guests: a dnsmasq in each network's service namespace.

dnsmasq answers only the MAC addresses that it is given. It runs on when the agent ends, and the
next agent takes it over by its pid file. It also answers for the names of the network's guests on
this host, for subnets that have no name servers of their own.

Source: dnsmasq(8); classless routes: RFC 3442.
"""

from __future__ import annotations

import ipaddress
import os
import select
import signal
import subprocess
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_agents.network import names, namespaces
from mcloud_agents.network.services import Service, served_subnets
from mcloud_agents.network.settings import Settings
from mcloud_agents.network.state import write_file
from mcloud_base.errors import Unavailable

_LEASE_S = 86400
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_USER = "nobody"  # dnsmasq keeps the few capabilities that it needs


def directory(settings: Settings, vni: int) -> Path:
    """Return where a network's server has its files."""
    return settings.runtime_dir / "dhcp" / str(vni)


def configuration(segment: pb.NetworkSegment, service: Service, settings: Settings) -> str:
    """Return the server's configuration: all that it reads only at its start."""
    place = directory(settings, segment.vni)
    lines = [
        "no-resolv",
        "no-hosts",
        "no-ping",
        "bind-interfaces",
        f"interface={service.interface}",
        "except-interface=lo",
        "cache-size=0",
        "quiet-dhcp",
        f"user={_USER}",
        "group=nogroup",
        f"pid-file={place}/pid",
        f"dhcp-hostsfile={place}/hosts",
        f"addn-hosts={place}/names",
        f"dhcp-leasefile={place}/leases",
        "leasefile-ro",  # addresses are given out elsewhere; nothing is remembered here
        "dhcp-authoritative",
        f"domain={settings.dns_domain}",
        f"local=/{settings.dns_domain}/",
        f"dhcp-option=option:mtu,{segment.mtu}",
    ]
    for number, subnet in enumerate(_dhcp_subnets(segment)):
        network = ipaddress.IPv4Network(subnet.cidr, strict=False)
        tag = f"subnet{number}"
        lines.append(
            f"dhcp-range=set:{tag},{network.network_address},static,{network.netmask},{_LEASE_S}"
        )
        routes = _routes(subnet)
        # A client that understands option 121 ignores option 3. An empty option 3 is needed too:
        # dnsmasq would name itself.
        router = f",{subnet.gateway_ip}" if subnet.gateway_ip else ""
        lines.append(f"dhcp-option=tag:{tag},option:router{router}")
        for option in (121, 249):  # 249: the same for old Windows
            lines.append(f"dhcp-option=tag:{tag},{option},{','.join(routes)}")
        servers = ",".join(subnet.dns_servers) or subnet.service_ip
        lines.append(f"dhcp-option=tag:{tag},option:dns-server,{servers}")
    return "\n".join(lines) + "\n"


def _dhcp_subnets(segment: pb.NetworkSegment) -> Sequence[pb.SubnetBinding]:
    return [subnet for subnet in served_subnets(segment) if subnet.dhcp_enabled]


def _routes(subnet: pb.SubnetBinding) -> list[str]:
    """Return option 121: destinations, each followed by its next hop."""
    routes = [f"{names.METADATA_IP}/32", subnet.service_ip]
    for route in subnet.host_routes:
        routes += [
            str(ipaddress.ip_network(route.destination_cidr, strict=False)),
            route.next_hop_ip,
        ]
    if subnet.gateway_ip:
        routes += ["0.0.0.0/0", subnet.gateway_ip]
    return routes


def host_lines(segment: pb.NetworkSegment, ports: Iterable[pb.PortBinding]) -> list[str]:
    """Return a line for each port that gets an address by DHCP."""
    subnets = {subnet.subnet_id for subnet in _dhcp_subnets(segment)}
    lines = []
    for port in sorted(ports, key=lambda port: port.port_id):
        for fixed in port.fixed_ips:
            if fixed.subnet_id in subnets:
                name = f",{port.hostname}" if port.hostname else ""
                lines.append(f"{port.mac},{fixed.ip_address}{name},{_LEASE_S}")
                break  # one address a MAC; the others are the configuration drive's
    return lines


def _name_lines(ports: Iterable[pb.PortBinding], domain: str) -> list[str]:
    return [
        f"{fixed.ip_address} {port.hostname}.{domain} {port.hostname}"
        for port in sorted(ports, key=lambda port: port.port_id)
        if port.hostname
        for fixed in port.fixed_ips
    ]


def ensure(
    segment: pb.NetworkSegment,
    ports: Sequence[pb.PortBinding],
    service: Service,
    settings: Settings,
) -> int | None:
    """Make a network's server run with what the document says.

    Returns:
        Its process id; None if the network has no DHCP.
    """
    place = directory(settings, segment.vni)
    if not _dhcp_subnets(segment):
        stop(place)
        return None
    place.mkdir(parents=True, exist_ok=True)
    for path in (settings.runtime_dir, place.parent, place):
        path.chmod(0o755)
    text = "".join(f"{line}\n" for line in host_lines(segment, ports))
    changed = write_file(place / "hosts", text.encode(), 0o644)
    text = "".join(f"{line}\n" for line in _name_lines(ports, settings.dns_domain))
    changed |= write_file(place / "names", text.encode(), 0o644)
    # The namespace stands in it, so that a server left in an older one is replaced.
    text = f"# namespace {service.identity}\n{configuration(segment, service, settings)}"
    if write_file(place / "conf", text.encode(), 0o644):
        stop(place)
    pid = find(place)
    if pid is None:
        return _start(place, service)
    if changed:
        os.kill(pid, signal.SIGHUP)
    return pid


def find(place: Path) -> int | None:
    """Return the process id of the server that has its files there, if it runs."""
    try:
        pid = int((place / "pid").read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if f"--conf-file={place}/conf".encode() in arguments else None


def _start(place: Path, service: Service) -> int:
    command = ["dnsmasq", f"--conf-file={place}/conf"]
    with namespaces.entered(service.namespace):
        try:
            result = subprocess.run(  # noqa: S603 - it leaves a daemon behind, and ends
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_START_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable("DHCP_SERVER_FAILED", f"dnsmasq does not start: {error}") from error
    pid = find(place)
    if result.returncode or pid is None:
        reason = result.stderr.decode(errors="replace").strip() or "it ended at once"
        raise Unavailable("DHCP_SERVER_FAILED", f"dnsmasq does not start: {reason}")
    return pid


def stop(place: Path) -> None:
    """End the server that has its files there.

    Raises:
        Unavailable: DHCP_SERVER_STUCK, it does not end.
    """
    pid = find(place)
    if pid is None:
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if find(place) == pid:  # still: the number cannot go to another process from here on
            signal.pidfd_send_signal(process, signal.SIGKILL)
            if not select.select([process], [], [], _STOP_TIMEOUT_S)[0]:
                raise Unavailable("DHCP_SERVER_STUCK", f"dnsmasq {pid} does not end")
    except ProcessLookupError:
        pass
    finally:
        os.close(process)


def remove_unnamed(settings: Settings, vnis: Set[int]) -> None:
    """End the servers of networks that the document does not name, and remove their files."""
    for place in sorted((settings.runtime_dir / "dhcp").glob("*")):
        if place.name.isdigit() and int(place.name) not in vnis:
            stop(place)
            for name in ("hosts", "names", "conf", "pid", "leases"):
                (place / name).unlink(missing_ok=True)
            place.rmdir()


def list_entries(settings: Settings) -> list[tuple[int, str]]:
    """Return (VNI, MAC) of everybody who gets an address on this host."""
    return [
        (int(path.parent.name), line.split(",")[0])
        for path in sorted((settings.runtime_dir / "dhcp").glob("*/hosts"))
        if path.parent.name.isdigit()
        for line in path.read_text().splitlines()
    ]
