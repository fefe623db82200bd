"""Pieces of nftables' JSON language.

Source: libnftables-json(5).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Expression = Any
Statement = Mapping[str, Any]

ACCEPT: Statement = {"accept": None}
RETURN: Statement = {"return": None}
DROP: Sequence[Statement] = ({"counter": None}, {"drop": None})


def meta(key: str) -> Expression:
    """Name what the kernel knows of a packet beside its bytes."""
    return {"meta": {"key": key}}


def payload(protocol: str, field: str) -> Expression:
    """Name a header's field."""
    return {"payload": {"protocol": protocol, "field": field}}


def conntrack(key: str) -> Expression:
    """Name what the kernel knows of a packet's flow."""
    return {"ct": {"key": key}}


def masked(left: Expression, mask: int) -> Expression:
    """Keep some bits of a value."""
    return {"&": [left, mask]}


def match(left: Expression, right: Expression, op: str = "==") -> Statement:
    """Go on with the rule only if this holds."""
    return {"match": {"op": op, "left": left, "right": right}}


def anonymous_set(members: Iterable[Expression]) -> Expression:
    """Any of these; order is made certain, so that equal rules look equal."""
    return {"set": sorted(members, key=repr)}


def named(name: str) -> Expression:
    """Name a set or map of the table (Table.set, Table.map)."""
    return f"@{name}"


def verdict_map(key: Expression, map_: Expression) -> Statement:
    """Choose what to do by a value; go on with the next rule if it is not among the keys."""
    return {"vmap": {"key": key, "data": map_}}


def value_map(key: Expression, map_: Expression) -> Expression:
    """Look a value up; the rule ends if the key is not there."""
    return {"map": {"key": key, "data": map_}}


def anonymous_map(values: Mapping[Any, Any]) -> Expression:
    """Values by their keys."""
    return {"set": [[k, v] for k, v in values.items()]}


def jump(chain: str) -> Statement:
    """Continue in a chain, and here if it returns."""
    return {"jump": {"target": chain}}


def goto(chain: str) -> Statement:
    """Continue in a chain for good."""
    return {"goto": {"target": chain}}


def set_value(key: Expression, value: Expression) -> Statement:
    """Change what the kernel knows of a packet or its flow."""
    return {"mangle": {"key": key, "value": value}}


def networks(cidrs: Iterable[str]) -> Expression:
    """Make a set of address ranges of one IP version, merged: nftables refuses overlapping ones.

    Returns:
        None if they cover every address.
    """
    ranges = [ipaddress.ip_network(cidr, strict=False) for cidr in cidrs]
    merged: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = [
        *ipaddress.collapse_addresses(r for r in ranges if isinstance(r, ipaddress.IPv4Network)),
        *ipaddress.collapse_addresses(r for r in ranges if isinstance(r, ipaddress.IPv6Network)),
    ]
    if any(network.prefixlen == 0 for network in merged):
        return None
    return {
        "set": [
            str(network.network_address)
            if network.prefixlen == network.max_prefixlen
            else {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}
            for network in merged
        ]
    }


class Table:
    """What a table is to hold: chains with their rules, and named sets and maps."""

    def __init__(self, family: str, name: str) -> None:
        self.family = family
        self.name = name
        self.chains: dict[str, Mapping[str, object]] = {}  # attributes by name
        self.rules: dict[str, list[Sequence[Statement]]] = {}  # by chain
        self.sets: dict[str, Mapping[str, object]] = {}  # attributes by name
        # By set: the members of one, with None; the values of a map by its keys.
        self.elements: dict[str, dict[Any, Any]] = {}

    def base_chain(self, name: str, kind: str, hook: str, priority: int) -> None:
        """Add a chain that the kernel enters by itself; what it does not decide is accepted."""
        self._add_chain(name, type=kind, hook=hook, prio=priority, policy="accept")

    def chain(self, name: str) -> None:
        """Add a chain that others jump to."""
        self._add_chain(name)

    def _add_chain(self, name: str, **attributes: object) -> None:
        self.chains[name] = attributes
        self.rules.setdefault(name, [])

    def rule(self, chain: str, *statements: Statement) -> None:
        """Add a rule at the end of a chain."""
        self.rules[chain].append(statements)

    def set(self, name: str, type_: str, members: Iterable[Expression]) -> None:
        """Add a set of this type ("ifname", "mark", …)."""
        self.sets[name] = {"type": type_}
        self.elements[name] = dict.fromkeys(members)

    def map(self, name: str, types: tuple[str, str], values: Mapping[Any, Any]) -> None:
        """Add a map from the one type to the other, or to "verdict"."""
        self.sets[name] = {"type": types[0], "map": types[1]}
        self.elements[name] = dict(values)

    # --- as commands ----------------------------------------------------------------------------

    def commands(self) -> list[Statement]:
        """Return what fills an empty table: chains first, since all the rest names them."""
        return [
            *map(self.add_chain, self.chains),
            *(command for name in self.sets for command in self.add_set(name)),
            *(command for chain in self.chains for command in self.add_rules(chain)),
        ]

    def add_chain(self, name: str) -> Statement:
        """Return the command that makes a chain, without rules."""
        return {"add": {"chain": {**self._within(name=name), **self.chains[name]}}}

    def add_rules(self, chain: str) -> list[Statement]:
        """Return the commands that put a chain's rules at its end."""
        within = self._within(chain=chain)
        return [{"add": {"rule": {**within, "expr": list(rule)}}} for rule in self.rules[chain]]

    def add_set(self, name: str) -> list[Statement]:
        """Return the commands that make a set or map with what is in it."""
        kind = "map" if "map" in self.sets[name] else "set"
        made = {"add": {kind: {**self._within(name=name), **self.sets[name]}}}
        return [made, *self.change_elements("add", name, self.elements[name])]

    def change_elements(self, verb: str, name: str, keys: Iterable[Any]) -> list[Statement]:
        """Return the command that adds or deletes these of a set's elements; none for no keys."""
        values = self.elements[name]
        elements = [key if values[key] is None else [key, values[key]] for key in keys]
        if not elements:
            return []
        return [{verb: {"element": {**self._within(name=name), "elem": elements}}}]

    def change_chain(self, verb: str, name: str) -> Statement:
        """Return the command that flushes or deletes a chain."""
        return {verb: {"chain": self._within(name=name)}}

    def delete_set(self, name: str) -> Statement:
        """Return the command that deletes a set or map."""
        return {"delete": {"map" if "map" in self.sets[name] else "set": self._within(name=name)}}

    def _within(self, **names: str) -> dict[str, str]:
        return {"family": self.family, "table": self.name, **names}
