"""A command's way to the cloud: where it is, who asks, and the calls.

Flags win over the environment, the environment over the profile. Calls are repeated while the
cloud is UNAVAILABLE, with the same request id, so that a repeat never does a thing twice.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mcloud_cli import profile

if TYPE_CHECKING:
    import grpc

    from mcloud_cli.contract import Method
    from mcloud_cli.kinds import Kind

_TIMEOUT_S = 30.0
_RETRY_S = 6.0  # how long an unreachable cloud is tried again
_PAGE_SIZE = 500


@dataclass(frozen=True)
class Options:
    """What the flags say; empty where they say nothing."""

    cloud: str = ""
    endpoint: str = ""
    ca: str = ""
    username: str = ""
    project: str = ""
    system: bool = False


class Session:
    """One command's connection; nothing happens before it is needed."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._channels: dict[str, grpc.Channel] = {}
        self._logged_in: dict[bool, profile.Token] = {}

    # --- where and who ---

    @cached_property
    def _profile(self) -> tuple[str, profile.Profile]:
        return profile.find(self.options.cloud)

    @property
    def cloud(self) -> str:
        """The profile's name; empty without one."""
        return self._profile[0]

    @cached_property
    def endpoint(self) -> str:
        """host:port of the cloud, or several, with commas.

        Raises:
            errors.Unauthenticated: NOT_LOGGED_IN, none is known.
        """
        if not self.known_endpoint:
            from mcloud_base import errors

            raise errors.Unauthenticated("NOT_LOGGED_IN", "no cloud is known")
        return self.known_endpoint

    @property
    def known_endpoint(self) -> str:
        """The endpoint, or nothing where none is known."""
        return self.options.endpoint or self._profile[1].endpoint

    @property
    def _follows_profile(self) -> bool:
        """Whether the profile's user and project are meant: not for another endpoint."""
        return not self.options.endpoint or self.options.endpoint == self._profile[1].endpoint

    @property
    def ca(self) -> str:
        """File of the authority that signs the cloud's certificate; empty: the system's."""
        return self.options.ca or (self._profile[1].ca if self._follows_profile else "")

    @property
    def username(self) -> str:
        """Who asks."""
        return self.options.username or (self._profile[1].username if self._follows_profile else "")

    @property
    def project(self) -> str:
        """Name or id; empty: the user's only one."""
        return self.options.project or (self._profile[1].project if self._follows_profile else "")

    def token_key(self, *, system: bool) -> str:
        """Return the name under which a login's token is kept."""
        who = os.environ.get("MCLOUD_APPLICATION_CREDENTIAL_ID") or self.username
        return f"{self.endpoint}|{who}|{'(system)' if system else self.project}"

    def token(self, *, system: bool = False) -> profile.Token:
        """Return the token to use, drawn anew if it must be and can be.

        Args:
            system: preferably one for the whole system.

        Raises:
            errors.Unauthenticated: NOT_LOGGED_IN, LOGIN_EXPIRED.
        """
        if fixed := os.environ.get("MCLOUD_TOKEN"):
            return profile.Token(fixed, float("inf"))
        wanted = system and not os.environ.get("MCLOUD_APPLICATION_CREDENTIAL_ID")
        ways = (wanted,) if self.options.system or self._has_secret() else (wanted, not wanted)
        known = None
        for way in ways:
            token = self._logged_in.get(way) or profile.find_token(self.token_key(system=way))
            if token is not None and token.is_good():
                self._logged_in[way] = token
                return token
            known = known or token
        if self._has_secret():
            return self.log_in(system=wanted)
        from mcloud_base import errors

        if known is not None:
            raise errors.Unauthenticated("LOGIN_EXPIRED", f"the login to {self.endpoint} is over")
        raise errors.Unauthenticated("NOT_LOGGED_IN", f"not logged in to {self.endpoint}")

    def _has_secret(self) -> bool:
        environment = os.environ
        return bool(
            (environment.get("MCLOUD_PASSWORD") and self.username)
            or environment.get("MCLOUD_APPLICATION_CREDENTIAL_SECRET")
        )

    def log_in(self, *, system: bool, password: str = "") -> profile.Token:
        """Draw a token (step 1) and keep it.

        Raises:
            errors.Unauthenticated: BAD_CREDENTIALS.
            errors.PermissionDenied: NO_ROLE.
        """
        credential: dict[str, Any]
        if id_ := os.environ.get("MCLOUD_APPLICATION_CREDENTIAL_ID"):
            secret = os.environ.get("MCLOUD_APPLICATION_CREDENTIAL_SECRET", "")
            credential = {"application_credential": {"id": id_, "secret": secret}}
        else:
            password = password or os.environ.get("MCLOUD_PASSWORD", "")
            credential = {"password": {"user_name": self.username, "password": password}}
        answer = self.call(
            "identity.TokenService/CreateToken",
            **credential,
            project="" if system else self.project,
            system=system,
        )
        claims = answer.claims
        token = profile.Token(
            token=answer.token,
            expire_time=float(claims.expire_time.seconds),
            user_name=claims.user_name,
            project_name=claims.project_name,
            project_id=claims.project_id,
            system=claims.system,
        )
        profile.save_token(self.token_key(system=system), token)
        self._logged_in[system] = token
        return token

    def is_system(self) -> bool:
        """Tell whether a token for the whole system is at hand, without drawing one."""
        if os.environ.get("MCLOUD_TOKEN"):
            return self.options.system
        token = profile.find_token(self.token_key(system=True))
        return token is not None and token.is_good()

    # --- calls ---

    def _channel(self, name: str) -> grpc.Channel:
        """Return the connection to the service of an rpc; made at first use."""
        domain = name.partition(".")[0]
        where = self.endpoint
        if domain != "identity":
            where = self._endpoints.get(domain, where)
        if where not in self._channels:
            self._channels[where] = _open_channel(where, self.ca)
        return self._channels[where]

    @cached_property
    def _endpoints(self) -> dict[str, str]:
        """Where services are that are not at the cloud's endpoint, as the cloud says."""
        answer = self.call("identity.EndpointService/ListEndpoints")
        return {each.service: each.address for each in answer.endpoints if each.address}

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            channel.close()

    def call(
        self, name: str, /, *, timeout_s: float = _TIMEOUT_S, as_system: bool = False, **fields: Any
    ) -> Any:
        """Call a unary rpc: `call("compute.FlavorService/GetFlavor", id="flv-…")`.

        Args:
            as_system: use the role on the whole system; otherwise the rpc's rule decides.
            fields: of the request; a request id is added where the rpc has one.

        Raises:
            errors.Error: by the call's status.
        """
        from mcloud_base import ids
        from mcloud_cli import contract

        method = contract.method(name)
        if method.has_request_id:
            fields.setdefault("request_id", ids.request_id())
        request = method.request(**fields)
        send = self._channel(name).unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,  # type: ignore[attr-defined]
            response_deserializer=method.response.FromString,
        )
        end = time.monotonic() + timeout_s

        def once(metadata: Any) -> Any:
            return send(request, timeout=max(end - time.monotonic(), 0.001), metadata=metadata)

        return self._repeated(once, method, end, as_system or bool(fields.get("all_projects")))

    def stream(
        self, name: str, /, *, timeout_s: float, as_system: bool = False, **fields: Any
    ) -> Iterator[Any]:
        """Call an rpc that answers with a stream; it is not repeated.

        Raises:
            errors.Error: by the call's status.
        """
        from mcloud_base import rpc
        from mcloud_cli import contract

        method = contract.method(name)
        send = self._channel(name).unary_stream(
            method.path,
            request_serializer=method.request.SerializeToString,  # type: ignore[attr-defined]
            response_deserializer=method.response.FromString,
        )
        with rpc.reraised():
            metadata = self._metadata(method, system=as_system)
            yield from send(method.request(**fields), timeout=timeout_s, metadata=metadata)

    def send(
        self,
        name: str,
        /,
        requests: Iterable[dict[str, Any]],
        *,
        timeout_s: float,
        as_system: bool = False,
    ) -> Any:
        """Call an rpc that takes a stream; it is not repeated.

        Raises:
            errors.Error: by the call's status.
        """
        from mcloud_base import rpc
        from mcloud_cli import contract

        method = contract.method(name)
        send = self._channel(name).stream_unary(
            method.path,
            request_serializer=method.request.SerializeToString,  # type: ignore[attr-defined]
            response_deserializer=method.response.FromString,
        )
        messages = (method.request(**fields) for fields in requests)
        with rpc.reraised():
            metadata = self._metadata(method, system=as_system)
            return send(messages, timeout=timeout_s, metadata=metadata)

    def _metadata(self, method: Method, *, system: bool) -> Any:
        from mcloud_base import rpc
        from mcloud_cli.contract import Rule

        if Rule.CALLER_ANYONE in method.rule.callers:
            return None
        wanted = system or self.options.system or method.rule.scope == Rule.SCOPE_SYSTEM
        return rpc.bearer(self.token(system=wanted).token)

    def _repeated(self, once: Any, method: Method, end: float, system: bool) -> Any:
        """Make a call until it is answered: again while UNAVAILABLE, once more after a login."""
        import grpc

        from mcloud_base import errors, rpc

        patience = min(end, time.monotonic() + _RETRY_S)
        pause = 0.1
        logged_in = False
        while True:
            try:
                return once(self._metadata(method, system=system))
            except grpc.RpcError as error:
                reason = rpc.from_rpc_error(error)
                if isinstance(reason, errors.Unauthenticated) and not logged_in:
                    logged_in = True
                    if self._forget_refused(reason):
                        continue
                if (
                    not isinstance(reason, errors.Unavailable)
                    or time.monotonic() + pause >= patience
                    or "CERTIFICATE_VERIFY_FAILED" in reason.message
                ):
                    raise reason from error
            time.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 (jitter, not a secret)
            pause = min(pause * 2, 2.0)

    def _forget_refused(self, reason: Any) -> bool:
        """Drop tokens that the cloud no longer takes; tell whether new ones can be drawn."""
        if reason.reason not in ("TOKEN_EXPIRED", "TOKEN_REVOKED", "TOKEN_INVALID"):
            return False
        for system in self._logged_in:
            profile.forget_tokens(self.token_key(system=system))
        self._logged_in.clear()
        return self._has_secret() and not os.environ.get("MCLOUD_TOKEN")

    # --- resources ---

    def list(self, kind: Kind, *, limit: int = 0, **fields: Any) -> list[Any]:
        """Return all resources of a kind, page by page; `filter` and `order_by` as in the API."""
        found: list[Any] = []
        token = ""
        while True:
            size = min(limit - len(found), _PAGE_SIZE) if limit else _PAGE_SIZE
            answer = self.call(kind.rpc("List"), page_size=size, page_token=token, **fields)
            found += getattr(answer, kind.field)
            token = answer.next_page_token
            if not token or (limit and len(found) >= limit):
                return found

    def resolve(self, kind: Kind, text: str, *, field: str = "name") -> str:
        """Return the id of what people name by name or id; of nothing the empty one.

        Raises:
            errors.NotFound: X_NOT_FOUND.
            errors.InvalidArgument: NAME_AMBIGUOUS, with the ids.
        """
        from mcloud_base import ids

        if not text or ids.is_id(text, kind.prefix):
            return text
        return str(self._by_name(kind, text, field).metadata.id)

    def get(self, kind: Kind, text: str, *, field: str = "name") -> Any:
        """Return a resource by name or id.

        Raises:
            errors.NotFound: X_NOT_FOUND.
            errors.InvalidArgument: NAME_AMBIGUOUS, with the ids.
        """
        from mcloud_base import ids

        if ids.is_id(text, kind.prefix):
            return self.call(kind.rpc("Get"), id=text)
        return self._by_name(kind, text, field)

    def _by_name(self, kind: Kind, text: str, field: str) -> Any:
        from mcloud_base import errors

        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        found = self.list(kind, filter=f'{field}="{quoted}"', limit=10)
        if not found:
            raise errors.NotFound(
                f"{kind.noun.upper().replace(' ', '_')}_NOT_FOUND",
                f"there is no {kind.noun} {text}",
                name=text,
            )
        if len(found) > 1:
            names = ", ".join(item.metadata.id for item in found)
            raise errors.InvalidArgument(
                "NAME_AMBIGUOUS", f"several {kind.noun}s are called {text}; use an id: {names}"
            )
        return found[0]


def _open_channel(endpoint: str, ca: str) -> grpc.Channel:
    # gRPC's own log lines would stand between a command and its error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    from mcloud_base import endpoints, rpc

    authority = None
    if ca:
        try:
            authority = Path(ca).expanduser().read_bytes()
        except OSError as error:
            raise click.UsageError(f"cannot read the authority: {error}") from error
    credentials = grpc.ssl_channel_credentials(authority)
    return grpc.secure_channel(
        endpoints.target(endpoint), credentials, rpc.channel_options(endpoint)
    )
