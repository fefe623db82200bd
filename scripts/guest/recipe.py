"""When an image has to be made again: its recipe is kept beside it, and compared.

A recipe is everything that an image is made from: files, options and versions of Debian
packages. apt takes a second to say those versions, so the state of its lists is kept as well:
while they have not been refreshed it is not asked.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from command import BuildError, run

APT_LISTS = Path("/var/lib/apt/lists")


class Recipe:
    """What `out` is to be made from, against what it was made from."""

    def __init__(self, out: Path, files: Iterable[Path], options: Sequence[str | None]) -> None:
        self._out = out
        self._stamp = out.with_name(out.name + ".stamp")
        # Hashed, since an option may be a password.
        self._inputs = {"files": _digest(files), "options": _hash(map(repr, options))}
        self._apt = _apt_state()
        self.versions: dict[str, str] = {}

    def is_current(self, packages: Sequence[str]) -> bool:
        """Whether `out` was made from these inputs and the current versions of the packages.

        If it was not, `versions` tells those versions.
        """
        made_from = self._read() if self._out.exists() else {}
        same_inputs = made_from.get("inputs") == self._inputs
        if same_inputs and made_from.get("apt") == self._apt:
            return True
        self.versions = candidate_versions(packages)
        if same_inputs and made_from.get("versions") == self.versions:
            self.write()
            return True
        return False

    def write(self) -> None:
        """Record that `out` has been made from this recipe."""
        recipe = {"inputs": self._inputs, "apt": self._apt, "versions": self.versions}
        new = self._stamp.with_name(self._stamp.name + ".new")
        new.write_text(json.dumps(recipe, indent=1) + "\n")
        new.replace(self._stamp)

    def _read(self) -> dict[str, object]:
        try:
            content = json.loads(self._stamp.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def candidate_versions(packages: Sequence[str]) -> dict[str, str]:
    """Ask apt which versions it would install, by package; a metapackage stands for its kernel.

    Raises:
        BuildError: apt knows no such package.
    """
    fields = [_split(paragraph) for paragraph in _show(packages)]
    versions = {field["Package"]: field["Version"] for field in fields}
    for field in fields:
        if field["Package"].startswith("linux-image-"):
            # "linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1)"
            kernel, version = field["Depends"].split(",")[0].split(" (= ")
            del versions[field["Package"]]
            versions[kernel] = version.rstrip(")")
    return versions


def download(versions: dict[str, str], cache: Path) -> list[Path]:
    """Put the packages into `cache`, unless they are there; apt verifies what it fetches."""
    # "%3a" is how apt writes the colon of an epoch in a file's name.
    missing = {
        name: version
        for name, version in versions.items()
        if not list(cache.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))
    }
    if missing:
        # Root's apt would drop to a user who may not write here, and complain.
        sandbox = ("-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ()
        wanted = (f"{name}={version}" for name, version in missing.items())
        run("apt-get", "download", "-q", *sandbox, *wanted, cwd=cache)
    return [
        next(cache.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))
        for name, version in versions.items()
    ]


def _show(packages: Sequence[str]) -> list[str]:
    try:
        shown = run("apt-cache", "show", "--no-all-versions", *packages)
    except BuildError as error:
        raise BuildError(f"{error} Is this Debian 12, and did `apt-get update` run?") from error
    return shown.strip().split("\n\n")


def _split(paragraph: str) -> dict[str, str]:
    """Read the one-line fields of a package's description."""
    lines = (line.partition(": ") for line in paragraph.splitlines() if not line.startswith(" "))
    return {name: value for name, _, value in lines}


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        executable = os.access(file, os.X_OK)
        content = file.read_bytes()
        digest.update(f"{file.name} {executable} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _apt_state() -> str:
    lists = sorted(APT_LISTS.glob("*_Packages*"))
    return _hash(f"{file.name} {file.stat().st_mtime_ns}" for file in lists)


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
