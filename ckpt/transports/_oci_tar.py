"""The digest of a layer's tar (its `diff_id`), made from the packed bytes while they go by."""

from __future__ import annotations

import hashlib
import os
import threading

from ckpt.archive.codec import open_stream
from ckpt.archive.layout import CHUNK_BYTES
from ckpt.errors import CkptError, TransferFailed


class TarDigest:
    """Unpacks what is written to it in a thread of its own, through a pipe: bounded memory, however well it was packed."""

    def __init__(self) -> None:
        read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC)
        self._digest = hashlib.sha256()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(read_fd,), name="ckpt-diff-id", daemon=True)
        self._thread.start()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next packed bytes. Raises CkptError when they cannot be unpacked."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._write_fd, view) :]
        except BrokenPipeError:
            self.finish()
            raise TransferFailed("the archive could not be unpacked again for its digest") from None

    def finish(self) -> str:
        """All was written: "sha256:HEX" of the tar."""
        self.close()
        if self._error is not None:
            raise self._error
        return f"sha256:{self._digest.hexdigest()}"

    def close(self) -> None:
        """No more of it."""
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1
        self._thread.join()

    def _run(self, fd: int) -> None:
        try:
            with os.fdopen(fd, "rb", buffering=CHUNK_BYTES) as source:
                stream = open_stream(source)
                while data := stream.read(CHUNK_BYTES):
                    self._digest.update(data)
        except (CkptError, OSError) as error:
            self._error = error
