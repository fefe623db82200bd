"""The daemon's settings: one TOML file, every key with a default. Times in seconds."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mcloud_base import endpoints, errors

SERVICES = ("identity", "compute", "scheduler", "conductor", "image", "network", "volume")


def _endpoints(value: str) -> str:
    try:
        endpoints.split(value or "127.0.0.1:1")
    except errors.InvalidArgument as error:
        raise ValueError(error.message) from error
    return value


def _database(value: str) -> str:
    if value != "sqlite" and not value.startswith("postgresql://"):
        raise ValueError('"sqlite", or "postgresql://user@host:port/mcloud_{name}"')
    return value


Endpoints = Annotated[str, AfterValidator(_endpoints)]


class Settings(BaseModel):
    """controlplane.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state_dir: Path = Path("/var/lib/mcloud/controlplane")  # authority, SQLite files, image store
    # What this process runs.
    services: tuple[Literal[SERVICES], ...] = SERVICES  # type: ignore[valid-type]
    # Processes that do so on the same ports, each on a core of its own; with two or more, one that
    # dies is there again in a fraction of a second.
    workers: int = Field(1, ge=1, le=64)
    public_listen: str = "127.0.0.1:7700"  # server TLS, bearer tokens
    internal_listen: str = "127.0.0.1:7701"  # client certificates: hosts and services
    # Under which names and addresses clients and hosts reach this process; in its certificate.
    names: tuple[str, ...] = ("127.0.0.1",)
    # What enrolled hosts are told to connect to; empty: internal_listen. Here and below, several
    # addresses of copies that answer alike are given with commas, and calls are spread over them.
    internal_advertise: Endpoints = ""
    # Where services that run elsewhere are, as host:port by service; others are here.
    internal_endpoints: dict[str, Endpoints] = Field(default_factory=dict)
    public_endpoints: dict[str, Endpoints] = Field(default_factory=dict)  # the same, for clients
    # "sqlite" keeps files in state_dir; otherwise "postgresql://user@host:port/mcloud_{name}".
    database: Annotated[str, AfterValidator(_database)] = "sqlite"
    image_store: Path | None = None  # where images are kept; if not set, images in state_dir
    token_ttl_s: int = Field(3600, ge=60, le=3600)  # for how long a login is good
    # After which an operation has ended, in an error if need be; most end earlier.
    operation_deadline_s: int = Field(600, ge=10)
    # For how long an operation is left to a process that has fallen silent.
    operation_lease_s: float = Field(15, ge=1)
    # For so long a finding of `mcloud admin verify` must stand; what is in flight is right by then.
    verify_confirm_s: float = Field(2, ge=0)
    verify_host_wait_s: float = Field(15, gt=0)  # until a host has said what is on it
    sweep_interval_s: float = Field(60, gt=0)  # between two searches for what is provably garbage
    sweep_after_s: float = Field(900, ge=0)  # how old it must be
    prune_interval_s: float = Field(60, gt=0)  # between two batches of what is kept long enough
    keep_changes_s: float = Field(86_400, ge=0)  # of the change log, for watches that resume
    keep_revisions: int = Field(10_000, ge=1)  # of it at least so many, however old they are
    keep_requests_s: float = Field(86_400, ge=3600)  # within which a repeat finds its first time
    keep_operations_s: float = Field(30 * 86_400, ge=0)  # that have ended, with their steps
    keep_deleted_s: float = Field(30 * 86_400, ge=0)  # rows of what has been deleted
    cpu_allocation_ratio: float = Field(4.0, gt=0)  # virtual CPUs given out for each of a host's
    memory_allocation_ratio: float = Field(1.0, gt=0)  # the same of memory
    disk_allocation_ratio: float = Field(1.0, gt=0)  # the same of disk
    # Calls of projects that a process works on at once; others wait a little, by turns of projects.
    requests_at_once: int = Field(64, ge=4)
    # Streams that clients may hold open to a process: watches, waits, uploads, downloads.
    streams_at_once: int = Field(2000, ge=10)
    streams_per_caller: int = Field(100, ge=1)  # of them one user's or application credential's
    default_deadline_s: float = Field(60, gt=0)  # of calls that come without one
    slow_reader_s: float = Field(30, gt=0)  # after which a stream that is not read is ended
    underlay_mtu: int = Field(1500, ge=1330, le=65535)  # between hosts; guests get 50 bytes less
    otlp_endpoint: str = ""  # spans of operations go to this host:port; empty: nowhere
    log_format: Literal["console", "json"] = "console"  # for people, or a line of JSON an event

    def database_url(self, name: str) -> str:
        """Return the URL of a service's database."""
        if self.database == "sqlite":
            return f"sqlite://{(self.state_dir / name).absolute()}.db"
        return self.database.replace("{name}", name)

    def internal_endpoint(self, service: str) -> str:
        """Return where a service's internal port is."""
        return self.internal_endpoints.get(service, self.internal_listen)


def load(path: Path | None) -> Settings:
    """Read a settings file; the defaults where there is none.

    Raises:
        errors.InvalidArgument: BAD_SETTINGS, naming the key.
    """
    if path is None:
        return Settings.model_validate({})
    try:
        return Settings.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise errors.InvalidArgument("BAD_SETTINGS", f"{path}: {error}") from error
    except ValidationError as error:
        raise _bad_settings(str(path), error) from error


def changed(settings: Settings, changes: Mapping[str, object]) -> Settings:
    """Return the settings with some keys changed, as the command line does.

    Raises:
        errors.InvalidArgument: BAD_SETTINGS, naming the key.
    """
    try:
        return Settings.model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        raise _bad_settings("the command line", error) from error


def _bad_settings(where: str, error: ValidationError) -> errors.InvalidArgument:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    what = "unknown setting" if first["type"] == "extra_forbidden" else first["msg"]
    return errors.InvalidArgument("BAD_SETTINGS", f"{where}: {key}: {what}")
