"""The deployment's certificate authority: made at first start, kept in one directory (0700)."""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mcloud_base import endpoints, errors, tls

_DAY = datetime.timedelta(days=1)
HOST_DAYS = 30
SERVICE_DAYS = 365


class Authority:
    """Signs the certificates of services and hosts.

    Args:
        directory: holds ca.pem and ca.key; both are made if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory / ".lock"):
            if not (directory / "ca.key").exists():
                self._create()
        self.certificate = (directory / "ca.pem").read_bytes()
        self._loaded = x509.load_pem_x509_certificate(self.certificate)

    def _create(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mcloud authority")])
        certificate = (
            _builder(name, name, key.public_key(), 3650)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        tls.write_private(
            self._directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM)
        )
        # The key last: its presence says that both are there.
        tls.write_private(
            self._directory / "ca.key",
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def issue_service(self, service: str, names: Sequence[str]) -> tls.Identity:
        """Return a key and certificate for a service, reachable under names and addresses."""
        key = tls.new_key()
        csr = x509.load_pem_x509_csr(tls.signing_request(key, service))
        alternatives: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(tls.SERVICE_URI + service),
            *map(_general_name, dict.fromkeys((endpoints.SERVICE_NAME, "localhost", *names))),
        ]
        certificate = self._sign(csr, service, alternatives, SERVICE_DAYS)
        # The chain is sent whole, so that a machine that joins can find the authority in it.
        return tls.Identity(key, _pem(certificate) + self.certificate, self.certificate)

    def issue_host(self, csr_pem: bytes, host_id: str, underlay_ip: str) -> x509.Certificate:
        """Return a certificate for a host; of the request only the key counts.

        Raises:
            errors.InvalidArgument: BAD_CSR.
        """
        try:
            csr = x509.load_pem_x509_csr(csr_pem)
        except ValueError as error:
            raise errors.InvalidArgument("BAD_CSR", "csr is not a PEM signing request") from error
        if not csr.is_signature_valid or not isinstance(
            csr.public_key(), ec.EllipticCurvePublicKey
        ):
            raise errors.InvalidArgument("BAD_CSR", "csr must be for a P-256 key that signed it")
        alternatives: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(tls.HOST_URI + host_id),
            x509.DNSName(host_id),
        ]
        if underlay_ip:
            alternatives.append(_general_name(underlay_ip))
        return self._sign(csr, host_id, alternatives, HOST_DAYS)

    def _sign(
        self,
        csr: x509.CertificateSigningRequest,
        common_name: str,
        alternatives: list[x509.GeneralName],
        days: int,
    ) -> x509.Certificate:
        key = serialization.load_pem_private_key((self._directory / "ca.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        public = csr.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            _builder(name, self._loaded.subject, public, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(key, hashes.SHA256())
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + days * _DAY)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    # keyEncipherment: libvirt and GnuTLS warn without it.
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
