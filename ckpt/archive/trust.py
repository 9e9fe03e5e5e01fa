"""What protects a checkpoint on its way out, and what one that comes in must prove."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, cast

from ckpt.archive import signature
from ckpt.archive.age import Identity, Recipient
from ckpt.archive.layout import MANIFEST, SIGNATURE
from ckpt.archive.members import Members


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What an archive gets on its way out."""

    recipients: tuple[Recipient, ...] = ()
    """Whom it is encrypted to; () for nobody."""
    sign_key: Path | None = None

    def try_key(self) -> None:
        """Raise KeyProblem when nothing can be signed: before anything is frozen."""
        if self.sign_key is not None:
            signature.try_key(self.sign_key)

    def signer(self) -> Callable[[bytes], bytes] | None:
        """What signs a manifest; None when nothing is to be signed."""
        return partial(signature.sign, key=self.sign_key) if self.sign_key is not None else None

    def signed(self, members: Members) -> Members:
        """The members with a signature over their manifest; a signature that was there stays when there is no key."""
        if self.sign_key is None:
            return members
        with members.open(MANIFEST) as file:
            data = file.read()
        return WithSignature(members, signature.sign(data, self.sign_key))


@dataclass(frozen=True, slots=True)
class Incoming:
    """What opens an archive that comes in, and what it must prove."""

    identities: tuple[Identity, ...] = ()
    demand: signature.Demand | None = None

    def judge(self, manifest: bytes, given: bytes | None) -> str | None:
        """Who signed it; None when nobody, or when nobody asks. Raises DigestMismatch, KeyProblem."""
        return None if self.demand is None else signature.check(manifest, given, self.demand)

    def asks(self, *, foreign: bool) -> bool:
        """Whether a signature matters, for what came from outside or is of this host."""
        return self.demand is not None and (foreign or self.demand.local)

    def judge_stage(self, stage: Path, *, foreign: bool = True) -> str | None:
        """`judge` for a checkpoint whose small members are plain files: of a store, or unpacked.

        Args:
            foreign: it came from outside; what this host made itself is only asked when the demand says so.
        """
        if not self.asks(foreign=foreign):
            return None
        path = stage / SIGNATURE
        given = path.read_bytes()[: signature.MAX_BYTES + 1] if path.is_file() else None
        return self.judge((stage / MANIFEST).read_bytes(), given)


OPEN: Final = Outgoing()
ANYBODY: Final = Incoming()


class WithSignature:
    """Members with a signature beside (or in the place of) their own."""

    def __init__(self, members: Members, data: bytes) -> None:
        self._members = members
        self._data = data

    def names(self) -> list[str]:
        """The signature follows the manifest."""
        found = [name for name in self._members.names() if name != SIGNATURE]
        found.insert(found.index(MANIFEST) + 1, SIGNATURE)
        return found

    def size_bytes(self, name: str) -> int:
        """The size of a member."""
        return len(self._data) if name == SIGNATURE else self._members.size_bytes(name)

    def mtime_s(self, name: str) -> float:
        """Of the signature it is the manifest's."""
        return self._members.mtime_s(MANIFEST if name == SIGNATURE else name)

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A member from its beginning."""
        return cast(BinaryIO, io.BytesIO(self._data)) if name == SIGNATURE else self._members.open(name)
