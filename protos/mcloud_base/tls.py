"""Keys, certificates and channel credentials, as every program of mcloud uses them.

A host's certificate has CN = its id and the URI spiffe://mcloud/host/ID; a service's has
CN = its name and spiffe://mcloud/service/NAME.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST_URI = "spiffe://mcloud/host/"
SERVICE_URI = "spiffe://mcloud/service/"


@dataclass(frozen=True)
class Identity:
    """A program's own key and certificate and the authority it trusts; all PEM."""

    key: bytes
    certificate: bytes
    authority: bytes

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return credentials for calling the internal port."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def fingerprint(self) -> str:
        """Return the certificate's SHA-256 (of its DER), hexadecimal."""
        return fingerprint(self.certificate)


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a PEM certificate's DER, hexadecimal."""
    loaded = x509.load_pem_x509_certificate(certificate)
    return hashlib.sha256(loaded.public_bytes(serialization.Encoding.DER)).hexdigest()


def new_key() -> bytes:
    """Return a new P-256 private key, PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def signing_request(key: bytes, common_name: str) -> bytes:
    """Return a certificate signing request for a key, PEM."""
    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    return request.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
