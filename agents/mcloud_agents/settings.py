"""agent.toml: what an operator tells the agent of one host."""

from __future__ import annotations

import ipaddress
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from mcloud_base import errors

DEFAULT_PATH = Path("/etc/mcloud/agent.toml")


def _ip(value: str) -> str:
    return str(ipaddress.ip_address(value))


Ip = Annotated[str, AfterValidator(_ip)]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(min_length=1, max_length=255)]


class Settings(BaseSettings):
    """Times in seconds, sizes in MiB or GiB as their names say."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    # Who and where the host is.
    # Addresses are host:port, or those of several copies, with commas.
    control_plane: str = ""  # of the public port; what `enrol` was told, if empty
    internal_endpoint: str = ""  # of the internal port; what enrolment answered, if empty
    internal_endpoints: dict[str, str] = {}  # of services that are elsewhere
    name: Name = Field(default_factory=socket.gethostname)  # as the control plane lists the host
    underlay_ip: Ip  # at which other hosts reach this one: overlay, volumes, migration
    underlay_device: str = ""  # the interface that has it; empty lets routing choose
    physical_networks: dict[str, str] = {"external": "br-ex"}  # bridges to the outside world

    # Where things are kept.
    state_dir: Path = Path("/var/lib/mcloud")  # what outlives a boot
    run_dir: Path = Path("/run/mcloud")  # what does not; a short path, it holds sockets
    pki_dir: Path = Path("/etc/pki/qemu")  # QEMU's TLS files, written by this agent
    pki_group: str = ""  # that of QEMU's processes, if they are not root's; may read them

    # The hypervisor.
    libvirt_uri: str = "qemu:///system"  # of this host's libvirtd
    # "auto": KVM where the CPU has it and it opens, else QEMU's emulation.
    hypervisor: Literal["auto", "qemu", "kvm"] = "auto"
    image_cache_gib: Annotated[int, Field(ge=1)] = 20  # the least recently used images go first
    reserved_memory_mib: Annotated[int, Field(ge=0)] = 512  # for the host itself, never offered
    reserved_vcpu_count: Annotated[int, Field(ge=0)] = 0  # the same of CPUs
    reserved_disk_gib: Annotated[int, Field(ge=0)] = 2  # the same of disk

    # Block storage.
    storage_enabled: bool = True  # stores volumes for other hosts and itself
    nbd_port_first: Port = 10809  # each volume in use is served at a port of its own
    nbd_port_last: Port = 11832  # the last of them

    report_interval_s: Annotated[float, Field(gt=0)] = 10.0  # to the scheduler
    log_format: Literal["console", "json"] = "console"  # for people, or a line of JSON an event
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # this and what is worse

    @model_validator(mode="after")
    def _ports_in_order(self) -> Settings:
        if self.nbd_port_first > self.nbd_port_last:
            raise ValueError("nbd_port_first is higher than nbd_port_last")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take nothing from the environment: one file says it all."""
        return (init_settings,)


def load(path: Path) -> Settings:
    """Read a settings file.

    Raises:
        InvalidArgument: BAD_SETTINGS: each setting that is unknown, missing or wrong, by name.
    """
    try:
        return Settings(**tomllib.loads(path.read_text()))
    except FileNotFoundError as error:
        raise _bad(path, ["there is no such file; it needs at least underlay_ip"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _bad(path, [str(error)]) from error
    except ValidationError as error:
        raise _bad(
            path, [_fault(fault["type"], fault["loc"], fault["msg"]) for fault in error.errors()]
        ) from error


def _fault(kind: str, place: tuple[int | str, ...], message: str) -> str:
    name = ".".join(map(str, place))
    match kind:
        case "extra_forbidden":
            return f"unknown setting {name}"
        case "missing":
            return f"{name} is missing"
        case _:
            return f"{name}: {message}" if name else message


def _bad(path: Path, faults: list[str]) -> errors.InvalidArgument:
    return errors.InvalidArgument("BAD_SETTINGS", f"{path}: {'; '.join(faults)}", path=path)
