"""Uploads on their way: one directory each, `uploads/ID/` of the store (0700) with `data` and `state.json` (0600).

The length of `data` is the offset: what a `kill -9` leaves of it counts. An upload becomes a checkpoint by an import of `data`, and its
bytes go; what it became is kept for a while, since the answer may have been lost. Nobody touches it for EXPIRE_S: it goes.
The archive waits in this one place because an archive is verified from its beginning to its end, and an upload may take several days.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckpt.errors import BusyError, NoSpace, RemoteRefused
from ckpt.store import durable

if TYPE_CHECKING:
    from hashlib import _Hash

EXPIRE_S: Final = 86400.0
ANSWER_S: Final = 3600.0
"""How long the outcome of a finished upload can be asked for."""
SPARE_BYTES: Final = 64 << 20
"""So much of the disk is left to others."""
MAX_UPLOADS: Final = 64
_ID: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_HASH_BYTES: Final = 1 << 20


class TooLarge(RemoteRefused):
    """More bytes than this server takes."""

    slug = "too-large"


@dataclass(slots=True)
class Upload:
    """One upload. `lock` is held by the one request that may change it."""

    id: str
    directory: Path
    name: str | None
    owner: str
    """Whose it is: a token's or a certificate's id. Nobody else sees it."""
    length_bytes: int | None
    offset: int = 0
    result: dict[str, Any] | None = None
    """What it became: {"ref": ...}; or the error that it ended with."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    turn: int = 0
    """Counts the requests that wanted to."""
    connection: asyncio.BaseTransport | None = None
    """Of the request that has the lock."""
    finishing: asyncio.Task[dict[str, Any]] | None = None
    touched_s: float = field(default_factory=time.time)
    _fd: int = -1
    _digest: _Hash | None = None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def open(self) -> None:
        """Make ready to append. Blocks: it may have to read what is there. Raises OSError."""
        if self._fd < 0:
            fd = os.open(self.data, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._digest, self.offset = hashlib.sha256(), 0
                while piece := os.pread(fd, _HASH_BYTES, self.offset):
                    self._digest.update(piece)
                    self.offset += len(piece)
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd

    def append(self, pieces: list[bytes]) -> None:
        """Add bytes at the end: all of them or none. Blocks. Raises OSError."""
        assert self._digest is not None
        start = self.offset
        at = start
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    count = os.pwrite(self._fd, view, at)
                    at += count
                    view = view[count:]
        except OSError:
            os.ftruncate(self._fd, start)
            raise
        for piece in pieces:
            self._digest.update(piece)
        self.offset = at

    def digest(self) -> bytes:
        """SHA-256 of all that is there."""
        assert self._digest is not None
        return self._digest.digest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._digest = -1, None

    def remove(self) -> None:
        """All its bytes. Blocks. Never raises."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def save(self) -> None:
        """Bring what is known about it to the disk. Raises OSError."""
        value = {"name": self.name, "owner": self.owner, "length_bytes": self.length_bytes, "result": self.result}
        durable.write_file(self.directory / "state.json", json.dumps(value).encode())


class Uploads:
    """The uploads of a store. One server at a time has them.

    Args:
        root: the store's directory.
        max_bytes: of one upload; quota_bytes: of all that wait together (None: as the disk allows).
    """

    def __init__(self, root: Path, *, max_bytes: int | None = None, quota_bytes: int | None = None) -> None:
        self.directory = root / "uploads"
        self.max_bytes = max_bytes
        self.quota_bytes = quota_bytes
        self._known: dict[str, Upload] = {}
        self._lock = -1

    def __enter__(self) -> Uploads:
        """Take the directory over, with what an earlier server left in it.

        Raises:
            BusyError: another server has it.
            OSError: it cannot be written.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BusyError(f"another ckpt serve has {self.directory.parent}", hint="end it, or give this one another --store") from None
        self._lock = lock
        for path in self.directory.iterdir():
            upload = _read(path) if path.is_dir() and not path.is_symlink() else None
            if upload is None:
                shutil.rmtree(path, ignore_errors=True)
            else:
                self._known[upload.id] = upload
        return self

    def __exit__(self, *_: object) -> None:
        for upload in self._known.values():
            upload.close()
        os.close(self._lock)

    def begin(self, name: str | None, owner: str, length_bytes: int | None) -> Upload:
        """A new, empty upload.

        Raises:
            TooLarge, NoSpace, BusyError: it is not taken; nothing was made.
        """
        if self.max_bytes is not None and (length_bytes or 0) > self.max_bytes:
            raise TooLarge(f"{length_bytes} bytes are more than the {self.max_bytes} that are taken here")
        if len(self.under_way()) >= MAX_UPLOADS:
            raise BusyError("too many uploads are under way", hint="come again later")
        self.room_for(length_bytes or 1)
        identity = secrets.token_urlsafe(32)
        upload = Upload(identity, self.directory / identity, name, owner, length_bytes)
        upload.directory.mkdir(mode=0o700)
        try:
            upload.open()
            upload.save()
        except BaseException:
            upload.close()
            shutil.rmtree(upload.directory, ignore_errors=True)
            raise
        self._known[identity] = upload
        return upload

    def find(self, identity: str, owner: str) -> Upload | None:
        """An upload of this owner."""
        upload = self._known.get(identity)
        if upload is None or not secrets.compare_digest(upload.owner.encode(), owner.encode()):
            return None
        upload.touched_s = time.time()
        return upload

    def under_way(self) -> list[Upload]:
        """Those without an outcome."""
        return [upload for upload in list(self._known.values()) if upload.result is None]

    def room_for(self, more_bytes: int, upload: Upload | None = None) -> None:
        """Whether so much more may come.

        Raises:
            TooLarge: for this upload; NoSpace: for all together, or for the disk.
        """
        if upload is not None:
            end = upload.offset + more_bytes
            if self.max_bytes is not None and end > self.max_bytes:
                raise TooLarge(f"this is more than the {self.max_bytes} bytes that are taken here")
            if upload.length_bytes is not None and end > upload.length_bytes:
                raise TooLarge(f"this is more than the {upload.length_bytes} bytes that were announced")
        if self.quota_bytes is not None and sum(one.offset for one in self.under_way()) + more_bytes > self.quota_bytes:
            raise NoSpace("what waits here is as much as may wait", hint="come again later")
        disk = os.statvfs(self.directory)
        if disk.f_bavail * disk.f_frsize < more_bytes + min(SPARE_BYTES, disk.f_blocks * disk.f_frsize // 16):
            raise NoSpace("no space left on the server")

    def finished(self, upload: Upload, result: dict[str, Any]) -> None:
        """Keep what it became, not its bytes. Raises OSError: then it is only known while this server runs."""
        upload.result = result
        upload.close()
        upload.data.unlink(missing_ok=True)
        upload.touched_s = time.time()
        upload.save()

    def forget(self, upload: Upload) -> None:
        """Nobody finds it any more; its bytes go with `Upload.remove`."""
        self._known.pop(upload.id, None)

    def stale(self, now_s: float | None = None) -> list[Upload]:
        """Forget those that nobody touched for long; returns them, to be removed. In the thread that also finds them."""
        now = time.time() if now_s is None else now_s
        old = [
            upload
            for upload in self._known.values()
            if not upload.lock.locked() and upload.finishing is None and now - upload.touched_s > (EXPIRE_S if upload.result is None else ANSWER_S)
        ]
        for upload in old:
            self.forget(upload)
        return old


def _read(directory: Path) -> Upload | None:
    """An upload of an earlier server; None when it is none, or was being removed."""
    try:
        value = json.loads((directory / "state.json").read_bytes())
        name, length = value["name"], value["length_bytes"]
        result = value["result"]
        if not _ID.fullmatch(directory.name) or not (name is None or isinstance(name, str)) or not (length is None or isinstance(length, int)):
            return None
        upload = Upload(directory.name, directory, name, str(value["owner"]), length, result=result if isinstance(result, dict) else None)
        upload.touched_s = directory.stat().st_mtime
        if upload.result is None:
            upload.offset = upload.data.stat().st_size
            upload.touched_s = max(upload.touched_s, upload.data.stat().st_mtime)
        return upload
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_full(error: BaseException) -> bool:
    """Whether the disk (or a quota) is full."""
    return isinstance(error, NoSpace) or isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
