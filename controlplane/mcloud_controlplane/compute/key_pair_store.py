"""Key pairs in the database."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping

from google.protobuf.message import Message

from mcloud.compute.v1 import key_pair_pb2, key_pair_service_pb2
from mcloud_base import errors, ids
from mcloud_controlplane.compute import quota_store
from mcloud_controlplane.compute.model import KeyPair, locked, shared
from mcloud_controlplane.core import auth, convert, database, listing, tables
from mcloud_controlplane.core.mutation import Mutation

_TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)


def message(row: KeyPair) -> key_pair_pb2.KeyPair:
    """Return a key pair's row as its message."""
    return key_pair_pb2.KeyPair(
        metadata=convert.metadata(row),
        spec=key_pair_pb2.KeyPairSpec.FromString(bytes(row.spec)),
        status=key_pair_pb2.KeyPairStatus(fingerprint=row.fingerprint, type=row.type),
    )


def public_key(row: KeyPair) -> str:
    """Return the key in OpenSSH's format."""
    return key_pair_pb2.KeyPairSpec.FromString(bytes(row.spec)).public_key


def get(caller: auth.Caller, id_: str, *, lock: bool = False) -> KeyPair:
    """Return a key pair that the caller sees.

    Args:
        lock: it is to be changed.

    Raises:
        errors.NotFound: KEY_PAIR_NOT_FOUND.
    """
    query = KeyPair.select().where(KeyPair.id == id_)
    row: KeyPair | None = (locked(query) if lock else query).first()
    if row is None or not caller.sees(row.project_id):
        raise errors.NotFound("KEY_PAIR_NOT_FOUND", f"there is no key pair {id_}", id=id_)
    return row


def create(
    work: Mutation, request: key_pair_service_pb2.CreateKeyPairRequest
) -> key_pair_pb2.KeyPair:
    """Record a public key."""
    type_, fingerprint = parse(request.spec.public_key)
    project_id = work.caller.project_id
    quota_store.require(project_id, key_pairs=1)
    taken = (KeyPair.project_id == project_id) & (KeyPair.name == request.name)
    if KeyPair.select().where(taken).exists():
        raise errors.AlreadyExists(
            "KEY_PAIR_NAME_TAKEN", f"the project has a key pair {request.name}", name=request.name
        )
    moment = database.now()
    row = KeyPair.create(
        id=ids.new("key"),
        name=request.name,
        project_id=project_id,
        labels=dict(request.labels),
        create_time=moment,
        update_time=moment,
        spec=key_pair_pb2.KeyPairSpec(
            public_key=request.spec.public_key.strip()
        ).SerializeToString(),
        type=type_,
        fingerprint=fingerprint,
    )
    work.concerns("key_pair", row.id, row.name, project_id)
    tables.changed("key_pair", row.id, project_id, "ADDED")
    return message(row)


def delete(
    work: Mutation, request: key_pair_service_pb2.DeleteKeyPairRequest
) -> key_pair_pb2.KeyPair:
    """Delete a key pair; instances keep their copy."""
    row = get(work.caller, request.id, lock=True)
    convert.require_version(row, request.resource_version)
    row.delete_instance()
    work.concerns("key_pair", row.id, row.name, row.project_id)
    tables.changed("key_pair", row.id, row.project_id, "DELETED")
    return message(row)


def list_page(
    caller: auth.Caller, request: key_pair_service_pb2.ListKeyPairsRequest
) -> key_pair_service_pb2.ListKeyPairsResponse:
    """Return a page."""
    revision = shared.revision()
    page = listing.page(KeyPair, request, caller, fields={"id": KeyPair.id, "name": KeyPair.name})
    return key_pair_service_pb2.ListKeyPairsResponse(
        key_pairs=[message(row) for row in page.rows],
        next_page_token=page.next_page_token,
        revision=str(revision),
    )


def load(found: list[str]) -> Mapping[str, Message]:
    """Return the messages of these ids, for a watch."""
    return {row.id: message(row) for row in KeyPair.select().where(KeyPair.id.in_(found))}


def parse(text: str) -> tuple[str, str]:
    """Return the type and the fingerprint of a public key.

    Source: RFC 4253, section 6.6 (the blob begins with its type); ssh-keygen -l (the fingerprint).

    Raises:
        errors.InvalidArgument: BAD_PUBLIC_KEY.
    """
    parts = text.strip().split(None, 2)
    try:
        blob = base64.b64decode(parts[1], validate=True)
        length = int.from_bytes(blob[:4])
        inner = blob[4 : 4 + length].decode("ascii")
    except (IndexError, ValueError) as error:  # also what base64 and ASCII refuse
        raise _bad_key() from error
    one_line = text.strip().isprintable()  # it becomes a line of the guest's authorized_keys
    if parts[0] not in _TYPES or inner != parts[0] or not one_line or len(blob) < 40:
        raise _bad_key()
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return parts[0], f"SHA256:{digest}"


def _bad_key() -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "BAD_PUBLIC_KEY",
        'public_key must be one line of OpenSSH\'s format: "ssh-ed25519 AAAA… name"',
    )
