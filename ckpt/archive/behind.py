"""A stream that is written by a thread of its own, so that who makes the data and who takes it need not wait for each other."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

_PIECES: Final = 2
_PIECE_BYTES: Final = 2 << 20
_LEAVE_S: Final = 5.0


class Behind(io.RawIOBase):
    """Takes data and gives it to `put` in a thread; never more than 8 MiB are on their way.

    What `put` raises is raised by the next `write`, or by `finish`. Exactly one of `finish` and `abort` is called.
    """

    def __init__(self, put: Callable[[bytes], object]) -> None:
        self._put = put
        self._queue: queue.Queue[bytes | None] = queue.Queue(_PIECES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="ckpt-behind", daemon=True)
        self._thread.start()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Take all of the data."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        for at in range(0, len(view), _PIECE_BYTES):
            if self._error is not None:
                raise self._error
            self._queue.put(bytes(view[at : at + _PIECE_BYTES]))
        return len(view)

    def finish(self) -> None:
        """Wait until everything was put."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Forget what was not put yet."""
        self._error = self._error or BrokenPipeError("broken off")
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()  # room for the end, also when the thread takes nothing any more
        self._queue.put(None)
        self._thread.join(_LEAVE_S)  # it may hang on a dead link, whose owner ends it

    def _work(self) -> None:
        while (piece := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._put(piece)
                except BaseException as error:  # raised again in the thread that writes
                    self._error = error
