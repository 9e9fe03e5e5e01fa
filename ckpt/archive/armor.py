"""The armored form of an age file (C2SP, age.md): Base64 between two lines, for mail and chat."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from ckpt.archive.age import CHUNK_BYTES, COLUMNS, MAX_LINE, Buffered, Source, damaged

BEGIN: Final = b"-----BEGIN AGE ENCRYPTED FILE-----"
END: Final = b"-----END AGE ENCRYPTED FILE-----"


class Dearmored:
    """The bytes in an armored (PEM-like) age file."""

    def __init__(self, source: Source) -> None:
        self._source = Buffered(source)
        self._began = False
        self._ended = False

    def read(self, size: int = CHUNK_BYTES, /) -> bytes:
        """At least one byte, at most `size` rounded up to a line. Raises DigestMismatch for what is no armor."""
        if not self._began:
            self._began = True
            if self._source.line().rstrip(b"\r") != BEGIN:
                raise damaged("altered: its armor makes no sense")
        parts: list[bytes] = []
        while not self._ended and size > 0:
            line = self._source.line().rstrip(b"\r")
            if line == END:
                self._finish()
                break
            try:
                data = base64.b64decode(line, validate=True)
            except (ValueError, binascii.Error):
                data = b""
            if not data or len(line) > COLUMNS:
                raise damaged("altered: its armor makes no sense")
            if len(line) < COLUMNS or line.endswith(b"="):
                if self._source.line().rstrip(b"\r") != END:
                    raise damaged("altered: its armor makes no sense")
                self._finish()
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def _finish(self) -> None:
        self._ended = True
        while rest := self._source.take(MAX_LINE):
            if rest.strip():
                raise damaged("altered: it goes on after its end")
