"""The cipher of a pack: AES-256-GCM, one call a chunk."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from ckpt.errors import DigestMismatch

KEY_BYTES: Final = 32
SALT_BYTES: Final = 32


class PackCipher:
    """Seals the chunks of one pack.

    Its key is derived from the caller's and the pack's salt: the number of a chunk is a nonce that is never used twice. A chunk opens only
    under its own number, of its own pack, with its own length and kind.
    """

    def __init__(self, key: bytes, salt: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if len(key) != KEY_BYTES:
            raise ValueError(f"a store's key has {KEY_BYTES} bytes")
        self._salt = salt
        self._cipher = AESGCM(hmac.digest(key, b"ckpt pack " + salt, hashlib.sha256))

    def seal(self, number: int, pages: int, kind: int, data: bytes | bytearray | memoryview) -> bytes:
        """A chunk as it is kept."""
        return self._cipher.encrypt(number.to_bytes(12, "little"), data, self._about(number, pages, kind))

    def open(self, number: int, pages: int, kind: int, data: bytes | memoryview) -> bytes:
        """The chunk again.

        Raises:
            DigestMismatch: another key, another place, or it was altered.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(number.to_bytes(12, "little"), data, self._about(number, pages, kind))
        except InvalidTag:
            raise DigestMismatch(f"chunk {number} cannot be decrypted: it was altered, or the key is another one") from None

    def _about(self, number: int, pages: int, kind: int) -> bytes:
        return self._salt + number.to_bytes(8, "little") + pages.to_bytes(2, "little") + kind.to_bytes(2, "little")
