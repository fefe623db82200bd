"""The host's tables in the kernel, and the way from what they are to what they should be.

The kernel makes an addition at once. For what goes or changes it waits until all processors have
let go of the old (about 10 ms), and takes no other transaction meanwhile. So a step from one
ruleset to the next is two transactions if it can be: what is new, which a new guest waits for,
and the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from mcloud_agents.network import expressions as x
from mcloud_agents.network import filters, names, nft
from mcloud_agents.network.state import State

_log = structlog.get_logger(__name__)


@dataclass
class Difference:
    """Commands from one content of tables to another."""

    additions: list[nft.Command] = field(default_factory=list)
    changes: list[nft.Command] = field(default_factory=list)  # to be run after the additions
    # Only single ports' chains change or go: no other port needs the changes.
    can_wait: bool = True


class Ruleset:
    """The tables of the calling thread's namespace. First `begin`, then `finish`.

    Whoever else changes rulesets is noticed by the number of transactions that the kernel has
    seen; then, and after a start, the tables are read to see whether they are as they were left.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._present: Sequence[x.Table] | None = None  # in the kernel, if that is certain
        self._generation: int | None = None  # of the kernel, when it was
        self._wanted: Sequence[x.Table] = ()
        self._rest: list[nft.Command] = []
        self._changed = False

    def begin(self, wanted: Sequence[x.Table]) -> None:
        """Put everything in place that ports need which were not there before.

        Raises:
            Unavailable: PACKET_FILTER_REFUSED; the tables are as they were.
        """
        generation = nft.generation()
        present = self._present if generation == self._generation else None
        # Nothing is certain until the end.
        self._present, self._wanted, self._rest, self._changed = None, wanted, [], False
        if present is not None:
            step = difference(present, wanted)
            if step.additions and step.can_wait:
                self._rest = step.changes
            else:
                step.additions += step.changes
            self._run(step.additions)
        elif not self._is_as_left(wanted):
            self._run([c for table in wanted for c in _replace(table)])
        else:
            self._generation = generation

    def finish(self) -> None:
        """Put the rest in place, and remember what the kernel has now.

        Raises:
            Unavailable: PACKET_FILTER_REFUSED.
        """
        self._run(self._rest)
        if self._changed:
            self._state.save_digests("host", _digest(self._wanted), _listed())
            _log.info("packet filter brought up to date")
        self._present = self._wanted

    def remove(self) -> None:
        """Remove the tables.

        Raises:
            Unavailable: PACKET_FILTER_REFUSED.
        """
        self._present = None
        nft.run(filters.remove())
        self._state.save_digests("host", "", "")

    def _is_as_left(self, wanted: Sequence[x.Table]) -> bool:
        built, listed = self._state.load_digests("host")
        return _digest(wanted) == built and _listed() == listed

    def _run(self, commands: Sequence[nft.Command]) -> None:
        if not commands:
            return
        before = nft.generation()
        nft.run(commands)
        # Anything between would have counted as well.
        self._generation = before + 1 if nft.generation() == before + 1 else None
        self._changed = True


def difference(present: Sequence[x.Table], wanted: Sequence[x.Table]) -> Difference:
    """Return the way from one content of the same tables to another."""
    step = Difference()
    for old, new in zip(present, wanted, strict=True):
        _compare(old, new, step)
    return step


def _compare(old: x.Table, new: x.Table, step: Difference) -> None:
    added = [name for name in new.chains if name not in old.chains]
    gone = [name for name in old.chains if name not in new.chains]
    changed = [n for n, rules in new.rules.items() if n in old.rules and rules != old.rules[n]]
    step.can_wait &= all(map(filters.is_of_port, [*gone, *changed]))
    step.additions += map(new.add_chain, added)
    # What refers to a chain goes before it.
    step.changes += [new.change_chain("flush", name) for name in [*changed, *gone]]
    for name, elements in new.elements.items():
        if name not in old.sets:
            step.additions += new.add_set(name)
            continue
        before = old.elements[name]
        more = [key for key in elements if key not in before]
        less = [key for key in before if key not in elements]
        other = [key for key in elements if key in before and elements[key] != before[key]]
        step.additions += new.change_elements("add", name, more)
        step.changes += old.change_elements("delete", name, [*less, *other])
        step.changes += new.change_elements("add", name, other)
    step.changes += [old.change_chain("delete", name) for name in gone]
    step.changes += [old.delete_set(name) for name in old.sets if name not in new.sets]
    step.additions += [command for name in added for command in new.add_rules(name)]
    step.changes += [command for name in changed for command in new.add_rules(name)]


def _replace(table: x.Table) -> list[nft.Command]:
    return nft.replace_table(table.family, table.name, table.commands())


def _digest(tables: Sequence[x.Table]) -> str:
    return nft.digest([command for table in tables for command in _replace(table)])


def _listed() -> str:
    return nft.digest_tables([("bridge", names.TABLE), ("inet", names.TABLE)])
