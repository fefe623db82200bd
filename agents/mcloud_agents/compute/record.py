"""What the agent remembers of each domain: it survives the agent, and is enough to adopt guests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import structlog
from google.protobuf import json_format
from google.protobuf.message import Message

from mcloud.common.v1 import operation_pb2
from mcloud.conductor.v1 import domain_pb2
from mcloud.network.v1 import port_service_pb2
from mcloud_agents.compute import files

log = structlog.get_logger()

MessageT = TypeVar("MessageT", bound=Message)


@dataclass
class Record:
    """One domain: what is desired of it, how far that has been done, and with what."""

    domain_id: str
    instance_id: str = ""
    epoch: str = ""
    generation: int = 0  # of the newest desired state
    absent: bool = False  # it is desired to be gone
    reached: int = 0  # generation that has been done, in `epoch`
    attempt: int = 0  # at `generation`
    root_disk_made: bool = False  # if it is missing now, data have been lost
    config_digest: str = ""  # of the config drive's documents
    gone_time: float = 0.0  # when it was reported absent; seconds since 1970
    # The newest spec, without its token; the guest's documents are made from it.
    spec: domain_pb2.DomainSpec | None = None
    bindings: list[port_service_pb2.BindPortResponse] = field(default_factory=list)
    steps: list[operation_pb2.OperationStep] = field(default_factory=list)

    @property
    def gone(self) -> bool:
        """Whether the domain has been removed, as was desired."""
        return self.absent and self.reached == self.generation


class Records(Protocol):
    """Where a host's records are kept."""

    def load(self) -> Iterable[Record]:
        """Read every record."""

    async def save(self, record: Record) -> None:
        """Write a record; after a crash it is this one or the one before."""

    def remove(self, domain_id: str) -> None:
        """Forget a record."""

    def last_boot(self) -> str:
        """Return the machine's boot that was noted last, or the empty string."""

    def note_boot(self, boot_id: str) -> None:
        """Remember the machine's boot."""


class RecordStore:
    """A directory with a file for each record, 0600: they hold user data.

    Args:
        directory: of the records.
        boot_file: where the machine's boot is remembered.
    """

    def __init__(self, directory: Path, boot_file: Path) -> None:
        self._directory = directory
        self._boot_file = boot_file
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        files.make_private_directory(directory)

    def load(self) -> Iterator[Record]:
        """Read every record; one that cannot be read is left where it is, and told."""
        for path in sorted(self._directory.glob("*.json")):
            try:
                yield decode(path.read_bytes())
            except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
                log.error("record not readable", path=str(path), error=type(error).__name__)

    async def save(self, record: Record) -> None:
        """Write a record; after a crash it is this one or the one before.

        Steps that overlap may save the same record; what is on disk then is the newest of it.
        """
        async with self._locks.setdefault(record.domain_id, asyncio.Lock()):
            path = self._path(record.domain_id)
            await files.in_thread(files.write_atomically, path, encode(record))

    def remove(self, domain_id: str) -> None:
        """Forget a record."""
        self._path(domain_id).unlink(missing_ok=True)

    def last_boot(self) -> str:
        """See Records."""
        return self._boot_file.read_text() if self._boot_file.exists() else ""

    def note_boot(self, boot_id: str) -> None:
        """See Records."""
        files.write_atomically(self._boot_file, boot_id.encode())

    def _path(self, domain_id: str) -> Path:
        return self._directory / f"{domain_id}.json"


def encode(record: Record) -> bytes:
    """Return a record as JSON."""
    values = {
        **vars(record),
        "spec": _to_dict(record.spec) if record.spec else None,
        "bindings": [_to_dict(binding) for binding in record.bindings],
        "steps": [_to_dict(step) for step in record.steps],
    }
    return json.dumps(values).encode()  # an indent would have it done in Python: 5 times the time


def decode(text: bytes) -> Record:
    """Return the record that `encode` has written, also in another release.

    Raises:
        ValueError, KeyError, TypeError, json_format.ParseError: it is damaged.
    """
    saved = json.loads(text)
    spec, bindings, steps = saved.pop("spec"), saved.pop("bindings"), saved.pop("steps")
    return Record(
        **saved,
        spec=_from_dict(spec, domain_pb2.DomainSpec) if spec else None,
        bindings=[_from_dict(each, port_service_pb2.BindPortResponse) for each in bindings],
        steps=[_from_dict(each, operation_pb2.OperationStep) for each in steps],
    )


def _to_dict(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _from_dict(value: dict[str, Any], kind: type[MessageT]) -> MessageT:
    # An older or newer agent may have written it.
    return json_format.ParseDict(value, kind(), ignore_unknown_fields=True)
