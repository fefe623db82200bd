"""Looks for secrets in everything that a cloud has written, and in what processes show."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Three parts with dots: the first two are JSON in base64.
_TOKEN = re.compile(rb"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{40,}")
_PRIVATE_KEY = re.compile(rb"-----BEGIN (?:\w+ )?PRIVATE KEY-----")
_CHUNK = 8 << 20
_OVERLAP = 4096  # longer than any secret
_IMAGES = (".qcow2", ".raw", ".img")  # the guests' own


@dataclass
class Secret:
    """Something that may be read in some files only.

    Args:
        allowed: patterns of paths (Path.match).
    """

    name: str
    value: bytes
    allowed: tuple[str, ...] = field(default=())


def found_in_files(top: Path, secrets: list[Secret]) -> list[str]:
    """Return where a secret, a token or a key is that is not to be there, or is open to others."""
    said = []
    for path in _files(top):
        mode = stat.S_IMODE(path.stat().st_mode)
        for part in _parts(path):
            for secret in secrets:
                if secret.value in part:
                    if not any(path.match(each) for each in secret.allowed):
                        said.append(f"{secret.name} in {path.relative_to(top)}")
                    if mode & 0o077:
                        said.append(f"{path.relative_to(top)} has a secret and mode {mode:o}")
            if _TOKEN.search(part):
                said.append(f"a token in {path.relative_to(top)}")
            if _PRIVATE_KEY.search(part) and mode & 0o037:
                said.append(f"{path.relative_to(top)} has a private key and mode {mode:o}")
    return sorted(set(said))


def shown_by_processes(secrets: list[Secret]) -> list[str]:
    """Return which process shows a secret or a token in its command line, to whoever looks."""
    said = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        shown = [secret.name for secret in secrets if secret.value in line]
        said += [f"{name} in the command line of {process.name}" for name in shown]
        if _TOKEN.search(line):
            said.append(f"a token in the command line of {process.name}")
    return said


def _files(top: Path) -> Iterator[Path]:
    for path in sorted(top.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix not in _IMAGES:
            yield path


def _parts(path: Path) -> Iterator[bytes]:
    """Yield a file in parts that overlap."""
    with path.open("rb") as file:
        before = b""
        while part := file.read(_CHUNK):
            yield before + part
            before = part[-_OVERLAP:]


def assert_no_cores(pid: int) -> None:
    """No core of a process, nor of what it starts, may hold its memory."""
    limits = Path(f"/proc/{pid}/limits").read_text()
    found = re.search(r"Max core file size +(\w+) +(\w+)", limits)
    assert found, limits
    assert found.groups() == ("0", "0"), Path(f"/proc/{pid}/cmdline").read_bytes()
    assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0
