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
        new = self.path.with_suffix(".new")
        with new.open("w") as file:
            json.dump({"boot": _boot_id(), **content}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def empty(self) -> bool:
        """Tell whether nothing is left to take back."""
        return not (self.inits or self.link or self.table or self.sysctls)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


# --- making -------------------------------------------------------------------------------------


def ensure_link(settings: Settings, journal: Journal, switch: Process) -> None:
    """The veth between the machine and the switch, with the machine's addresses on it."""
    link = settings.link
    there = _find_link(link)
    if not journal.link:
        if there:
            raise LabError(f"the machine has an interface {link} already; choose another --prefix")
        _check_ranges(settings)
        journal.link = link
        journal.save()
    if there and there["operstate"] == "UP":
        return
    if there:
        kernel.ip(f"link del {link}")
    kernel.ip(
        f"""
        link add {link} mtu {MTU} type veth peer name uplink mtu {MTU} netns {switch.pid}
        link set {link} alias "{ALIAS}{settings.state}"
        addr add {settings.gateway}/{settings.underlay.prefixlen} dev {link}
        addr add {settings.external[1]}/{settings.external.prefixlen} dev {link}
        link set {link} up
        """
    )
    kernel.ip("link set uplink master bridge up", switch)


def ensure_table(settings: Settings, journal: Journal) -> None:
    """Masquerading for hosts and guests, and the underlay closed to everybody else."""
    name, link = settings.table, settings.link
    if not journal.table:
        tables = (item["table"] for item in _ruleset() if "table" in item)
        if any(table["family"] == "ip" and table["name"] == name for table in tables):
            raise LabError(f"the machine has an nftables table {name}; choose another --prefix")
        journal.table = name
        journal.save()
    kernel.run(
        ["nft", "-f", "-"],
        input=f"""
        table ip {name}
        delete table ip {name}
        table ip {name} {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                ip saddr {{ {settings.underlay}, {settings.external} }} oifname != "{link}" masquerade
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
    """Forwarding between the lab and the interface of the default route, and nowhere else.

    Per interface: writing net.ipv4.ip_forward would set it on all of them.

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
        # Another lab may have set it; then what that one found is what was there before.
        found = (other.sysctls[sysctl] for other in _other_labs(settings) if sysctl in other.sysctls)
        journal.sysctls[sysctl] = next(found, None) or _read_sysctl(sysctl)
        journal.save()
    _write_sysctl(sysctl, "1")
    return uplink


# --- taking back --------------------------------------------------------------------------------


def undo(settings: Settings, journal: Journal) -> None:
    """Take everything back, in the reverse order, forgetting each thing once it is gone."""
    for name in sorted(journal.inits, key=lambda name: name == "switch"):
        journal.inits[name].kill()
        del journal.inits[name]
        journal.save()
    needed = {sysctl for other in _other_labs(settings) for sysctl in other.sysctls}
    for sysctl, value in journal.sysctls.items():
        if sysctl not in needed and Path("/proc/sys", sysctl).exists():
            _write_sysctl(sysctl, value)
    journal.sysctls = {}
    journal.save()
    if journal.table:
        table = f"table ip {journal.table}"
        kernel.run(["nft", "-f", "-"], input=f"{table}\ndelete {table}\n")
        journal.table = ""
        journal.save()
    if journal.link:
        if _find_link(journal.link):
            kernel.run(["ip", "link", "del", journal.link])
        journal.link = ""
        journal.save()


# --- looking ------------------------------------------------------------------------------------


def find_obstacles(settings: Settings) -> list[str]:
    """Say which foreign firewall chains drop the lab's packets, and the rule that lets them pass."""
    return [*_nft_obstacles(settings.link), *_legacy_obstacles(settings.link)]


def _nft_obstacles(link: str) -> Iterator[str]:
    ruleset = list(_ruleset())
    for item in ruleset:
        chain = item.get("chain", {})
        hook = chain.get("hook")
        if chain.get("family") not in ("ip", "inet") or hook not in ("forward", "input"):
            continue
        family, table, name = chain["family"], chain["table"], chain["name"]
        rules = [r for i in ruleset if (r := i.get("rule", {})) and r["family"] == family]
        if any(link in json.dumps(r["expr"]) for r in rules if r["table"] == table):
            continue  # somebody has seen to it
        last = [r for r in rules if (r["table"], r["chain"]) == (table, name)][-1:]
        if chain.get("policy") != "drop" and not (last and _drops_all(last[0])):
            continue
        if (family, table) == ("ip", "filter"):  # made by iptables-nft, which must be able to read it
            chains = {c["name"] for i in ruleset if (c := i.get("chain")) and c["table"] == table}
            yield _advise(f"iptables chain {name}", link, hook, _iptables("iptables", name, chains))
        else:
            insert = f"nft insert rule {family} {table} {name} %s {link} accept"
            yield _advise(f"nftables chain {family} {table} {name}", link, hook, insert)


def _drops_all(rule: dict[str, Any]) -> bool:
    statements = {name for expression in rule["expr"] for name in expression}
    return bool(statements & {"drop", "reject"}) and not statements - {
        "drop",
        "reject",
        "counter",
        "log",
    }


def _legacy_obstacles(link: str) -> Iterator[str]:
    """The old iptables, which nft does not show. Reading its table would make one, hence the check."""
    names = Path("/proc/net/ip_tables_names")
    if not (shutil.which("iptables-legacy") and names.exists() and "filter" in names.read_text()):
        return
    rules = kernel.run(["iptables-legacy", "-S"]).splitlines()
    chains = {rule.split()[1] for rule in rules}
    if any(f" {link} " in rule for rule in rules):
        return
    for chain, hook in (("FORWARD", "forward"), ("INPUT", "input")):
        if f"-P {chain} DROP" in rules:
            command = _iptables("iptables-legacy", chain, chains)
            yield _advise(f"iptables-legacy chain {chain}", link, hook, command)


def _iptables(program: str, chain: str, chains: set[str]) -> str:
    if chain == "FORWARD" and "DOCKER-USER" in chains:
        chain = "DOCKER-USER"  # Docker puts its own rules before what others insert in FORWARD
    return f"{program} -I {chain} %s {link_placeholder} -j ACCEPT"


def _advise(chain: str, link: str, hook: str, command: str) -> str:
    raise NotImplementedError
