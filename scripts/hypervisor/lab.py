"""A lab: a switch and hosts joined to it, and what the machine needs for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hypervisor import kernel, machine
from hypervisor.host import Host
from hypervisor.kernel import LabError, Process
from hypervisor.machine import Journal, Settings

PROGRAMS = {
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "tini": "tini",
    "libvirtd": "libvirt-daemon-system",
    "virsh": "libvirt-clients",
    "qemu-system-x86_64": "qemu-system-x86",
}
SWITCH = "switch"
LONGEST_SOCKET_PATH = 107  # unix(7), less the final zero


@dataclass(frozen=True)
class HostStatus:
    """What `lab status` says of a host."""

    host: Host
    init: Process | None  # None: the host is not running
    libvirtd: bool  # it has its socket open


def up(settings: Settings, hosts: int, say: Callable[[str], None]) -> list[str]:
    """Bring up hosts 1 to `hosts`; what is up already stays as it is.

    Returns:
        Warnings: what keeps packets from the hosts, though the lab itself is complete.

    Raises:
        LabError: nothing is lost; `up` again goes on, `down` takes back what there is.
    """
    _check(settings, hosts)
    with kernel.machine_lock():
        journal = _open(settings)
        switch = _ensure_init(settings, journal, SWITCH, lambda: None)
        _ensure_bridge(switch)
        machine.ensure_link(settings, journal, switch)
        machine.ensure_table(settings, journal)
        uplink = machine.ensure_forwarding(settings, journal)
        addresses = f"{settings.gateway}, {settings.external[1]}"
        say(f"{settings.link}: {addresses}, out through {uplink or 'nothing'}")
        numbers = {*range(1, hosts + 1), *_numbers(journal)}
        fleet = [Host(settings, number) for number in sorted(numbers)]
        names = {host.name: str(host.address) for host in fleet}
        started: dict[Host, Process | None] = {}
        for host in fleet:
            host.write_files(names)
            init = _ensure_init(settings, journal, host.name, host.furnish)
            host.connect(init, switch)
            started[host] = None if host.listens() else host.start_libvirtd(init)
        warnings = machine.find_obstacles(settings)
    for host, libvirtd in started.items():
        host.await_libvirtd(libvirtd)
        say(f"{host.name}: {host.address} {host.uri}")
    if uplink is None:
        warnings.append("the machine has no default route; hosts and guests reach only the machine")
    return warnings


def down(state: Path, keep_state: bool) -> bool:
    """End the hosts and give the machine back what `up` changed.

    Args:
        state: of the lab.
        keep_state: leave the hosts' files, for another `up`.

    Returns:
        False if there is nothing in `state`.
    """
    with kernel.machine_lock():
        settings = Settings.load(state)
        if settings is None:
            return False
        machine.undo(settings, Journal.load(state))
        if not keep_state:
            shutil.rmtree(state / "hosts", ignore_errors=True)
            for leftover in (*state.glob("*.new"), state / "undo.json", state / "lab.json"):
                leftover.unlink(missing_ok=True)
            if not any(state.iterdir()):
                state.rmdir()
    return True


def status(state: Path) -> list[HostStatus]:
    """Look at every host that has been brought up."""
    settings = _settings(state)
    journal = Journal.load(state)
    hosts = [Host(settings, number) for number in sorted(_numbers(journal))]
    return [
        HostStatus(host, init if init.alive() else None, host.listens())
        for host in hosts
        if (init := journal.inits[host.name])
    ]


def find_init(state: Path, name: str) -> Process:
    """Return the init of a host, or of the switch.

    Raises:
        LabError: there is no such host, or it is not running.
    """
    _settings(state)
    inits = Journal.load(state).inits
    if name not in inits or not inits[name].alive():
        running = ", ".join(n for n, init in inits.items() if init.alive()) or "none"
        raise LabError(f"{name} is not running (running: {running}); start hosts with: lab up")
    return inits[name]


def _settings(state: Path) -> Settings:
    settings = Settings.load(state)
    if settings is None:
        raise LabError(f"there is no lab in {state}; start one with: lab up --state {state}")
    return settings


def _check(settings: Settings, hosts: int) -> None:
    """Refuse what cannot work before anything is changed."""
    missing = sorted({package for name, package in PROGRAMS.items() if not shutil.which(name)})
    if missing:
        raise LabError(f"programs are missing; run: apt-get install {' '.join(missing)}")
    if not (settings.prefix.isascii() and settings.prefix.isalnum() and len(settings.prefix) <= 8):
        raise LabError(f"--prefix {settings.prefix}: it takes 1 to 8 letters and digits")
    most = settings.underlay.num_addresses - 12  # less .0, the machine, .2 to .10, and broadcast
    if not 1 <= hosts <= most:
        raise LabError(f"--hosts {hosts}: {settings.underlay} has room for 1 to {most}")
    if settings.external.num_addresses < 4:
        raise LabError(f"--external {settings.external} is too small; use a /30 or larger")
    if settings.underlay.overlaps(settings.external):
        raise LabError("--underlay and --external overlap; choose ranges apart")
    longest = str(Host(settings, hosts).socket) + "-ro"
    if len(longest.encode()) > LONGEST_SOCKET_PATH:
        raise LabError(f"{longest} is too long for a socket; choose a shorter --state")


def _open(settings: Settings) -> Journal:
    """Take the state directory, which is new, empty or this lab's already.

    Raises:
        LabError: it is something else's, or the lab would meet something else on the machine;
            nothing has been changed.
    """
    machine.refuse_conflicts(settings, Journal.load(settings.state))
    state = settings.state
    try:
        state.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError as error:
        raise LabError(f"there is no {state.parent}; make it, or choose another --state") from error
    saved = Settings.load(state)
    if saved is None and any(entry.suffix != ".new" for entry in state.iterdir()):
        raise LabError(f"{state} holds something else; choose another --state")
    journal = Journal.load(state)
    if saved != settings:
        if not journal.empty():
            raise LabError(f"this lab has other settings; to change them: lab down --state {state}")
        settings.save()
    return journal


def _ensure_init(
    settings: Settings, journal: Journal, name: str, furnish: Callable[[], None]
) -> Process:
    """Return the init of a host or the switch; start it unless it runs."""
    title = f"{settings.prefix}-{name}"
    if name in journal.inits:
        if journal.inits[name].runs(title):
            return journal.inits[name]
        journal.inits[name].kill()  # a killed `up` can leave one that is not complete

    def record(init: Process) -> None:
        journal.inits[name] = init
        journal.save()

    kernel.boot(title, furnish, record)
    if name == SWITCH and journal.link:  # it led to a former one, and may not be gone yet
        machine.remove_link(journal.link)
    return journal.inits[name]


def _ensure_bridge(switch: Process) -> None:
    if not machine.has_link("bridge", switch):
        kernel.ip("link add bridge type bridge", switch)
    kernel.ip(f"link set lo up\nlink set bridge mtu {machine.MTU} up", switch)


def _numbers(journal: Journal) -> Iterator[int]:
    return (int(name.removeprefix("h")) for name in journal.inits if name != SWITCH)
