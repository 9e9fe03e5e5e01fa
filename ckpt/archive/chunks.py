"""A file's content in chunks, holes told apart, while the file may change or shrink."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final

READ_BYTES: Final = 1 << 20


class ChunkReader:
    """Reads into one buffer, `view`: a chunk is valid until the next one is asked for."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_BYTES))

    def chunks(self, fd: int, size: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """The file in chunks that lie in `view`: offset, length, and where in the file there is data, not a hole."""
        parts = extents(fd, size)
        extent = next(parts, None)
        for at in range(0, size, READ_BYTES):
            length = min(READ_BYTES, size - at)
            pieces: list[tuple[int, int]] = []
            while extent is not None and extent[0] < at + length:
                start, stop = max(extent[0], at), min(extent[1], at + length)
                if start < stop:
                    if not pieces and stop - start < length:
                        self.view[:length] = bytes(length)
                    read = self._read(fd, at, start, stop)
                    if read > start:
                        pieces.append((start, read))
                    if read < stop:  # it became shorter: what is missing reads as zeros over there
                        self.view[read - at : length] = bytes(length - (read - at))
                if extent[1] > at + length:
                    break
                extent = next(parts, None)
            yield at, length, pieces

    def _read(self, fd: int, at: int, start: int, stop: int) -> int:
        """Read [start, stop) of the file; returns how far it came."""
        while start < stop:
            count = os.preadv(fd, [self.view[start - at : stop - at]], start)
            if not count:
                break
            start += count
        return start


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The [start, end) of the parts that hold data. A file system that knows no holes has one."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            start, end = position, size
        if start >= size:
            return
        if end <= start:  # it became shorter in between
            return
        yield start, min(end, size)
        position = end
