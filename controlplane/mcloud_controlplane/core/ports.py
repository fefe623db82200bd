"""The two ports of a process: what a connection and a message may be, and the gate in front."""

from __future__ import annotations

import resource
from collections.abc import Mapping

import grpc
import structlog

from mcloud_base import rpc
from mcloud_controlplane.core import admission, gate
from mcloud_controlplane.settings import Settings

log = structlog.get_logger()

_OPEN_FILES = 8192  # for some thousand clients and hosts

# Pings end connections whose other side has gone without a word.
_OPTIONS = (
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.keepalive_time_ms", rpc.KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", rpc.KEEPALIVE_S * 500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", 20_000),
)
# Strangers send small messages (uploads come in chunks of 1 MiB), and one connection of theirs has
# no more calls open than a program needs. Now and then a connection is ended, and with it what is
# not read on it; clients reconnect by themselves.
_PUBLIC = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
)
_INTERNAL = (("grpc.max_receive_message_length", 8 << 20),)


def raise_open_files() -> None:
    """Use all the open files that this process may have: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if 0 <= most < _OPEN_FILES:
        log.warning("few open files are allowed: raise nofile", limit=most, wanted=_OPEN_FILES)


def places(settings: Settings) -> admission.Admission:
    """Return the places that a process has, for both its ports."""
    return admission.Admission(
        requests=settings.requests_at_once,
        streams=settings.streams_at_once,
        streams_per_caller=settings.streams_per_caller,
    )


def server(settings: Settings, guard: gate.Gate, *, internal: bool) -> grpc.aio.Server:
    """Return the server of one port, not started."""
    # Workers of one daemon share its ports; nobody else is to take a part of the connections.
    shared = ("grpc.so_reuseport", int(settings.workers > 1))
    own = _INTERNAL if internal else _PUBLIC
    found = grpc.aio.server(interceptors=[guard], options=(shared, *_OPTIONS, *own))
    # For each method that is registered gRPC has a task wait for a call of it, and at each call of
    # any it looks at all of these: of 180 methods, a fifth of a call. What generated code registers
    # it also offers as generic handlers, which serve alike.
    found.add_registered_method_handlers = _leave_unregistered  # type: ignore[attr-defined]
    return found


def _leave_unregistered(service: str, handlers: Mapping[str, object]) -> None:
    """Stand for grpc.aio.Server.add_registered_method_handlers."""
