"""A small certificate authority: gives hosts and services the certificates that identity would."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mcloud_base import tls

_DAY = datetime.timedelta(days=1)


class Authority:
    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(self._name, self._key.public_key(), _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = certificate.public_bytes(serialization.Encoding.PEM)

    def identity(
        self,
        common_name: str,
        *,
        uri: str = "",
        dns: tuple[str, ...] = (),
        addresses: tuple[str, ...] = ("127.0.0.1",),
        life: datetime.timedelta = _DAY,
    ) -> tls.Identity:
        key = tls.new_key()
        csr = tls.signing_request(key, common_name)
        certificate = self.sign(csr, common_name, uri=uri, dns=dns, addresses=addresses, life=life)
        return tls.Identity(key, certificate, self.certificate)

    def sign(
        self,
        csr: bytes,
        common_name: str,
        *,
        uri: str = "",
        dns: tuple[str, ...] = (),
        addresses: tuple[str, ...] = ("127.0.0.1",),
        life: datetime.timedelta = _DAY,
    ) -> bytes:
        request = x509.load_pem_x509_csr(csr)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        names += [x509.UniformResourceIdentifier(uri)] if uri else []
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            self._builder(subject, request.public_key(), life)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def _builder(
        self, subject: x509.Name, key: object, life: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + life)
        )


def write_qemu_files(identity: tls.Identity, directory: Path) -> Path:
    """Lay an identity out as QEMU reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ca-cert.pem").write_bytes(identity.authority)
    for role in ("server", "client"):
        (directory / f"{role}-cert.pem").write_bytes(identity.certificate)
        (directory / f"{role}-key.pem").write_bytes(identity.key)
    return directory


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
