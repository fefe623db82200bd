"""Ids: a registered prefix, "-", and 20 base32 characters that sort by the time of making."""

from __future__ import annotations

import re
import secrets
import threading
import time
import uuid

# Crockford's alphabet in lower case: no i, l, o, u. Source: https://www.crockford.com/base32.html
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]  # of ten bits

# Every prefix in use. An operation's prefix names the domain that has it.
PREFIXES = {
    "u": "user",
    "p": "project",
    "ra": "role assignment",
    "cred": "application credential",
    "jt": "join token",
    "crt": "certificate",
    "iop": "identity operation",
    "flv": "flavor",
    "key": "key pair",
    "grp": "server group",
    "i": "instance",
    "d": "domain",
    "h": "host",
    "cop": "compute operation",
    "img": "image",
    "mop": "image operation",
    "net": "network",
    "sub": "subnet",
    "port": "port",
    "sg": "security group",
    "sgr": "security group rule",
    "rtr": "router",
    "fip": "floating address",
    "nop": "network operation",
    "vol": "volume",
    "att": "attachment",
    "vop": "volume operation",
}

_PATTERN = re.compile(rf"([a-z]{{1,4}})-[{_ALPHABET}]{{20}}")


_lock = threading.Lock()
_last = 0


def new(prefix: str) -> str:
    """Make an id: 48 bits of milliseconds since 1970, then 52 random bits.

    Of two ids made in one process the later is the greater, within a millisecond too, so that what
    one transaction makes is listed in its order. (RFC 9562, 6.2: monotonic random.)
    """
    global _last
    assert prefix in PREFIXES, prefix
    number = (time.time_ns() // 1_000_000) << 52 | secrets.randbits(52)
    with _lock:
        if number <= _last:
            number = _last + 1 + secrets.randbits(32)
        _last = number
    return prefix + "-" + "".join([_PAIRS[number >> shift & 1023] for shift in range(90, -1, -10)])


def is_id(text: str, prefix: str) -> bool:
    """Tell whether `text` is a well-formed id with this prefix."""
    match = _PATTERN.fullmatch(text)
    return match is not None and match[1] == prefix


def prefix_of(text: str) -> str:
    """Return the prefix of a well-formed id, or the empty string."""
    match = _PATTERN.fullmatch(text)
    return match[1] if match and match[1] in PREFIXES else ""


def time_of(id_: str) -> int:
    """Return when a well-formed id was made: µs since 1970, exact to a millisecond."""
    number = 0
    for sign in id_.partition("-")[2]:
        number = number << 5 | _ALPHABET.index(sign)
    return (number >> 52) * 1000


def request_id() -> str:
    """Make a request id (AIP-155): a UUID that a retry of the same call repeats."""
    return str(uuid.uuid4())


def libvirt_uuid(instance_id: str) -> str:
    """Return the libvirt UUID of an instance: the same in each of its incarnations."""
    return str(uuid.uuid5(uuid.UUID("7d1f6d7a-6a5c-4f4e-9d1c-6d636c6f7564"), instance_id))
