"""The scheduler's view of the hosts: arrays, one entry a host, kept up to date as things change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mcloud_controlplane.scheduler.server_group import Group

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Resources = tuple[float, float, float]  # (vCPUs, MiB, GiB)

# The rows of `limit` and `claimed`.
VCPU, MEMORY, DISK = 0, 1, 2
DIMENSIONS = ("vcpus", "MiB of memory", "GiB of disk")


@dataclass(frozen=True)
class HostRecord:
    """What is known of one host."""

    id: str
    name: str
    enabled: bool
    zone: str
    arch: str
    limit: Resources  # what may be claimed: total less reserved, times the ratio
    claimed: Resources
    instance_count: int
    failure_count: int
    report_time: int  # µs since 1970

    def has_room(self, resources: Resources) -> bool:
        """Tell whether so much more may be claimed on it."""
        return self.enabled and all(
            used + more <= most
            for used, more, most in zip(self.claimed, resources, self.limit, strict=True)
        )

    def claiming(self, resources: Resources) -> HostRecord:
        """Return what is known of it once so much more is claimed."""
        vcpus, memory, disk = (
            used + more for used, more in zip(self.claimed, resources, strict=True)
        )
        return replace(self, claimed=(vcpus, memory, disk), instance_count=self.instance_count + 1)


class Words:
    """Numbers that stand for words, since arrays of numbers are compared at once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._words: list[str] = []

    def add(self, word: str) -> int:
        """Return the number of a word; it is given one if it has none."""
        number = self._numbers.setdefault(word, len(self._words))
        if number == len(self._words):
            self._words.append(word)
        return number

    def find(self, word: str) -> int:
        """Return the number of a word; -1: it has none."""
        return self._numbers.get(word, -1)

    def word(self, number: int) -> str:
        """Return what a number stands for."""
        return self._words[number]


@dataclass
class Hosts:
    """All hosts, in no order. Arrays have one entry a host; those of resources have three rows.

    `zones` and `archs` are numbers of `words`. `free` is what is left of `limit`, and `free_share`
    the part of it: each choice asks for them, and a claim changes one entry.
    """

    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    words: Words = field(default_factory=Words)
    zones: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    archs: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    enabled: Bools = field(default_factory=lambda: np.empty(0, np.bool_))
    limit: Floats = field(default_factory=lambda: np.empty((3, 0)))
    claimed: Floats = field(default_factory=lambda: np.empty((3, 0)))
    free: Floats = field(default_factory=lambda: np.empty((3, 0)))
    free_share: Floats = field(default_factory=lambda: np.empty((3, 0)))
    instance_count: Floats = field(default_factory=lambda: np.empty(0))
    failure_count: Floats = field(default_factory=lambda: np.empty(0))
    report_time: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    index: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[HostRecord]) -> Hosts:
        """Build the arrays."""
        words = Words()
        limit = np.array([record.limit for record in records], dtype=float).reshape(-1, 3).T.copy()
        claimed = np.array([record.claimed for record in records], dtype=float)
        claimed = claimed.reshape(-1, 3).T.copy()
        free = limit - claimed
        return cls(
            ids=[record.id for record in records],
            names=[record.name for record in records],
            words=words,
            zones=np.array([words.add(record.zone) for record in records], dtype=np.int64),
            archs=np.array([words.add(record.arch) for record in records], dtype=np.int64),
            enabled=np.array([record.enabled for record in records], dtype=np.bool_),
            limit=limit,
            claimed=claimed,
            free=free,
            free_share=free / np.maximum(limit, 1),
            instance_count=np.array([record.instance_count for record in records], dtype=float),
            failure_count=np.array([record.failure_count for record in records], dtype=float),
            report_time=np.array([record.report_time for record in records], dtype=np.int64),
            index={record.id: number for number, record in enumerate(records)},
        )

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Iterable[str]) -> list[int]:
        """Return where the entries of hosts are; not of those that have none."""
        return [self.index[id_] for id_ in ids if id_ in self.index]

    def claim(self, id_: str, resources: Resources) -> None:
        """Count on what is about to be claimed on a host."""
        number = self.index[id_]
        self.claimed[:, number] += resources
        self._find_free(number)

    def give_back(self, id_: str, resources: Resources) -> None:
        """Count no more on what was to be claimed."""
        number = self.index[id_]
        self.claimed[:, number] -= resources
        self._find_free(number)

    def _find_free(self, number: int) -> None:
        limit = self.limit[:, number]
        free = limit - self.claimed[:, number]
        self.free[:, number] = free
        self.free_share[:, number] = free / np.maximum(limit, 1)

    def update(self, records: Mapping[str, HostRecord | None]) -> Hosts:
        """Take over what changed; None: the host is gone. Returns the view to use from now on."""
        if any(record is None or id_ not in self.index for id_, record in records.items()):
            kept = {id_: self.record(number) for id_, number in self.index.items()}
            return Hosts.of(
                [record for record in {**kept, **records}.values() if record is not None]
            )
        for id_, record in records.items():
            assert record is not None
            number = self.index[id_]
            self.names[number] = record.name
            self.zones[number] = self.words.add(record.zone)
            self.archs[number] = self.words.add(record.arch)
            self.enabled[number] = record.enabled
            self.limit[:, number] = record.limit
            self.claimed[:, number] = record.claimed
            self._find_free(number)
            self.instance_count[number] = record.instance_count
            self.failure_count[number] = record.failure_count
            self.report_time[number] = record.report_time
        return self

    def heard(self, times: Mapping[str, int]) -> None:
        """Take over when hosts have reported last: µs since 1970."""
        for id_, time in times.items():
            if (number := self.index.get(id_)) is not None:
                self.report_time[number] = time

    def shows(self, id_: str, record: HostRecord | None) -> bool:
        """Tell whether an entry says what is recorded, but for the times; None: no such host."""
        number = self.index.get(id_)
        if number is None or record is None:
            return number is None and record is None
        return replace(self.record(number), report_time=record.report_time) == record

    def record(self, number: int) -> HostRecord:
        """Return one entry."""
        return HostRecord(
            id=self.ids[number],
            name=self.names[number],
            enabled=bool(self.enabled[number]),
            zone=self.words.word(int(self.zones[number])),
            arch=self.words.word(int(self.archs[number])),
            limit=(
                float(self.limit[0, number]),
                float(self.limit[1, number]),
                float(self.limit[2, number]),
            ),
            claimed=(
                float(self.claimed[0, number]),
                float(self.claimed[1, number]),
                float(self.claimed[2, number]),
            ),
            instance_count=int(self.instance_count[number]),
            failure_count=int(self.failure_count[number]),
            report_time=int(self.report_time[number]),
        )


@dataclass(frozen=True)
class Need:
    """What is looked for."""

    resources: Resources
    host_id: str = ""
    zone: str = ""
    arch: str = ""
    excluded: frozenset[str] = frozenset()
    now: int = 0  # µs since 1970
    silent_after_us: int = 30_000_000
    group: Group | None = None  # that it is to be a member of
