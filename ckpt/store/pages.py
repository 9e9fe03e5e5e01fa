"""Pages, their tags, and the seal of a member. Tags are what makes two checkpoints share what they have in common.

A tag is 16 bytes: AES(k2, GHASH(k1, page)), both keys derived from a secret of the store (a keyed pack: from its key). Whoever does not know
the secret cannot make two pages with one tag, however long he computes (the family of hash functions is almost universal: 2^-120 for any pair
of pages, McGrew and Viega 2004, section 5), and the outer AES lets a tag tell nothing but that two pages are equal. It costs a third of SHA-256.

A seal is a checksum over a whole member with the same secret, at a tenth of the time of SHA-256: what this store reads back is what it wrote.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

PAGE_BYTES: Final = 4096
TAG_BYTES: Final = 16
CHUNK_PAGES: Final = 128
CHUNK_BYTES: Final = CHUNK_PAGES * PAGE_BYTES
PIECE_BYTES: Final = 1 << 20
"""Of a member's content, for its seal."""

Words: TypeAlias = npt.NDArray[np.uint64]
Places: TypeAlias = npt.NDArray[np.int64]
Pages: TypeAlias = npt.NDArray[np.uint8]

UNKNOWN: Final = -1
PACK_SHIFT: Final = 40
"""A place is `pack << 40 | chunk * 128 + page in the chunk`, the pack being a number in some list of packs."""

LINEAR: Final = (1 << PACK_SHIFT) - 1

_WORDS: Final = PAGE_BYTES // 8
_MERGE: Final = 4


class Tagger:
    """Makes the tags of pages with one secret."""

    def __init__(self, secret: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._secret = secret
        inner, outer, identity = (hmac.digest(secret, b"ckpt page tag " + what, hashlib.sha256) for what in (b"inner", b"outer", b"id"))
        self.id: Final = identity[:16]
        """Two packs with the same id have tags that can be compared."""
        self._hash: Any = AESGCM(inner[:16]).encrypt
        self._outer = Cipher(algorithms.AES(outer[:16]), modes.ECB())  # noqa: S305 (single blocks: a permutation, not a mode)

    def seal(self) -> Seal:
        """A new checksum over a member."""
        return Seal(self._secret, self.id)

    def sealed(self, text: str) -> bool:
        """Whether a seal's text is of this secret."""
        return text.partition(":")[0] == self.id.hex()

    def tags(self, pages: Pages) -> Words:
        """The tags of `pages` (an array of n x 4096 bytes) as n x 2 words."""
        view, digest = np.ascontiguousarray(pages).data.cast("B"), self._hash
        inner = b"".join([digest(_NONCE, b"", view[at : at + PAGE_BYTES]) for at in range(0, len(view), PAGE_BYTES)])
        return np.frombuffer(self._outer.encryptor().update(inner), "<u8").reshape(-1, 2)


_NONCE: Final = bytes(12)


class Seal:
    """A keyed checksum over a member's content: HMAC-SHA-256 over the GHASH of each of its pieces of 1 MiB, and its length."""

    def __init__(self, secret: bytes, identity: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        inner, self._key = (hmac.digest(secret, b"ckpt member seal " + what, hashlib.sha256) for what in (b"inner", b"outer"))
        self._hash: Any = AESGCM(inner[:16]).encrypt
        self._id = identity
        self._pieces: list[bytes] = []
        self._rest = bytearray()
        self._size_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes; whole pieces are not copied."""
        view = memoryview(data)
        self._size_bytes += len(view)
        while view:
            if self._rest or len(view) < PIECE_BYTES:
                count = min(PIECE_BYTES - len(self._rest), len(view))
                self._rest += view[:count]
                view = view[count:]
                if len(self._rest) == PIECE_BYTES:
                    self._pieces.append(self._hash(_NONCE, b"", self._rest))
                    self._rest = bytearray()
            else:
                self._pieces.append(self._hash(_NONCE, b"", view[:PIECE_BYTES]))
                view = view[PIECE_BYTES:]

    def read(self, fd: int) -> None:
        """All of an open file. (By reads: a bad block of the disk shall be an error here, and no signal.)"""
        buffer = memoryview(bytearray(PIECE_BYTES))
        at = 0
        while count := os.preadv(fd, [buffer], at):
            self.update(buffer[:count])
            at += count

    def text(self) -> str:
        """ "ID:HEX", ID being that of the secret: who has another one cannot compare."""
        rest = [self._hash(_NONCE, b"", self._rest)] if self._rest else []
        made = hmac.digest(self._key, self._size_bytes.to_bytes(8, "little") + b"".join([*self._pieces, *rest]), hashlib.sha256)
        return f"{self._id.hex()}:{made.hex()}"


def is_zero(pages: Pages) -> npt.NDArray[np.bool_]:
    """Which of n x 4096 bytes are zero pages."""
    words = pages.view("<u8").reshape(-1, _WORDS)
    zero: npt.NDArray[np.bool_] = (words[:, :: _WORDS // 8] == 0).all(axis=1)  # few pages get past this
    if zero.any():
        maybe = np.flatnonzero(zero)
        zero[maybe] = words[maybe].max(axis=1) == 0
    return zero


class Index:
    """From tags to places, 24 bytes a page: sorted arrays, each at least four times as long as the next."""

    def __init__(self) -> None:
        self._tiers: list[tuple[Words, Words, Places]] = []

    def find(self, tags: Words) -> Places:
        """The place of each tag, or UNKNOWN."""
        low, high = tags[:, 0], tags[:, 1]
        found = np.full(len(tags), UNKNOWN, np.int64)
        for tier_low, tier_high, places in self._tiers:
            at = np.minimum(np.searchsorted(tier_low, low), len(tier_low) - 1)
            hit = (tier_low[at] == low) & (tier_high[at] == high)
            found[hit] = places[at[hit]]
        return found

    def add(self, tags: Words, places: Places) -> None:
        """Remember where pages are."""
        if not len(tags):
            return
        low, high = tags[:, 0], tags[:, 1]
        while self._tiers and len(self._tiers[-1][0]) < _MERGE * len(low):
            tier_low, tier_high, tier_places = self._tiers.pop()
            low, high, places = np.concatenate((tier_low, low)), np.concatenate((tier_high, high)), np.concatenate((tier_places, places))
        order = np.argsort(low)
        self._tiers.append((low[order], high[order], places[order]))

    def __len__(self) -> int:
        return sum(len(low) for low, _, _ in self._tiers)
