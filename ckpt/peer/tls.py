"""TLS with certificates made for one migration: each end knows the other's certificate, by ssh, and accepts no other.

The keys are made by the openssl program (Python's ssl makes none), live in memory only and are forgotten with the process.
"""

from __future__ import annotations

import hmac
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ckpt.errors import FeatureMissing, TransferFailed
from ckpt.host.run import CommandFailed, run, which

if TYPE_CHECKING:
    import socket
    import ssl

MAX_CERTIFICATE_BYTES: Final = 8 << 10
_MAKE_LIMIT_S: Final = 20.0
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h): the clocks of two hosts differ, and who may speak is said by the pin."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One end's certificate and key, as PEM."""

    certificate: str
    key: str


def identity() -> Identity:
    """A new key (P-256) with a certificate. Raises FeatureMissing when openssl is missing or fails."""
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days 2 -subj /CN=ckpt -keyout - -out -".split()
    hint = "install openssl on both hosts, or migrate without --direct"
    program = which("openssl")
    if program is None:
        raise FeatureMissing("there is no openssl program to make a certificate with", hint=hint)
    try:
        said = run([program, *words], timeout_s=_MAKE_LIMIT_S).text
    except CommandFailed as error:
        raise FeatureMissing(f"openssl made no certificate: {error.reason}", hint=hint) from error
    parts = dict(_parts(said))
    if "CERTIFICATE" not in parts or "PRIVATE KEY" not in parts:
        raise FeatureMissing("openssl made no certificate", hint=hint)
    return Identity(parts["CERTIFICATE"], parts["PRIVATE KEY"])


def _parts(text: str) -> list[tuple[str, str]]:
    return [(match[1], match[0] + "\n") for match in re.finditer(r"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----", text, re.DOTALL)]


def certificate_from(value: Any) -> str:
    """The other end's certificate, as it came over ssh. Raises TransferFailed when it is none."""
    import ssl

    if isinstance(value, str) and len(value) <= MAX_CERTIFICATE_BYTES and [label for label, _ in _parts(value)] == ["CERTIFICATE"]:
        try:
            ssl.PEM_cert_to_DER_cert(value.strip())
        except ValueError:
            pass
        else:
            return value
    raise TransferFailed("the other side sent no certificate")


def context(mine: Identity, theirs: str, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 with my certificate, and theirs as the only one that is accepted. Raises TransferFailed for an unusable one."""
    import ssl

    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags = ssl.VerifyFlags(made.verify_flags | _NO_CHECK_TIME)
    if server:
        made.num_tickets = 0  # nobody would read them
    # Python loads keys from files only: this one has no name, and is gone with its descriptor.
    fd = os.memfd_create("ckpt", os.MFD_CLOEXEC)
    try:
        os.write(fd, (mine.key + mine.certificate).encode())
        made.load_cert_chain(f"/proc/self/fd/{fd}")
        made.load_verify_locations(cadata=theirs)
    except ssl.SSLError as error:
        raise TransferFailed(f"a certificate cannot be used: {error.reason}") from error
    finally:
        os.close(fd)
    return made


def wrap(sock: socket.socket, using: ssl.SSLContext, theirs: str, *, server: bool) -> ssl.SSLSocket:
    """The handshake, within the socket's time limit; the connection is non-blocking afterwards.

    Raises:
        OSError: (ssl.SSLError among them) it failed, or the other end is not the one whose certificate is known. The socket is closed.
    """
    import ssl

    try:
        made = using.wrap_socket(sock, server_side=server)
    except BaseException:
        sock.close()
        raise
    if not hmac.compare_digest(made.getpeercert(binary_form=True) or b"", ssl.PEM_cert_to_DER_cert(theirs.strip())):
        made.close()
        raise ConnectionRefusedError("another certificate than the one that is known")
    made.setblocking(False)
    return made
