"""The memory's way to the destination: from CRIU through our page server onto the link, while the dump runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from ckpt.criu.digests import DigestTable
from ckpt.criu.pageserver import PageTap
from ckpt.errors import CkptError, TransferFailed
from ckpt.peer.client import Peer, Upload

MEMBER: Final = "pages"
VERB: Final = "pages"
_END_LIMIT_S: Final = 60.0


class PageRelay:
    """Sends what CRIU gives to the page server at `port`; the destination makes CRIU images of it.

    In the block the dump is made; `finish` after it waits until the destination has every page. A block that is left by an exception
    breaks the page server's connection, so that CRIU gives up soon, and the upload.

    Args:
        on_bytes: called with the bytes sent so far, in a thread of its own.
        timeout_s: for CRIU to come, and to go on.
        known: digests of the pages that the destination has already, in its images number `images` (see precopy): they are not sent.
    """

    def __init__(
        self,
        peer: Peer,
        criu_version: str,
        on_bytes: Callable[[int], None],
        *,
        timeout_s: float,
        known: DigestTable | None = None,
        images: int | None = None,
    ) -> None:
        self._upload: Upload = peer.upload(VERB, {"parent": images})
        self._tap = PageTap(criu_version, timeout_s=timeout_s, compare=known.compare if known else None)
        self._source = _Source(self._tap)
        self._on_bytes = on_bytes
        self._thread = threading.Thread(target=self._relay, name="ckpt-pages", daemon=True)
        self._error: BaseException | None = None
        self.sent_bytes = 0

    @property
    def port(self) -> int:
        """Where CRIU finds the page server, on the loopback."""
        return self._tap.port

    def __enter__(self) -> Self:
        try:
            self._upload.__enter__()
        except BaseException:
            self._tap.close()
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tap.close()
        self._thread.join(_END_LIMIT_S)
        # What broke on the way, or over there, is why CRIU's dump failed; what the tap itself says only follows from the dump.
        if isinstance(error, CkptError) and self._error is not None and self._error is not self._source.error:
            raise self._error from error

    def break_off(self) -> None:
        """The dump is not wanted any more: CRIU loses its page server and gives up, instead of sending what nobody waits for."""
        self._tap.close()

    def finish(self) -> None:
        """Wait until everything that CRIU gave is there. Raises what broke."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _relay(self) -> None:
        try:
            with ExitStack() as stack:
                stack.push(self._upload)  # entered already, so that a refusal comes before anything is frozen
                self._upload.send_stream(MEMBER, self._source, on_bytes=self._count, digest=False)
        except BaseException as error:
            self._error = error
        finally:
            self._tap.close()

    def _count(self, done: int) -> None:
        self._on_bytes(done)
        self.sent_bytes = done


class _Source:
    """The tap, with its error kept apart from those of the link."""

    def __init__(self, tap: PageTap) -> None:
        self._tap = tap
        self.error: BaseException | None = None

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            return self._tap.readinto(buffer)
        except OSError as error:
            self.error = TransferFailed(f"the page server lost CRIU: {error.strerror}")
            raise self.error from error
        except CkptError as error:
            self.error = error
            raise
