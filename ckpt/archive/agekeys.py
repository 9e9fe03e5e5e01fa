"""The keys that age files are encrypted to, and those that open them: X25519, ssh-ed25519, ssh-rsa, scrypt (C2SP, age.md and age-ssh)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ckpt.archive.age import FILE_KEY_BYTES, TAG_BYTES, Identity, Recipient, Stanza, decode, encode, hkdf
from ckpt.errors import DigestMismatch, KeyProblem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.padding import OAEP
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

SCRYPT_LOG_N: Final = 18
"""As age itself: 256 MiB of memory, about a second."""
MAX_SCRYPT_LOG_N: Final = 20
_LABEL: Final = b"age-encryption.org/v1/"
_X25519: Final = "X25519"
_ED25519: Final = "ssh-ed25519"
_RSA: Final = "ssh-rsa"
_SCRYPT: Final = "scrypt"
_MIN_RSA_BITS: Final = 2048
_POINT_BYTES: Final = 32
_SALT_BYTES: Final = 16
_PRIME: Final = 2**255 - 19
_BECH32: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_PRIVATE_KEY: Final = re.compile(rb"\s*-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY-----")


def _box(key: bytes, file_key: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(bytes(12), file_key, None)


def _unbox(key: bytes, body: bytes) -> bytes | None:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    if len(body) != FILE_KEY_BYTES + TAG_BYTES:
        raise _malformed()
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), body, None)
    except InvalidTag:
        return None


def _malformed() -> DigestMismatch:
    return DigestMismatch("the encrypted archive is altered: its header makes no sense")


def _exchange(secret: bytes, point: bytes) -> bytes:
    """X25519. Raises ValueError for a point of low order, which would give everybody's secret."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(point))


def _public(secret: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def _share(stanza: Stanza, index: int, count: int) -> bytes:
    """The sender's share among the arguments of a stanza."""
    try:
        share = decode(stanza.args[index]) if len(stanza.args) == count else b""
    except ValueError:
        share = b""
    if len(share) != _POINT_BYTES:
        raise _malformed()
    return share


# -- age's own keys --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AgeRecipient:
    """`age1...`."""

    point: bytes

    def wrap(self, file_key: bytes) -> Stanza:
        secret = os.urandom(_POINT_BYTES)
        share = _public(secret)
        key = hkdf(_exchange(secret, self.point), salt=share + self.point, info=_LABEL + b"X25519")
        return Stanza(_X25519, (encode(share),), _box(key, file_key))


@dataclass(frozen=True, slots=True)
class AgeIdentity:
    """`AGE-SECRET-KEY-1...`."""

    secret: bytes = field(repr=False)

    def unwrap(self, stanzas: tuple[Stanza, ...]) -> bytes | None:
        point = _public(self.secret)
        for stanza in stanzas:
            if stanza.kind != _X25519:
                continue
            share = _share(stanza, 0, 1)
            try:
                shared = _exchange(self.secret, share)
            except ValueError:
                raise _malformed() from None
            if file_key := _unbox(hkdf(shared, salt=share + point, info=_LABEL + b"X25519"), stanza.body):
                return file_key
        return None


def _bech32(text: str) -> tuple[str, bytes]:
    """Prefix and data of a Bech32 string (BIP 173, without its limit on the length). Raises ValueError."""
    if text.lower() != text and text.upper() != text:
        raise ValueError("upper and lower case mixed")
    prefix, one, rest = text.lower().rpartition("1")
    if not one or not prefix or len(rest) < 6 or not text.isascii():
        raise ValueError("not Bech32")
    values = [_BECH32.find(char) for char in rest]
    if min(values) < 0:
        raise ValueError("a character that is not allowed")
    check = 1
    for value in (*(ord(c) >> 5 for c in prefix), 0, *(ord(c) & 31 for c in prefix), *values):
        top, check = check >> 25, (check & 0x1FFFFFF) << 5 ^ value
        for bit, word in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= word if top >> bit & 1 else 0
    if check != 1:
        raise ValueError("its checksum is wrong: mistyped?")
    number = 0
    for value in values[:-6]:
        number = number << 5 | value
    spare = (len(values) - 6) * 5 % 8
    if spare > 4 or number & ((1 << spare) - 1):
        raise ValueError("not Bech32")
    return prefix, (number >> spare).to_bytes((len(values) - 6) * 5 // 8, "big")


def _key_of(text: str, prefix: str) -> bytes:
    found, data = _bech32(text)
    if found != prefix or len(data) != _POINT_BYTES:
        raise ValueError("of a kind that this version does not know")
    return data


# -- keys of ssh -----------------------------------------------------------------------------------------------------


def _tag(wire: bytes) -> str:
    return encode(hashlib.sha256(wire).digest()[:4])


def _tweak(wire: bytes) -> bytes:
    return hkdf(b"", salt=wire, info=_LABEL + b"ssh-ed25519")


def _montgomery(point: bytes) -> bytes:
    """The X25519 point of an Ed25519 public key (RFC 7748, section 4.1)."""
    y = int.from_bytes(point, "little") & ((1 << 255) - 1)
    if y in (0, 1, _PRIME - 1) or y >= _PRIME:
        raise ValueError("not a point that a key can have")
    return ((1 + y) * pow(1 - y, -1, _PRIME) % _PRIME).to_bytes(_POINT_BYTES, "little")


@dataclass(frozen=True, slots=True)
class Ed25519Recipient:
    """`ssh-ed25519 ...`."""

    wire: bytes
    point: bytes

    def wrap(self, file_key: bytes) -> Stanza:
        secret = os.urandom(_POINT_BYTES)
        share = _public(secret)
        shared = _exchange(_tweak(self.wire), _exchange(secret, self.point))
        key = hkdf(shared, salt=share + self.point, info=_LABEL + b"ssh-ed25519")
        return Stanza(_ED25519, (_tag(self.wire), encode(share)), _box(key, file_key))


@dataclass(frozen=True, slots=True)
class Ed25519Identity:
    """An ssh-ed25519 private key."""

    wire: bytes
    secret: bytes = field(repr=False)

    def unwrap(self, stanzas: tuple[Stanza, ...]) -> bytes | None:
        point = _public(self.secret)
        for stanza in stanzas:
            if stanza.kind != _ED25519 or stanza.args[:1] != (_tag(self.wire),):
                continue
            share = _share(stanza, 1, 2)
            try:
                shared = _exchange(_tweak(self.wire), _exchange(self.secret, share))
            except ValueError:
                raise _malformed() from None
            if file_key := _unbox(hkdf(shared, salt=share + point, info=_LABEL + b"ssh-ed25519"), stanza.body):
                return file_key
        return None


def _oaep() -> OAEP:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    return padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), _LABEL + b"ssh-rsa")


@dataclass(frozen=True, slots=True)
class RsaRecipient:
    """`ssh-rsa ...`."""

    wire: bytes
    key: RSAPublicKey

    def wrap(self, file_key: bytes) -> Stanza:
        return Stanza(_RSA, (_tag(self.wire),), self.key.encrypt(file_key, _oaep()))


@dataclass(frozen=True, slots=True)
class RsaIdentity:
    """An ssh-rsa private key."""

    wire: bytes
    key: RSAPrivateKey = field(repr=False)

    def unwrap(self, stanzas: tuple[Stanza, ...]) -> bytes | None:
        for stanza in stanzas:
            if stanza.kind == _RSA and stanza.args == (_tag(self.wire),):
                try:
                    file_key = self.key.decrypt(stanza.body, _oaep())
                except ValueError:
                    continue
                if len(file_key) == FILE_KEY_BYTES:
                    return file_key
        return None


def _ssh_recipient(text: str) -> Recipient:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    kind, _, rest = text.partition(" ")
    try:
        wire = base64.b64decode(rest.split()[0], validate=True)
        key = load_ssh_public_key(f"{kind} {rest.split()[0]}".encode())
    except (ValueError, IndexError, binascii.Error, UnsupportedAlgorithm):
        raise ValueError("not a public key of ssh") from None
    if isinstance(key, Ed25519PublicKey):
        return Ed25519Recipient(wire, _montgomery(key.public_bytes_raw()))
    if isinstance(key, RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return RsaRecipient(wire, key)
    raise ValueError("age takes ssh-ed25519, and ssh-rsa of at least 2048 bits")


def _ssh_identity(data: bytes) -> Identity:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    load = serialization.load_ssh_private_key if b"BEGIN OPENSSH" in data else serialization.load_pem_private_key
    try:
        key = load(data, None)
    except (TypeError, UnsupportedAlgorithm):
        # An encrypted one: the library reads those only with yet another library.
        raise ValueError("a private key that is protected by a passphrase cannot be used; an age identity can be (age -p)") from None
    except ValueError:
        raise ValueError("not a private key that can be read") from None
    if isinstance(key, Ed25519PrivateKey):
        encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        wire = base64.b64decode(key.public_key().public_bytes(encoding, form).split()[1])
        return Ed25519Identity(wire, hashlib.sha512(key.private_bytes_raw()).digest()[:_POINT_BYTES])
    if isinstance(key, RSAPrivateKey):
        encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        return RsaIdentity(base64.b64decode(key.public_key().public_bytes(encoding, form).split()[1]), key)
    raise ValueError("age takes ssh-ed25519 and ssh-rsa keys")


# -- passphrases -----------------------------------------------------------------------------------------------------


def _stretch(passphrase: bytes, salt: bytes, log_n: int) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=_LABEL + b"scrypt" + salt, length=32, n=1 << log_n, r=8, p=1).derive(passphrase)


def wrap_scrypt(passphrase: bytes, file_key: bytes, *, log_n: int | None = None) -> Stanza:
    """The file key for whoever knows the passphrase."""
    log_n = SCRYPT_LOG_N if log_n is None else log_n
    salt = os.urandom(_SALT_BYTES)
    return Stanza(_SCRYPT, (encode(salt), str(log_n)), _box(_stretch(passphrase, salt, log_n), file_key))


def unwrap_scrypt(passphrase: bytes, stanzas: Sequence[Stanza]) -> bytes | None:
    """The file key; None when the file has no passphrase, or another.

    Raises:
        DigestMismatch: a passphrase beside other recipients: whoever is one of them could have made the file.
        KeyProblem: opening it would take too much memory.
    """
    mine = [stanza for stanza in stanzas if stanza.kind == _SCRYPT]
    if not mine:
        return None
    stanza = mine[0]
    if len(stanzas) != 1 or len(stanza.args) != 2 or not re.fullmatch(r"[1-9][0-9]?", stanza.args[1]):
        raise _malformed()
    try:
        salt = decode(stanza.args[0])
    except ValueError:
        salt = b""
    if len(salt) != _SALT_BYTES:
        raise _malformed()
    log_n = int(stanza.args[1])
    if log_n > MAX_SCRYPT_LOG_N:
        raise KeyProblem(f"the passphrase's work factor is 2^{log_n}, at most 2^{MAX_SCRYPT_LOG_N} is taken")
    return _unbox(_stretch(passphrase, salt, log_n), stanza.body)


# -- texts and files -------------------------------------------------------------------------------------------------


def is_recipient(text: str) -> bool:
    """Whether it has the form of a recipient (or, by mistake, of a secret key); all else is the name of a file."""
    return re.match(r"age1[a-z0-9]{20,}$|ssh-[a-z0-9]+ |age-secret-key-1", text, re.IGNORECASE) is not None


def recipient(text: str) -> Recipient:
    """A recipient in one line. Raises ValueError with the reason."""
    if text.upper().startswith("AGE-SECRET-KEY-"):
        raise ValueError("that is a secret key: keep it; the recipient is the public one (age-keygen -y)")
    if text.startswith("ssh-"):
        return _ssh_recipient(text)
    if not text.startswith("age1"):
        raise ValueError("not a recipient")
    return AgeRecipient(_key_of(text, "age"))


def identities(data: bytes) -> list[Identity]:
    """The keys in a file: a private key of ssh, or lines `AGE-SECRET-KEY-1...`. Raises ValueError with the reason."""
    if _PRIVATE_KEY.match(data):
        return [_ssh_identity(data)]
    found: list[Identity] = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if text.upper().startswith("AGE-PLUGIN-"):
            raise ValueError(f"line {number} is of a plugin, which ckpt does not run")
        try:
            found.append(AgeIdentity(_key_of(text, "age-secret-key-")))
        except ValueError as error:
            raise ValueError(f"line {number} is no identity: {error}") from None
    if not found:
        raise ValueError("no identity in it")
    return found
