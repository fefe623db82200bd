"""What a host remembers of each volume it stores: a small file beside the data."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mcloud_agents.volume.data import PARTIAL
from mcloud_base import errors, ids, tls


@dataclass(frozen=True)
class Client:
    """A host that a volume is served to."""

    attachment_id: str
    host_id: str
    subject: str  # of its certificate, as GnuTLS prints it: "CN=h-…"


@dataclass(frozen=True)
class Record:
    """One volume. Written before what it says is done, so that a restart carries on."""

    volume_id: str
    epoch: str = ""
    generation: int = 0
    size_bytes: int = 0
    # The data file was there once. If it is missing now, data is lost: it is never made anew.
    created: bool = False
    port: int = 0  # 0: none allocated yet; kept for life, since guests reconnect to it
    # Not to be guessed by whoever reaches the port, and the same for life.
    export_name: str = field(default_factory=lambda: secrets.token_hex(16))
    clients: tuple[Client, ...] = ()

    @property
    def subjects(self) -> tuple[str, ...]:
        """The certificate subjects that may connect, sorted."""
        return tuple(sorted({client.subject for client in self.clients}))


class Records:
    """The records of a directory, and the paths of the files beside them.

    Args:
        directory: holds ID.json and ID.qcow2; made if missing. What a killed agent has left
            unfinished in it is removed: one agent at a time works here.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in directory.glob(f"*{PARTIAL}"):
            left.unlink(missing_ok=True)
        self._records = {record.volume_id: record for record in map(_read, self._files("json"))}

    def all(self) -> list[Record]:
        """Return every record, by id."""
        return [self._records[volume_id] for volume_id in sorted(self._records)]

    def find(self, volume_id: str) -> Record | None:
        """Return a volume's record, or None."""
        return self._records.get(volume_id)

    def save(self, record: Record) -> Record:
        """Write a record, durably, and return it."""
        if self._records.get(record.volume_id) != record:
            content = json.dumps(asdict(record), indent=1).encode()
            tls.write_private(self._path(record.volume_id, "json"), content)
            self._records[record.volume_id] = record
        return record

    def forget(self, volume_id: str) -> None:
        """Remove a volume's data, then its record."""
        self.data(volume_id).unlink(missing_ok=True)
        self._path(volume_id, "json").unlink(missing_ok=True)
        self._records.pop(volume_id, None)

    def data(self, volume_id: str) -> Path:
        """Return the path of a volume's data.

        Raises:
            InvalidArgument: BAD_VOLUME_ID: it could name a file elsewhere.
        """
        return self._path(volume_id, "qcow2")

    def data_files(self) -> list[Path]:
        """Return every data file, recorded or not."""
        return self._files("qcow2")

    def _files(self, suffix: str) -> list[Path]:
        return [p for p in sorted(self._directory.glob(f"*.{suffix}")) if ids.is_id(p.stem, "vol")]

    def _path(self, volume_id: str, suffix: str) -> Path:
        if not ids.is_id(volume_id, "vol"):
            raise errors.InvalidArgument(
                "BAD_VOLUME_ID", f"{volume_id!r} is not a volume's id", volume=volume_id
            )
        return self._directory / f"{volume_id}.{suffix}"


def _read(path: Path) -> Record:
    try:
        values = json.loads(path.read_bytes())
        clients = tuple(Client(**client) for client in values.pop("clients"))
        return replace(Record(**values), clients=clients)
    except (ValueError, TypeError, KeyError) as error:
        raise errors.DataLoss(
            "VOLUME_RECORD_DAMAGED", f"{path} cannot be read: {error}", path=path
        ) from error
