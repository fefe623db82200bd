"""Tokens as JSON Web Tokens signed with Ed25519, and the keys that sign them.

Source: RFC 7519 (JWT), RFC 8037 (Ed25519 in it), RFC 8705 (binding to a certificate). What the
claims mean stands with whoever reads them: core/tokens.py.
"""

from __future__ import annotations

import functools
import secrets
import socket
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mcloud.identity.v1 import token_pb2, token_service_pb2
from mcloud_base import errors
from mcloud_controlplane.core import convert, database
from mcloud_controlplane.core.tokens import ISSUER, OPTIONS, check_time
from mcloud_controlplane.identity.login_store import Grant
from mcloud_controlplane.identity.model import SigningKey

DELEGATED_TTL_S = 900

_KEY_LIFE_US = 30 * 86_400 * 1_000_000
_TOKEN_LIFE_US = 2 * 3600 * 1_000_000  # longer than any token's


def rotate(store: database.Database) -> None:
    """See to it that there is a young key, and that old ones are kept while tokens need them."""
    moment = database.now()
    list(store.locked(SigningKey.select(SigningKey.id).order_by(SigningKey.id)))
    newest = current_key()
    if newest is None or newest.create_time < moment - _KEY_LIFE_US:
        key = Ed25519PrivateKey.generate()
        SigningKey.create(
            id=secrets.token_hex(8),
            private_key=key.private_bytes_raw(),
            public_key=key.public_key().public_bytes_raw(),
            create_time=moment,
        )
    elif newest.create_time < moment - _TOKEN_LIFE_US:
        SigningKey.delete().where(SigningKey.create_time < newest.create_time).execute()


def current_key() -> SigningKey | None:
    """Return the key that signs now. Within a unit."""
    found: SigningKey | None = (
        SigningKey.select().order_by(SigningKey.create_time.desc(), SigningKey.id.desc()).first()
    )
    return found


def keys() -> list[SigningKey]:
    """Return every key that tokens in circulation may be signed with. Within a unit."""
    return list(SigningKey.select().order_by(SigningKey.create_time))


def sign(key: SigningKey, claims: dict[str, Any]) -> str:
    """Return the token of these claims."""
    private = _private_key(bytes(key.private_key))
    return jwt.encode(claims, private, algorithm="EdDSA", headers={"kid": key.id})


@functools.lru_cache(maxsize=2)
def _private_key(raw: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(raw)


def read(token: str, known: list[SigningKey]) -> dict[str, Any]:
    """Return the claims of a token that one of the keys has signed.

    Raises:
        errors.Unauthenticated: TOKEN_INVALID, TOKEN_EXPIRED.
    """
    try:
        key_id = jwt.get_unverified_header(token).get("kid")
        key = next((key for key in known if key.id == key_id), None)
        if key is None:
            raise jwt.InvalidTokenError
        claims: dict[str, Any] = jwt.decode(
            token,
            Ed25519PublicKey.from_public_bytes(bytes(key.public_key)),
            algorithms=["EdDSA"],
            issuer=ISSUER,
            options=OPTIONS,
        )
    except jwt.ExpiredSignatureError as error:
        raise errors.Unauthenticated(
            "TOKEN_EXPIRED", "the token has expired; log in again"
        ) from error
    except jwt.InvalidTokenError as error:
        raise errors.Unauthenticated(
            "TOKEN_INVALID", "the token is not one of this cloud's; log in again"
        ) from error
    check_time(claims)
    return claims


def user_claims(grant: Grant, start: int, ttl_s: int) -> dict[str, Any]:
    """Return the claims of a user's token.

    Args:
        start: when the work on this login began.
    """
    end = database.now()
    expire_time = end // 1_000_000 + ttl_s
    if grant.expire_time is not None:
        expire_time = min(expire_time, grant.expire_time // 1_000_000)
    return {
        "iss": ISSUER,
        "sub": grant.principal_id,
        "jti": secrets.token_hex(16),
        "iat": end // 1_000_000,
        "exp": expire_time,
        "typ": "user",
        "uid": grant.user_id,
        "unm": grant.user_name,
        "prj": grant.project_id,
        "pnm": grant.project_name,
        "rol": grant.role,
        "sys": grant.system,
        "epo": grant.epochs,
        "lgs": start,
        "lge": end,
        "lgh": socket.gethostname(),
    }


def delegated_claims(
    request: token_service_pb2.CreateDelegatedTokenRequest, epoch: int
) -> dict[str, Any]:
    """Return the claims of a token with which a host may ask for what one domain needs."""
    moment = database.now() // 1_000_000
    return {
        "iss": ISSUER,
        "sub": request.host_id,
        "jti": secrets.token_hex(16),
        "iat": moment,
        "exp": moment + DELEGATED_TTL_S,
        "typ": "delegated",
        "cnf": {"x5t#S256": request.certificate_sha256},
        "prj": request.project_id,
        "dom": request.domain_id,
        "gen": request.generation,
        "img": list(request.image_ids),
        "prt": list(request.port_ids),
        "att": list(request.attachment_ids),
        "epo": {request.host_id: epoch},
    }


def claims_message(claims: dict[str, Any]) -> token_pb2.TokenClaims:
    """Return a token's claims as the contract has them; a delegated one's have no user."""
    return token_pb2.TokenClaims(
        token_id=claims["jti"],
        principal_id=claims["sub"],
        user_id=claims.get("uid", ""),
        user_name=claims.get("unm", ""),
        project_id=claims["prj"],
        project_name=claims.get("pnm", ""),
        role=claims.get("rol", 0),
        system=claims.get("sys", False),
        issue_time=convert.timestamp(claims["iat"] * 1_000_000),
        expire_time=convert.timestamp(claims["exp"] * 1_000_000),
    )
