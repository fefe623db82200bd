"""Public keys: what ssh-keygen makes is accepted, with its fingerprint; all else is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcloud_base import errors
from mcloud_controlplane.compute import key_pair_store

ED25519 = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFL+PBUWRwLpJsk0qZCz0ytS6RbVKMuHBbU2ZQKrCd5W me@example"
)


@pytest.mark.parametrize(
    ("arguments", "type_"),
    [
        (["-t", "ed25519"], "ssh-ed25519"),
        (["-t", "rsa", "-b", "2048"], "ssh-rsa"),
        (["-t", "ecdsa", "-b", "256"], "ecdsa-sha2-nistp256"),
        (["-t", "ecdsa", "-b", "384"], "ecdsa-sha2-nistp384"),
        (["-t", "ecdsa", "-b", "521"], "ecdsa-sha2-nistp521"),
    ],
)
def test_keys_of_ssh_keygen(tmp_path: Path, arguments: list[str], type_: str) -> None:
    key = tmp_path / "key"
    made = ["ssh-keygen", "-q", *arguments, "-N", "", "-C", "somebody@some where", "-f", str(key)]
    subprocess.run(made, check=True)
    public = key.with_suffix(".pub")
    listed = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(public)], check=True, capture_output=True, text=True
    )
    assert key_pair_store.parse(public.read_text()) == (type_, listed.stdout.split()[1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 ",
        "ssh-ed25519 AAAA",
        "ssh-ed25519 not/base64!",
        "ssh-ed25519 ключ",
        "ssh-rsa " + ED25519.split()[1],  # says one type, is another
        "ssh-dss " + ED25519.split()[1],
        'command="id" ' + ED25519,  # options are not a key
        ED25519 + "\nssh-ed25519 AAAA second",
        ED25519 + "\r\nssh-ed25519 AAAA second",
        ED25519 + "\x0bx",
        ED25519 + "\u2028x",
        ED25519.replace(" ", "\t", 1),
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "ssh-ed25519 " + "AAAAC3NzaC1lZDI1NTE5",  # ends after its type
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        key_pair_store.parse(text)
    assert caught.value.reason == "BAD_PUBLIC_KEY"


@given(st.one_of(st.text(), st.text().map(lambda text: "ssh-ed25519 " + text)))
def test_garbage_is_refused_and_nothing_else_happens(text: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        key_pair_store.parse(text)
