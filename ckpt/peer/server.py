"""The destination's end of the peer protocol: dispatches the source's calls to a table of handlers.

Calls run one after the other in the thread that called `serve`; verbs named in `concurrent` run in threads of their own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Final

from ckpt import config
from ckpt.errors import CkptError, FeatureMissing, TransferFailed, UsageError
from ckpt.events import Event
from ckpt.peer import messages, streams
from ckpt.peer.files import Allow, ReceivedFile, Receiver
from ckpt.peer.frames import Frame, Kind
from ckpt.peer.link import BEAT_S, LINK_TIMEOUT_S, Link
from ckpt.peer.queues import ByteQueue, Closed, Inbox

HELLO_TIMEOUT_S: Final = 30.0
_log = logging.getLogger("ckpt.peer")


class _Shared:
    """What all calls of one link have in common."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.on_lost: Callable[[], None] | None = None
        self.lost = threading.Event()


class Session:
    """What a handler gets: its link with the source, for the time of one call."""

    def __init__(self, link: Link, channel: int, inbox: Inbox, shared: _Shared) -> None:
        self.link = link
        self._channel = channel
        self._inbox = inbox
        self._shared = shared

    @property
    def state(self) -> dict[str, Any]:
        """Kept from call to call of the same link: what `stage` made, `restore` finds."""
        return self._shared.state

    @property
    def source(self) -> str:
        """What the source calls itself."""
        return str(self.link.remote.get("host", ""))

    @property
    def lost(self) -> bool:
        """True once the link has ended; a long handler may look at it and stop early."""
        return self._shared.lost.is_set()

    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Set (None: clear) what runs when the link ends, whether cut, silent or with a goodbye. It runs once, after the last handler ended."""
        self._shared.on_lost = callback

    def emit(self, event: Event) -> None:
        """Send an event to the source; dropped when the link has ended, so usable as an `Emit` everywhere."""
        try:
            self.link.send_json(Kind.EVENT, 0, messages.event_to_json(event))
        except CkptError:
            pass

    def tell(self, value: dict[str, Any]) -> None:
        """Tell the source something within this call (Peer.upload's `on_told`). Raises TransferFailed when the link has ended."""
        self.link.send_json(Kind.EVENT, self._channel, value)

    def receive_files(
        self,
        into: Path,
        *,
        allow: Allow,
        sinks: Mapping[str, BinaryIO] | None = None,
        max_bytes: int | None = None,
        on_bytes: Callable[[int], None] = lambda done: None,
    ) -> list[ReceivedFile]:
        """Receive the files of this call's upload beneath the directory `into` (0600, nothing overwritten), until the source is done.

        Args:
            allow: which relative paths are expected.
            sinks: paths whose content goes into a stream instead, such as the stdin of `podman load`.
            max_bytes: how much may come in all.

        Raises:
            TransferFailed: the link broke, the source gave up, or sent what it must not. Files already whole stay.
            OSError: from writing; ENOSPC becomes a NoSpace at the source when the handler lets it pass.
        """
        receiver = Receiver(into, allow, sinks=sinks, max_bytes=max_bytes, on_bytes=on_bytes)
        try:
            self.link.send_json(Kind.READY, self._channel)
            while True:
                try:
                    frame = self._inbox.get()
                except Closed:
                    raise self.link.failure() from None
                more = receiver.take(frame)
                self.link.pool.give(frame.lease)
                if not more:
                    return receiver.files
        finally:
            receiver.close()


Handler = Callable[[Session, dict[str, Any]], dict[str, Any]]


class _Server:
    def __init__(
        self, inp: int, out: int, handlers: Mapping[str, Handler], concurrent: Collection[str], link_timeout_s: float, beat_s: float
    ) -> None:
        self._handlers = {"streams": streams.open_streams, "joined": streams.joined, **handlers}
        self._concurrent = frozenset(concurrent)
        self._shared = _Shared()
        self._calls: ByteQueue[tuple[int, dict[str, Any]]] = ByteQueue()
        self._inboxes: dict[int, Inbox] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.link = Link(inp, out, on_frame=self._on_frame, on_end=self._on_end, link_timeout_s=link_timeout_s, beat_s=beat_s)

    def run(self, hello_timeout_s: float) -> CkptError | None:
        try:
            if not self.link.handshake(hello_timeout_s):
                return TransferFailed("the link was cut before the hello")
            while True:
                try:
                    call = self._calls.get()
                except Closed:
                    break
                if call is not None:
                    self._handle(*call)
            for thread in self._threads:
                thread.join()
        except CkptError as error:
            return error
        finally:
            callback, self._shared.on_lost = self._shared.on_lost, None
            if callback is not None:
                try:
                    callback()
                except Exception:
                    _log.exception("undoing after the link ended failed")
            self.link.close(goodbye=True)
        return self.link.error

    def stop(self) -> None:
        """End the session as if the link had been cut. Used by signals, so it takes no lock in the interrupted thread."""
        threading.Thread(target=self.link.interrupt, daemon=True).start()

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind is Kind.CALL:
            value = frame.json()
            with self._lock:
                if frame.channel in self._inboxes:
                    raise TransferFailed("the source used a channel twice")
                self._inboxes[frame.channel] = Inbox()
            if value.get("verb") in self._concurrent:
                thread = threading.Thread(target=self._handle, args=(frame.channel, value), name=f"ckpt-{value['verb']}", daemon=True)
                with self._lock:
                    self._threads = [known for known in self._threads if known.is_alive()] + [thread]
                thread.start()
            else:
                self._calls.put((frame.channel, value))
        elif frame.kind in (Kind.FILE, Kind.DATA, Kind.END, Kind.DONE, Kind.ABORT):
            with self._lock:
                inbox = self._inboxes.get(frame.channel)
            # Without one the handler has ended, and what was under way is of no use any more.
            if inbox is not None:
                inbox.put(frame)
        else:
            raise TransferFailed(f"the source sent an unexpected {frame.kind.name} message")

    def _on_end(self, error: CkptError | None) -> None:
        self._shared.lost.set()
        self._calls.close(drop=True)
        with self._lock:
            for inbox in self._inboxes.values():
                inbox.close(drop=error is not None)

    def _handle(self, channel: int, value: dict[str, Any]) -> None:
        with self._lock:
            inbox = self._inboxes[channel]
        session = Session(self.link, channel, inbox, self._shared)
        kind, answer = Kind.RESULT, {}
        try:
            handler = self._handlers.get(str(value.get("verb")))
            args = value.get("args")
            if handler is None or not isinstance(args, dict):
                raise FeatureMissing(f"ckpt here does not know {value.get('verb')!r}", hint="install the same version of ckpt on both hosts")
            answer = handler(session, args)
        except Exception as error:
            if not isinstance(error, CkptError | OSError):
                _log.exception("handler %s failed", value.get("verb"))
            kind, answer = Kind.ERROR, messages.error_to_json(error)
        finally:
            inbox.close(drop=True)
            with self._lock:
                self._inboxes.pop(channel, None)
        try:
            self.link.send_json(kind, channel, answer)
        except CkptError:
            pass  # nobody listens any more: on_lost does what is to be done


def serve(
    inp: int,
    out: int,
    handlers: Mapping[str, Handler],
    *,
    concurrent: Collection[str] = (),
    link_timeout_s: float = LINK_TIMEOUT_S,
    beat_s: float = BEAT_S,
    hello_timeout_s: float = HELLO_TIMEOUT_S,
) -> CkptError | None:
    """Serve one source until the link ends.

    Args:
        inp, out: descriptors, taken over.
        handlers: verb -> handler; what a handler raises is raised again at the source.
        concurrent: verbs that may run beside others (they take care of themselves).

    Returns:
        None after the source's goodbye, else why the link ended (already dealt with: on_lost was called).
    """
    return _Server(inp, out, handlers, concurrent, link_timeout_s, beat_s).run(hello_timeout_s)


def main(handlers: Mapping[str, Handler], *, concurrent: Collection[str] = ()) -> int:
    """The body of `ckpt peer`: serve on stdin and stdout; returns the exit code.

    Afterwards stdin is empty and stdout is stderr, for this process and its children: only frames go out. SIGTERM, SIGHUP and SIGINT
    end the session as a cut link would, so that what hangs on it is undone.
    """
    if os.isatty(0) or os.isatty(1):
        raise UsageError("`ckpt peer` is started by ckpt on another host", hint="see ckpt migrate")
    inp, out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdout.flush()
    os.dup2(2, 1)
    server = _Server(inp, out, handlers, concurrent, config.load().link_timeout_s, BEAT_S)

    def stop(number: int, frame: FrameType | None) -> None:
        server.stop()

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    error = server.run(HELLO_TIMEOUT_S)
    return error.exit_code if error is not None else 0
