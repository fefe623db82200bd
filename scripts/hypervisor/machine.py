"""What the machine's own network namespace gets, recorded before it is made.

One veth, one nftables table, and forwarding on two interfaces. Whatever else is there belongs
to somebody else: it is looked at, never changed.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hypervisor import kernel
from hypervisor.kernel import LabError, Process

MTU = 1600  # 1500 for guests and room for the 50 bytes of a VXLAN header
ALIAS = "mcloud lab "  # then the state directory: by this, labs on one machine find each other


@dataclass(frozen=True)
class Settings:
    """What tells a lab from others on the same machine."""

    state: Path
    prefix: str
    underlay: ipaddress.IPv4Network
    external: ipaddress.IPv4Network

    @classmethod
    def load(cls, state: Path) -> Settings | None:
        """Read the settings of the lab in `state`; None if there is none."""
        try:
            saved = json.loads((state / "lab.json").read_text())
        except FileNotFoundError:
            return None
        return cls(
            state,
            saved["prefix"],
            ipaddress.IPv4Network(saved["underlay"]),
            ipaddress.IPv4Network(saved["external"]),
        )

    def save(self) -> None:
        """Put them on disk: from then on `state` is a lab's."""
        content = {name: str(value) for name, value in asdict(self).items() if name != "state"}
        _write_json(self.state / "lab.json", content)

    @property
    def link(self) -> str:
        """The machine's interface to the hosts."""
        return f"{self.prefix}0"

    @property
    def table(self) -> str:
        """The machine's nftables table."""
        return f"{self.prefix}_lab"

    @property
    def switch(self) -> str:
        """The namespace that joins the hosts."""
        return f"{self.prefix}-switch"

    @property
    def gateway(self) -> ipaddress.IPv4Address:
        """The machine, as the hosts see it."""
        return self.underlay[1]

    def address(self, number: int) -> ipaddress.IPv4Address:
        """Underlay address of host `number`, which counts from 1."""
        return self.underlay[10 + number]


# --- the journal --------------------------------------------------------------------------------


@dataclass
class Journal:
    """What `down` has to take back. An entry is on disk before the thing it names exists."""

    path: Path
    inits: dict[str, Process] = field(default_factory=dict)  # of the switch and the hosts
    link: str = ""
    table: str = ""
    sysctls: dict[str, str] = field(default_factory=dict)  # path below /proc/sys: value before

    @classmethod
    def load(cls, state: Path) -> Journal:
        """Read the journal of a lab. After a restart of the machine there is nothing in it."""
        path = state / "undo.json"
        try:
            saved = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(path)
        if saved.pop("boot") != _boot_id():
            return cls(path)
        saved["inits"] = {name: Process(**init) for name, init in saved["inits"].items()}
        return cls(path, **saved)

    def save(self) -> None:
        """Put it on disk, whole."""
        content = asdict(self)
        del content["path"]
        _write_json(self.path, {"boot": _boot_id(), **content})

    def empty(self) -> bool:
        """Tell whether nothing is left to take back."""
        return not (self.inits or self.link or self.table or self.sysctls)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file at once and durably: whoever is killed leaves the old one or the new one."""
    new = path.with_suffix(".new")
    with new.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


# --- making -------------------------------------------------------------------------------------


def refuse_conflicts(settings: Settings, journal: Journal) -> None:
    """Check that what the lab does not have yet belongs to nobody else.

    Raises:
        LabError: a name or an address range is in use.
    """
    link, table = settings.link, settings.table
    if not journal.table and any(
        (there["family"], there["name"]) == ("ip", table) for there in _ruleset("table")
    ):
        raise LabError(f"the machine has an nftables table {table}; choose another --prefix")
    if not journal.link:
        if has_link(link):
            raise LabError(f"the machine has an interface {link} already; choose another --prefix")
        _refuse_ranges_in_use(settings)


def ensure_link(settings: Settings, journal: Journal, switch: Process) -> None:
    """Join the machine to the switch by a veth, with the machine's addresses on it."""
    link = settings.link
    journal.link = link
    journal.save()
    if not has_link(link):
        kernel.ip(f"link add {link} mtu {MTU} type veth peer uplink mtu {MTU} netns {switch.pid}")
    kernel.ip(
        f"""
        link set {link} alias "{ALIAS}{settings.state}"
        addr replace {settings.gateway}/{settings.underlay.prefixlen} dev {link}
        addr replace {settings.external[1]}/{settings.external.prefixlen} dev {link}
        link set {link} up
        """
    )
    kernel.ip("link set uplink master bridge up", switch)


def ensure_table(settings: Settings, journal: Journal) -> None:
    """Masquerade hosts and guests; open floating addresses and close the underlay to others."""
    name, link = settings.table, settings.link
    journal.table = name
    journal.save()
    ranges = f"{settings.underlay}, {settings.external}"
    kernel.run(
        ["nft", "-f", "-"],
        input=f"""
        table ip {name}
        delete table ip {name}
        table ip {name} {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                ip saddr {{ {ranges} }} oifname != "{link}" masquerade
            }}
            chain forward {{
                type filter hook forward priority filter; policy accept;
                iifname "{link}" tcp flags syn tcp option maxseg size set rt mtu
                iifname "{link}" accept
                oifname "{link}" ct state established,related accept
                oifname "{link}" ip daddr {settings.external} accept
                oifname "{link}" drop
            }}
        }}
        """,
    )


def ensure_forwarding(settings: Settings, journal: Journal) -> str | None:
    """Forward between the lab and the interface of the default route, and nowhere else.

    It is set per interface: net.ipv4.ip_forward would set all of them.

    Returns:
        The interface of the default route; None if there is none.
    """
    _write_sysctl(_forwarding(settings.link), "1")  # goes when the interface goes
    routes = json.loads(kernel.run(["ip", "-json", "-4", "route", "show", "default"]))
    if not routes:
        return None
    uplink: str = min(routes, key=lambda route: route.get("metric", 0))["dev"]
    sysctl = _forwarding(uplink)
    if sysctl not in journal.sysctls:
        # What another lab has set, that lab found otherwise: whichever goes last puts that back.
        found = (lab.sysctls[sysctl] for lab in _other_labs(settings) if sysctl in lab.sysctls)
        journal.sysctls[sysctl] = next(found, None) or _read_sysctl(sysctl)
        journal.save()
    _write_sysctl(sysctl, "1")
    return uplink


# --- taking back --------------------------------------------------------------------------------


def undo(settings: Settings, journal: Journal) -> None:
    """Take everything back, forgetting each thing once it is gone."""
    for name in sorted(journal.inits, key=lambda name: name == "switch"):  # hosts first
        journal.inits[name].kill()
        del journal.inits[name]
        journal.save()
    needed = {sysctl for lab in _other_labs(settings) for sysctl in lab.sysctls}
    for sysctl in list(journal.sysctls):
        if sysctl not in needed and Path("/proc/sys", sysctl).exists():
            _write_sysctl(sysctl, journal.sysctls[sysctl])
        del journal.sysctls[sysctl]
        journal.save()
    if journal.table:
        table = f"table ip {journal.table}"
        kernel.run(["nft", "-f", "-"], input=f"{table}\ndelete {table}\n")
        journal.table = ""
        journal.save()
    if journal.link:
        remove_link(journal.link)
        journal.link = ""
        journal.save()


# --- looking ------------------------------------------------------------------------------------


def has_link(name: str, init: Process | None = None) -> bool:
    """Tell whether a network namespace has an interface of this name."""
    return any(link["ifname"] == name for link in _links(init))


def remove_link(name: str, init: Process | None = None) -> None:
    """Delete an interface if it is there; the kernel may do so too, after its other end."""
    try:
        kernel.run(["ip", "link", "delete", name], init)
    except LabError:
        if has_link(name, init):
            raise


def find_obstacles(settings: Settings) -> list[str]:
    """Say which foreign firewall chains drop the lab's packets, and which rules let them pass."""
    return [*_nft_obstacles(settings.link), *_legacy_obstacles(settings.link)]


def _nft_obstacles(link: str) -> Iterator[str]:
    chains, all_rules = _ruleset("chain"), _ruleset("rule")
    for chain in chains:
        family, table, name, hook = (chain.get(key) for key in ("family", "table", "name", "hook"))
        if family not in ("ip", "inet") or hook not in ("forward", "input"):
            continue
        rules = [rule for rule in all_rules if (rule["family"], rule["table"]) == (family, table)]
        if any(f'"{link}"' in json.dumps(rule) for rule in rules):
            continue  # ours, or somebody has seen to it
        last = [rule for rule in rules if rule["chain"] == name][-1:]
        if chain.get("policy") != "drop" and not any(map(_drops_all, last)):
            continue
        if (family, table) == ("ip", "filter"):  # the table of iptables, which should stay its own
            names = {c["name"] for c in chains if (c["family"], c["table"]) == (family, table)}
            yield _iptables_advice("iptables", str(name), names, link)
        else:
            rule = f"nft insert rule {family} {table} {name} {{}} {link} accept"
            title = f"nftables chain {family} {table} {name}"
            yield _advice(title, hook, rule, "iifname", "oifname")


def _drops_all(rule: dict[str, Any]) -> bool:
    statements = {name for expression in rule["expr"] for name in expression}
    ends = {"drop", "reject"}
    return bool(statements & ends) and statements <= ends | {"counter", "log"}


def _legacy_obstacles(link: str) -> Iterator[str]:
    """Look at the old iptables, which nft does not show; asking it would make its tables."""
    tables = Path("/proc/net/ip_tables_names")
    if not (tables.exists() and "filter" in tables.read_text() and shutil.which("iptables-legacy")):
        return
    rules = kernel.run(["iptables-legacy", "-S"]).splitlines()
    if any(f" {link} " in rule for rule in rules):
        return
    for chain in ("FORWARD", "INPUT"):
        if f"-P {chain} DROP" in rules:
            yield _iptables_advice("iptables-legacy", chain, {r.split()[1] for r in rules}, link)


def _iptables_advice(program: str, chain: str, chains: set[str], link: str) -> str:
    # Docker puts its own rules before whatever others insert in FORWARD, except in this one.
    place = "DOCKER-USER" if chain == "FORWARD" and "DOCKER-USER" in chains else chain
    rule = f"{program} -I {place} {{}} {link} -j ACCEPT"
    return _advice(f"{program} chain {chain}", chain.lower(), rule, "-i", "-o")


def _advice(chain: str, hook: str, rule: str, inward: str, outward: str) -> str:
    if hook == "input":
        return f"{chain} drops what hosts send to this machine; to let it in: {rule.format(inward)}"
    rules = f"{rule.format(inward)}; {rule.format(outward)}"
    return f"{chain} drops what hosts and guests send through this machine; to let it pass: {rules}"


def _refuse_ranges_in_use(settings: Settings) -> None:
    routes = json.loads(kernel.run(["ip", "-json", "-4", "route", "show", "table", "all"]))
    for route in routes:
        taken = ipaddress.IPv4Network(route["dst"].replace("default", "0.0.0.0/0"))
        if taken.prefixlen <= 1:  # a default route, or one of the two halves that VPNs set
            continue
        for option in ("underlay", "external"):
            wanted: ipaddress.IPv4Network = getattr(settings, option)
            if wanted.overlaps(taken):
                raise LabError(
                    f"the machine reaches {taken} through {route.get('dev', 'a route')}, "
                    f"which overlaps {wanted}; choose another --{option}"
                )


def _other_labs(settings: Settings) -> Iterator[Journal]:
    """Journals of the machine's other labs, which their interfaces lead to."""
    for link in _links():
        alias = link.get("ifalias", "")
        state = Path(alias.removeprefix(ALIAS))
        if alias.startswith(ALIAS) and state != settings.state:
            yield Journal.load(state)


def _links(init: Process | None = None) -> list[dict[str, Any]]:
    links: list[dict[str, Any]] = json.loads(kernel.run(["ip", "-json", "link", "show"], init))
    return links


def _ruleset(kind: str) -> list[dict[str, Any]]:
    """List the machine's nftables objects of one kind: table, chain or rule."""
    ruleset = json.loads(kernel.run(["nft", "-json", "list", "ruleset"]))["nftables"]
    return [item[kind] for item in ruleset if kind in item]


def _forwarding(interface: str) -> str:
    return f"net/ipv4/conf/{interface}/forwarding"


def _read_sysctl(sysctl: str) -> str:
    return Path("/proc/sys", sysctl).read_text().strip()


def _write_sysctl(sysctl: str, value: str) -> None:
    Path("/proc/sys", sysctl).write_text(value)
