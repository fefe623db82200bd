"""Who is calling: from the peer's certificate, the bearer token, or both."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from mcloud.common.v1 import operation_pb2, options_pb2
from mcloud_base import errors, rpc, tls

Rule = options_pb2.Rule

# The stubs make it generic, the runtime does not.
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext


@dataclass(frozen=True)
class Certificate:
    """The certificate of a peer on the internal port."""

    serial: str  # hexadecimal
    fingerprint: str  # SHA-256 of the DER, hexadecimal
    subject: str  # "CN=h-…"
    host_id: str = ""  # of a host's
    service: str = ""  # of a service's


@dataclass(frozen=True)
class Delegation:
    """What a host's delegated token names: it may ask for these and for nothing else."""

    host_id: str
    domain_id: str
    generation: int
    image_ids: frozenset[str]
    port_ids: frozenset[str]
    attachment_ids: frozenset[str]


@dataclass(frozen=True)
class Caller:
    """Whoever makes the call that is being served.

    `project_id` is the token's; for a delegate its domain's. `role` is the highest held there, or
    on the system if `system`. `login` is when identity worked on the token: (start, end) in µs.
    """

    kind: Rule.Caller.ValueType
    principal_id: str = ""
    user_id: str = ""
    user_name: str = ""
    project_id: str = ""
    role: Rule.Role.ValueType = Rule.ROLE_UNSPECIFIED
    system: bool = False
    certificate: Certificate | None = None
    delegation: Delegation | None = None
    login: tuple[int, int] = (0, 0)
    login_host: str = ""

    @property
    def host_id(self) -> str:
        """The calling host's id; empty for others."""
        return self.certificate.host_id if self.certificate else ""

    def is_admin(self) -> bool:
        """Tell whether it is an administrator of the system."""
        return self.system and self.role >= Rule.ROLE_ADMIN

    def require_system(self, role: Rule.Role.ValueType, what: str) -> None:
        """Refuse unless the role is held on the system.

        Raises:
            errors.PermissionDenied: ROLE_REQUIRED.
        """
        if not (self.system and self.role >= role):
            raise errors.PermissionDenied(
                "ROLE_REQUIRED",
                f"{what} needs the role {Rule.Role.Name(role).removeprefix('ROLE_').lower()} "
                "on the system; log in with --system",
            )

    def sees(self, project_id: str) -> bool:
        """Tell whether resources of a project may be shown."""
        return self.system or project_id == self.project_id


@dataclass
class Call:
    """The rpc that is being served. Times are µs since 1970."""

    method: str  # "mcloud.compute.v1.InstanceService/CreateInstance"
    request_id: str  # of the transport, for logs
    receive_time: int
    authorize_start_time: int = 0
    authorize_end_time: int = 0
    trace_id: str = ""  # of the caller; empty: it has none
    trailing: list[tuple[str, str | bytes]] = field(default_factory=list)

    def hand_over(self, step: operation_pb2.OperationStep) -> None:
        """Give the calling host a row of the trace, which it reports with its own."""
        self.trailing.append((rpc.STEP_KEY, step.SerializeToString()))


_caller: ContextVar[Caller] = ContextVar("caller")
_call: ContextVar[Call] = ContextVar("call")


def caller() -> Caller:
    """Return who makes the call that is being served."""
    return _caller.get()


def call() -> Call:
    """Return the call that is being served."""
    return _call.get()


def set_current(who: Caller, what: Call) -> None:
    """Enter a call; the interceptor does it, in the call's own context."""
    _caller.set(who)
    _call.set(what)


def read_certificate(pem: bytes) -> Certificate:
    """Return what a peer's certificate says. TLS has checked that our authority signed it.

    Raises:
        errors.Unauthenticated: BAD_CERTIFICATE, it names neither a host nor a service.
    """
    loaded = x509.load_pem_x509_certificate(pem)
    names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    host = next((u.removeprefix(tls.HOST_URI) for u in uris if u.startswith(tls.HOST_URI)), "")
    service = next(
        (u.removeprefix(tls.SERVICE_URI) for u in uris if u.startswith(tls.SERVICE_URI)), ""
    )
    if not host and not service:
        raise errors.Unauthenticated("BAD_CERTIFICATE", "the certificate names no host or service")
    common_name = str(loaded.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    return Certificate(
        serial=f"{loaded.serial_number:x}",
        fingerprint=tls.fingerprint(pem),
        subject=f"CN={common_name}",
        host_id=host,
        service=service,
    )
