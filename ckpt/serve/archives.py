"""Between the server and the store: a checkpoint as a stream of archive bytes, an archive that was uploaded into the store."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from ckpt import __version__
from ckpt.archive import seal, trust, writer
from ckpt.archive.members import Members
from ckpt.events import Event, Notice
from ckpt.model import Checkpoint
from ckpt.ops import import_
from ckpt.store.catalog import Catalog
from ckpt.transports.base import Location

COMPRESSIONS: Final = ("none", "zstd", "gzip")
_PIPE_BYTES: Final = 1 << 20
_log = logging.getLogger("ckpt.serve")


def _tell(event: Event) -> None:
    if isinstance(event, Notice):
        # Parts of it may be the archive's own words.
        _log.info("%s", "".join(c if c.isprintable() else "?" for c in event.text))


def take_in(archive: Path, name: str | None, store: Path, incoming: trust.Incoming) -> str:
    """Import an uploaded archive, by the same rules as `ckpt import`; returns the checkpoint's name in the store.

    Args:
        incoming: what opens it when it is encrypted, and whose signature it must have.

    Raises:
        CkptError: as ops.import_; the store is as before.
    """
    outcome = import_.import_(Location.parse(str(archive)), name=name, incoming=incoming, store_root=store, emit=_tell)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.checkpoint is not None
    return outcome.checkpoint.ref


def listing(store: Path) -> list[dict[str, Any]]:
    """The checkpoints that can be downloaded, as JSON."""
    return [
        {
            "ref": checkpoint.ref,
            "id": checkpoint.manifest.id,
            "name": checkpoint.manifest.name,
            "generation": checkpoint.manifest.generation,
            "created_s": checkpoint.manifest.created_s,
            "size_bytes": checkpoint.manifest.size_bytes,
            "etag": etag(checkpoint, "none"),
        }
        for checkpoint in Catalog(store).all()
    ]


def etag(checkpoint: Checkpoint, compress: str) -> str:
    """Strong: the same checkpoint, written by the same version of ckpt without compression, is the same bytes."""
    text = f"{checkpoint.manifest.id} {checkpoint.ref} {compress} {__version__}"
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


class _Nothing:
    """Takes everything."""

    def write(self, data: bytes | memoryview) -> int:
        return len(data)

    def flush(self) -> None:
        pass


class _Hollow:
    """Members without content, to see how long an archive of them is."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self.names = members.names
        self.size_bytes = members.size_bytes
        self.mtime_s = members.mtime_s

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        yield cast(BinaryIO, self)

    def readinto(self, buffer: memoryview) -> int:
        return len(buffer)


class Archive:
    """A checkpoint of the store as an archive. It cannot be removed until `close`. Blocks; raises CkptError and OSError.

    Args:
        compress: None: as fits. Without compression, encryption and signature the size is known and any part can be had.
        outgoing: whom it is encrypted to, and who signs it.
    """

    def __init__(self, store: Path, ref: str, compress: str | None, outgoing: trust.Outgoing = trust.OPEN) -> None:
        catalog = Catalog(store)
        self.checkpoint = catalog.find(ref)
        self._outgoing = outgoing
        # Every encryption differs, and signatures of some kinds of keys do.
        self._same = outgoing.sign_key is None and not outgoing.recipients and compress in (None, "none")
        self._compress = cast(writer.Compression, compress or ("none" if self._same else "zstd"))
        self._held = ExitStack()
        self._held.enter_context(catalog.lease(self.checkpoint))
        try:
            members, _ = self._held.enter_context(catalog.outgoing(self.checkpoint))
            self._members = outgoing.signed(members)
        except BaseException:
            self._held.close()
            raise
        self._fd = -1
        self._thread: threading.Thread | None = None
        self._skip = 0
        self.error: BaseException | None = None
        """What ended the stream before its end."""

    @property
    def etag(self) -> str | None:
        """None when no two streams are the same."""
        return etag(self.checkpoint, self._compress) if self._same else None

    def size_bytes(self) -> int | None:
        """The archive's size; None when only its end tells."""
        if not self._same:
            return None
        return writer.write(cast(Members, _Hollow(self._members)), cast(BinaryIO, _Nothing()), compress="none")

    def start(self, skip_bytes: int = 0) -> None:
        """Begin to write, but for the first bytes."""
        self._fd, write_fd = os.pipe2(os.O_CLOEXEC)
        with suppress(OSError):
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._skip = skip_bytes
        self._thread = threading.Thread(target=self._write, args=(write_fd,), name="ckpt-download", daemon=True)
        self._thread.start()

    def read(self) -> bytes:
        """The next bytes; empty at the end, or after an `error`."""
        return os.read(self._fd, _PIPE_BYTES)

    def close(self) -> None:
        """Give everything back, also in the middle."""
        if self._fd >= 0:
            os.close(self._fd)  # the writer ends with a broken pipe
            self._fd = -1
        if self._thread is not None:
            self._thread.join()
        self._held.close()

    def _write(self, fd: int) -> None:
        try:
            with os.fdopen(fd, "wb", buffering=0) as out:
                rest = cast(BinaryIO, _Later(out, self._skip))
                with seal.encrypting(rest, self._outgoing.recipients) as stream:
                    writer.write(self._members, stream, compress=self._compress)
        except BaseException as error:
            self.error = error


class _Later:
    """Passes on what comes after the first bytes."""

    def __init__(self, out: BinaryIO, skip_bytes: int) -> None:
        self._out = out
        self._skip = skip_bytes

    def write(self, data: bytes | memoryview) -> int:
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        return skipped + (self._out.write(memoryview(data)[skipped:]) if skipped < len(data) else 0)

    def flush(self) -> None:
        self._out.flush()
