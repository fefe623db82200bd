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


def verdict_map(key: Expression, verdicts: Mapping[Any, Statement]) -> Statement:
    """Choose what to do by a value; go on with the next rule if it is not among the keys."""
    return {"vmap": {"key": key, "data": {"set": [[k, v] for k, v in verdicts.items()]}}}


def value_map(key: Expression, values: Mapping[Any, Any]) -> Expression:
    """Look a value up; the rule ends if the key is not there."""
    return {"map": {"key": key, "data": {"set": [[k, v] for k, v in values.items()]}}}


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
    """Commands that fill a table."""

    def __init__(self, family: str, name: str) -> None:
        self.family = family
        self.name = name
        self.chains: list[Statement] = []
        self.rules: list[Statement] = []

    def base_chain(self, name: str, kind: str, hook: str, priority: int) -> None:
        """Add a chain that the kernel enters by itself; what it does not decide is accepted."""
        self._add_chain(name, type=kind, hook=hook, prio=priority, policy="accept")

    def chain(self, name: str) -> None:
        """Add a chain that others jump to."""
        self._add_chain(name)

    def _add_chain(self, name: str, **attributes: object) -> None:
        chain = {"family": self.family, "table": self.name, "name": name, **attributes}
        self.chains.append({"add": {"chain": chain}})

    def rule(self, chain: str, *statements: Statement) -> None:
        """Add a rule at the end of a chain."""
        rule = {
            "family": self.family,
            "table": self.name,
            "chain": chain,
            "expr": list(statements),
        }
        self.rules.append({"add": {"rule": rule}})

    def commands(self) -> list[Statement]:
        """Return everything, chains first: rules jump to them."""
        return [*self.chains, *self.rules]
