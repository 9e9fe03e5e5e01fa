"""The server's certificate: its own, made once and kept in the store, or one that was given; and whose clients' are accepted."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.errors import KeyProblem
from ckpt.store import durable
from ckpt.transports.https_pins import fingerprint

VALID_DAYS: Final = 3650
_PARTIAL_CHAIN: Final = 0x80000
"""X509_V_FLAG_PARTIAL_CHAIN (openssl/x509_vfy.h): a client's own certificate can be listed instead of an authority's."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What the listener needs."""

    context: ssl.SSLContext
    fingerprint: str


def own(root: Path) -> Path:
    """The store's self-made certificate with its key in one file (0600), made when it is not there.

    Raises:
        OSError: it cannot be written.
    """
    path = root / "serve" / "certificate.pem"
    if not path.exists():
        durable.write_file(path, make())
    return path


def make(name: str | None = None, *, days: int = VALID_DAYS) -> bytes:
    """A new key (P-256) and a certificate for it that it signed itself, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    host = name or socket.gethostname() or "ckpt"
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return secret + made.public_bytes(serialization.Encoding.PEM)


def serving(certificate: Path, key: Path | None = None, *, client_ca: Path | None = None) -> Serving:
    """TLS for the listener.

    Args:
        certificate: PEM, the server's first; key: PEM, when it is not in the same file.
        client_ca: PEM of authorities, or of single clients' certificates: clients may show one of theirs. Without it none is asked for.

    Raises:
        KeyProblem: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        _not_public(key or certificate)
        context.load_cert_chain(certificate, key, password=lambda: b"")
        first = certificate.read_text().split("-----BEGIN CERTIFICATE-----", 1)[1].split("-----END CERTIFICATE-----", 1)[0]
        der = ssl.PEM_cert_to_DER_cert(f"-----BEGIN CERTIFICATE-----{first}-----END CERTIFICATE-----")
    except (OSError, ValueError, IndexError) as error:
        raise KeyProblem(f"cannot use the certificate {certificate}: {_said(error)}", hint="PEM, with its key beside it or in --key") from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise KeyProblem(f"cannot use the clients' authorities in {client_ca}: {_said(error)}") from error
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags = ssl.VerifyFlags(context.verify_flags | _PARTIAL_CHAIN)
    return Serving(context, fingerprint(der))


def _said(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


def _not_public(path: Path) -> None:
    mode = os.stat(path).st_mode
    if mode & 0o004:
        raise KeyProblem(f"everybody may read the key in {path}", hint=f"chmod 600 {path}")
