"""mcloud keypair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from mcloud_cli import builder, kinds, output, profile
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session


group = builder.group(
    "keypair",
    "SSH keys that instances let in. Private keys never leave this machine.",
    example="keypair list",
)


@group.command()
@click.argument("name")
@click.option("--public-key", type=click.File(), help="An OpenSSH public key that you have.")
@click.option(
    "--private-key",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Make a key here and write its private half to this file.",
)
@builder.labels
@output.option
@click.pass_obj
def create(
    session: Session,
    name: str,
    public_key: TextIO | None,
    private_key: Path | None,
    labels: dict[str, str],
    form: str,
) -> None:
    """Register a public key, or make an ed25519 key and register its public half.

    Example: mcloud keypair create my_key --private-key my_key.pem
    """
    if (public_key is None) == (private_key is None):
        raise click.UsageError("give --public-key FILE, or --private-key FILE to make one")
    if private_key is not None:
        if private_key.exists():
            raise click.UsageError(f"{private_key} exists; it is not overwritten")
        private, text = _new_key(name)
        # Written first: a key that is registered and lost would let nobody in.
        profile.write(private_key, private)
    else:
        assert public_key is not None
        text = public_key.read().strip()
    from mcloud_base import errors

    try:
        builder.create(
            session,
            kinds.KEY_PAIR,
            form,
            name=name,
            labels=labels,
            spec={"public_key": text},
        )
    except errors.Error as error:
        # Where nobody knows whether it was registered, the private half is kept.
        unclear = isinstance(error, errors.Unavailable | errors.DeadlineExceeded)
        if private_key is not None and not unclear:
            private_key.unlink()
        raise


def _new_key(comment: str) -> tuple[bytes, str]:
    """Return a new private key and its public half, both as OpenSSH writes them."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, f"{public.decode()} {comment.replace(' ', '_')}"


builder.add_list(
    group,
    kinds.KEY_PAIR,
    (
        Column("TYPE", lambda item: str(item.status.type)),
        Column("FINGERPRINT", lambda item: str(item.status.fingerprint)),
    ),
)
builder.add_show(group, kinds.KEY_PAIR, example="my_key")
builder.add_delete(group, kinds.KEY_PAIR, example="my_key")
