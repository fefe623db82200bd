"""What the dataplane remembers on disk: its last document and the numbers it has given out.

The document lets guests keep their network, DHCP and metadata over a restart of the agent while
the control plane is away. The numbers stand in marks and conntrack zones of packets under way:
they must not change their meaning from one ruleset to the next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from mcloud.network.v1 import dataplane_pb2 as pb
from mcloud_base.errors import DataLoss, Exhausted

# Marks below are the same on every host; see filters.py.
FIRST_PORT_NUMBER = 16
LAST_PORT_NUMBER = 0xFFFF
FIRST_ZONE = 20000
LAST_ZONE = 0xFFFF


@dataclass
class Numbers:
    """What stands for ids where the kernel has room for 16 bits only."""

    ports: dict[str, int] = field(default_factory=dict)  # by port id, in the packet's mark
    zones: dict[str, int] = field(default_factory=dict)  # by network id, of conntrack

    def give_out(self, port_ids: Iterable[str], network_ids: Iterable[str]) -> Numbers:
        """Return the numbers of these ids: what they had, and unused ones for new ids.

        A number that has just become free is not given out again at once, so that a packet
        between two hooks is never judged by another port's rules.

        Raises:
            Exhausted: HOST_NUMBERS_EXHAUSTED.
        """
        return Numbers(
            _extend(self.ports, port_ids, FIRST_PORT_NUMBER, LAST_PORT_NUMBER),
            _extend(self.zones, network_ids, FIRST_ZONE, LAST_ZONE),
        )


def _extend(old: dict[str, int], ids: Iterable[str], first: int, last: int) -> dict[str, int]:
    used = set(old.values())
    free = (number for number in range(first, last + 1) if number not in used)
    given: dict[str, int] = {}
    for id_ in ids:
        number = old.get(id_) or next(free, None)
        if number is None:
            raise Exhausted("HOST_NUMBERS_EXHAUSTED", f"the host has no number left for {id_}")
        given[id_] = number
    return given


class State:
    """The files of a directory; written so that a crash leaves the old or the new one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load_document(self) -> pb.HostDataplane | None:
        """Return the last document, or None if there never was one.

        Raises:
            DataLoss: DATAPLANE_STATE_DAMAGED.
        """
        try:
            return pb.HostDataplane.FromString((self._directory / "document").read_bytes())
        except FileNotFoundError:
            return None
        except DecodeError as error:
            raise DataLoss(
                "DATAPLANE_STATE_DAMAGED",
                f"{self._directory}/document is damaged; remove it and the control plane sends it",
            ) from error

    def save_document(self, document: pb.HostDataplane) -> None:
        """Remember a document."""
        write_file(self._directory / "document", document.SerializeToString(deterministic=True))

    def load_numbers(self) -> Numbers:
        """Return the numbers in use."""
        record = self._load("numbers.json")
        return Numbers(record.get("ports", {}), record.get("zones", {}))

    def save_numbers(self, numbers: Numbers) -> None:
        """Remember the numbers in use."""
        self._save("numbers.json", {"ports": numbers.ports, "zones": numbers.zones})

    def load_digests(self, name: str) -> tuple[str, str]:
        """Return fingerprints of a ruleset as it was built and as the kernel then listed it."""
        record = self._load("rulesets.json").get(name, ["", ""])
        return record[0], record[1]

    def save_digests(self, name: str, built: str, listed: str) -> None:
        """Remember the fingerprints of a ruleset; empty ones forget it."""
        record = self._load("rulesets.json")
        if built:
            record[name] = [built, listed]
        else:
            record.pop(name, None)
        self._save("rulesets.json", record)

    def _load(self, name: str) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads((self._directory / name).read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise DataLoss(
                "DATAPLANE_STATE_DAMAGED", f"{self._directory}/{name} is damaged; remove it"
            ) from error
        return record

    def _save(self, name: str, record: dict[str, Any]) -> None:
        write_file(self._directory / name, json.dumps(record, sort_keys=True, indent=1).encode())


def write_file(path: Path, content: bytes, mode: int = 0o600) -> bool:
    """Bring a file to this content; return False if it had it."""
    try:
        if path.read_bytes() == content:
            return False
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    new.replace(path)
    return True
