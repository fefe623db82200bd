"""Where services are: one HOST:PORT, or several that answer alike, as one setting."""

from __future__ import annotations

import ipaddress

from mcloud_base import errors

# Stands in the certificate of every service, whatever its address, and of no host, so that no host
# can pass for a service.
SERVICE_NAME = "mcloud-internal"


def split(endpoints: str) -> list[str]:
    """Return each HOST:PORT of "10.0.0.1:7700,10.0.0.2:7700"; a Unix socket, "unix:PATH", as it is.

    Raises:
        errors.InvalidArgument: BAD_ENDPOINT.
    """
    if endpoints.startswith("unix:"):
        return [endpoints]
    found = [each.strip() for each in endpoints.split(",")]
    for each in found:
        _, port = divide(each)
        if len(found) > 1 and _version(each) != _version(found[0]):
            raise _bad(endpoints, "a list's addresses are all IPv4 or all IPv6")
        if len(found) > 1 and not _version(each):
            raise _bad(
                endpoints,
                f"{each} in a list is not an IP address and port; of names, use one that "
                "resolves to all of the addresses",
            )
        if not 0 < port < 65536:
            raise _bad(endpoints, f"{each} is not HOST:PORT")
    return found


def divide(endpoint: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of one HOST:PORT.

    Raises:
        errors.InvalidArgument: BAD_ENDPOINT.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()):
        raise _bad(endpoint, f"{endpoint!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def target(endpoints: str) -> str:
    """Return what gRPC calls a target; calls are spread over all of its addresses.

    Source: https://grpc.github.io/grpc/core/md_doc_naming.html.

    Raises:
        errors.InvalidArgument: BAD_ENDPOINT.
    """
    found = split(endpoints)
    if len(found) == 1:
        return found[0]
    return f"ipv{_version(found[0])}:{','.join(found)}"


def _version(endpoint: str) -> int:
    """Return 4 or 6; 0 for a name."""
    try:
        return ipaddress.ip_address(divide(endpoint)[0]).version
    except ValueError:
        return 0


def _bad(endpoints: str, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("BAD_ENDPOINT", why, endpoint=endpoints)
