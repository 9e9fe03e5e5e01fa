"""The memory's way into the store: from CRIU through our page server into a draft's chunks, while the dump runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ckpt.criu import bindings
from ckpt.criu.pageserver import CHUNK_BYTES, PageTap, header_of
from ckpt.criu.pagestream import PageSink, PageWriter, check_page_size
from ckpt.errors import Bug, DumpFailed, FeatureMissing, TransferFailed
from ckpt.ops import faults

_END_LIMIT_S: Final = 60.0


def possible(criu_version: str) -> bool:
    """Whether pages that this CRIU sends can be made into CRIU images here."""
    try:
        check_page_size()
        header_of(criu_version)
        bindings.load("images.pagemap_pb2")
    except (Bug, FeatureMissing):
        return False
    return True


class PageIntake:
    """Makes CRIU images of what CRIU gives to the page server at `port`: small pagemaps in `images_dir`, the pages in sinks.

    In the block the dump is made; `finish` after it waits until every page is taken. A block that is left by an exception breaks the page
    server's connection, so that CRIU gives up soon.

    Args:
        images_dir: of the dump; it need not be there before CRIU connects.
        sink: makes the place for a pages file ("pages-65537.img").
        on_bytes: called with the bytes of pages taken so far, in a thread of its own.
        timeout_s: for CRIU to come, and to go on.

    Raises:
        OSError: no socket to be had.
    """

    def __init__(
        self, images_dir: Path, criu_version: str, sink: Callable[[str], PageSink], on_bytes: Callable[[int], None], *, timeout_s: float
    ) -> None:
        self._images_dir = images_dir
        self._sink = sink
        self._on_bytes = on_bytes
        self._tap = PageTap(criu_version, timeout_s=timeout_s)
        self._thread = threading.Thread(target=self._take, name="ckpt-pages", daemon=True)
        self._error: BaseException | None = None
        self._told: BaseException | None = None
        """What the tap said, which only follows from the dump."""

    @property
    def port(self) -> int:
        """Where CRIU finds the page server, on the loopback."""
        return self._tap.port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tap.close()
        self._thread.join(_END_LIMIT_S)
        # A sink that took no more (a full disk) is why CRIU's dump failed.
        if isinstance(error, Exception) and self._error is not None and self._error is not self._told:
            raise _explained(self._error) from error

    def break_off(self) -> None:
        """The dump is not wanted any more: CRIU loses its page server and gives up, instead of sending what nobody waits for."""
        self._tap.close()

    def finish(self) -> None:
        """Wait until everything that CRIU gave is taken. Raises what broke."""
        self._thread.join()
        if self._error is not None:
            raise _explained(self._error)

    def _take(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        try:
            count = self._read(buffer)
            with PageWriter(self._images_dir, sink=self._sink) as writer:
                while count:
                    writer.write(buffer[:count])
                    self._on_bytes(writer.pages_bytes)
                    faults.point("pages")
                    count = self._read(buffer)
                writer.finish()
        except BaseException as error:
            self._error = error
        finally:
            self._tap.close()

    def _read(self, buffer: memoryview) -> int:
        try:
            return self._tap.readinto(buffer)
        except (TransferFailed, Bug) as error:
            self._told = error
            raise


def _explained(error: BaseException) -> BaseException:
    """As what became of the dump: nothing was to go to another host."""
    return DumpFailed(error.message, hint=error.hint) if isinstance(error, TransferFailed) else error
