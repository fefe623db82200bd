"""The scheduler's view of the hosts: arrays, one entry a host, kept up to date as things change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# The rows of `limit` and `claimed`.
VCPU, MEMORY, DISK = 0, 1, 2
DIMENSIONS = ("vcpus", "MiB of memory", "GiB of disk")


@dataclass(frozen=True)
class HostRecord:
    """What is known of one host. `limit` and `claimed` are (vCPUs, MiB, GiB)."""

    id: str
    name: str
    enabled: bool
    zone: str
    arch: str
    limit: tuple[float, float, float]  # what may be claimed: total less reserved, times the ratio
    claimed: tuple[float, float, float]
    instance_count: int
    failure_count: int
    report_time: int  # µs since 1970


@dataclass
class Hosts:
    """All hosts, in no order. Arrays have one entry a host; `limit` and `claimed` three rows."""

    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    zones: npt.NDArray[np.object_] = field(default_factory=lambda: np.empty(0, object))
    archs: npt.NDArray[np.object_] = field(default_factory=lambda: np.empty(0, object))
    enabled: Bools = field(default_factory=lambda: np.empty(0, np.bool_))
    limit: Floats = field(default_factory=lambda: np.empty((3, 0)))
    claimed: Floats = field(default_factory=lambda: np.empty((3, 0)))
    instance_count: Floats = field(default_factory=lambda: np.empty(0))
    failure_count: Floats = field(default_factory=lambda: np.empty(0))
    report_time: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    index: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[HostRecord]) -> Hosts:
        """Build the arrays."""
        return cls(
            ids=[record.id for record in records],
            names=[record.name for record in records],
            zones=np.array([record.zone for record in records], dtype=object),
            archs=np.array([record.arch for record in records], dtype=object),
            enabled=np.array([record.enabled for record in records], dtype=np.bool_),
            limit=np.array([record.limit for record in records], dtype=float)
            .reshape(-1, 3)
            .T.copy(),
            claimed=np.array([r.claimed for r in records], dtype=float).reshape(-1, 3).T.copy(),
            instance_count=np.array([record.instance_count for record in records], dtype=float),
            failure_count=np.array([record.failure_count for record in records], dtype=float),
            report_time=np.array([record.report_time for record in records], dtype=np.int64),
            index={record.id: number for number, record in enumerate(records)},
        )

    def __len__(self) -> int:
        return len(self.ids)

    def free(self) -> Floats:
        """Return what may still be claimed: three rows."""
        return self.limit - self.claimed

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
            self.zones[number] = record.zone
            self.archs[number] = record.arch
            self.enabled[number] = record.enabled
            self.limit[:, number] = record.limit
            self.claimed[:, number] = record.claimed
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
            zone=str(self.zones[number]),
            arch=str(self.archs[number]),
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
    """What is looked for. `resources` is (vCPUs, MiB, GiB)."""

    resources: tuple[float, float, float]
    host_id: str = ""
    zone: str = ""
    arch: str = ""
    excluded: frozenset[str] = frozenset()
    now: int = 0  # µs since 1970
    silent_after_us: int = 30_000_000
