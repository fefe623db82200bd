"""What is kept between commands: clouds in config.yaml, tokens apart; both for the owner only.

~/.config/mcloud/config.yaml    current: NAME; clouds: {NAME: {endpoint, ca, username, project}}
~/.config/mcloud/ca/NAME.pem    the authority, copied at login
~/.config/mcloud/tokens.json    tokens by (endpoint, who, where)
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

EXPIRY_MARGIN_S = 30  # a token that ends sooner is as good as ended


@dataclass(frozen=True)
class Profile:
    """One cloud."""

    endpoint: str = ""
    ca: str = ""  # file
    username: str = ""
    project: str = ""


def directory() -> Path:
    """Return where everything is kept."""
    if own := os.environ.get("MCLOUD_CONFIG_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "mcloud"


def write(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    partial.replace(path)


def find(cloud: str) -> tuple[str, Profile]:
    """Return a cloud's name and profile; of the current one if none is named.

    Raises:
        click.UsageError: there is no such cloud; an empty name never fails.
    """
    config = _read()
    clouds = config.get("clouds", {})
    name = cloud or config.get("current", "")
    if cloud and cloud not in clouds:
        known = ", ".join(clouds) or "none"
        raise click.UsageError(f"there is no cloud {cloud}; logged in to: {known}")
    known_keys = Profile.__dataclass_fields__
    values = {key: str(value) for key, value in clouds.get(name, {}).items() if key in known_keys}
    return name, Profile(**values)


def save(cloud: str, profile: Profile) -> None:
    """Keep a cloud and make it the current one."""
    import yaml

    with _locked():
        config = _read()
        config["current"] = cloud
        config.setdefault("clouds", {})[cloud] = {k: v for k, v in asdict(profile).items() if v}
        write(directory() / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())


def _read() -> dict[str, Any]:
    """Return the configuration; as it was read last time, if the file has not changed.

    Importing and running the YAML reader takes as long as a whole call to the cloud.
    """
    path = directory() / "config.yaml"
    try:
        found = path.stat()
    except FileNotFoundError:
        return {}
    stamp = [found.st_mtime_ns, found.st_size, found.st_ino]
    copy = _read_json(directory() / ".config.json")
    if copy.get("stamp") == stamp and isinstance(copy.get("config"), dict):
        return dict(copy["config"])
    config = _parse(path)
    copy = {"stamp": stamp, "config": config}
    write(directory() / ".config.json", json.dumps(copy, default=str).encode())
    return config


def _parse(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_bytes()) or {}
    except yaml.YAMLError as error:
        raise click.UsageError(f"{path}: {error}") from error
    clouds = config.get("clouds") or {} if isinstance(config, dict) else None
    if not isinstance(clouds, dict) or not all(isinstance(one, dict) for one in clouds.values()):
        raise click.UsageError(f"{path}: must be like clouds: {{NAME: {{endpoint: HOST:PORT}}}}")
    return {**config, "current": str(config.get("current") or ""), "clouds": clouds}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Token:
    """A token and what is known of it."""

    token: str
    expire_time: float  # seconds since 1970
    user_name: str = ""
    project_name: str = ""
    project_id: str = ""
    system: bool = False

    def is_good(self) -> bool:
        """Tell whether it is still to be used."""
        return self.expire_time - EXPIRY_MARGIN_S > time.time()


def find_token(key: str) -> Token | None:
    """Return the kept token of a login, also if it has expired."""
    found = _tokens().get(key)
    return Token(**found) if found else None


def save_token(key: str, token: Token) -> None:
    """Keep a token; those that ended a day ago go."""
    with _locked():
        kept = {
            name: value
            for name, value in _tokens().items()
            if value["expire_time"] > time.time() - 86_400
        }
        write(_tokens_path(), json.dumps({**kept, key: asdict(token)}, indent=1).encode())


def forget_tokens(prefix: str) -> int:
    """Delete the tokens whose key begins so; return how many there were."""
    with _locked():
        tokens = _tokens()
        kept = {name: value for name, value in tokens.items() if not name.startswith(prefix)}
        write(_tokens_path(), json.dumps(kept, indent=1).encode())
        return len(tokens) - len(kept)


def _tokens_path() -> Path:
    return directory() / "tokens.json"


def _tokens() -> dict[str, Any]:
    return _read_json(_tokens_path())  # what is damaged, a login brings back


@contextmanager
def _locked() -> Iterator[None]:
    """Keep other commands from changing the files in between."""
    directory().mkdir(parents=True, exist_ok=True, mode=0o700)
    with (directory() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
