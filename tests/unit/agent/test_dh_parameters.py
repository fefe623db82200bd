from __future__ import annotations

import base64
from decimal import Decimal, localcontext

from mcloud_agents import dh_parameters


def test_they_are_those_of_the_rfc() -> None:
    """RFC 7919, appendix A.1: p = 2^2048 - 2^1984 + {[2^1918 * e] + 560316} * 2^64 - 1."""
    with localcontext() as context:
        context.prec = 800
        inner = int(Decimal(2) ** 1918 * Decimal(1).exp()) + 560316
    prime = 2**2048 - 2**1984 + inner * 2**64 - 1
    head, *lines, tail = dh_parameters.FFDHE2048.decode().splitlines()

    assert (head, tail) == ("-----BEGIN DH PARAMETERS-----", "-----END DH PARAMETERS-----")
    # PKCS #3: a sequence of two integers, prime and generator.
    content = _inside(base64.b64decode("".join(lines)), 0x30)[0]
    first, rest = _inside(content, 0x02)
    second, rest = _inside(rest, 0x02)
    assert (int.from_bytes(first), int.from_bytes(second), rest) == (prime, 2, b"")


def _inside(der: bytes, tag: int) -> tuple[bytes, bytes]:
    """Return what is in the first element, and what follows it."""
    assert der[0] == tag
    length, start = der[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[2:start])
    return der[start : start + length], der[start + length :]
