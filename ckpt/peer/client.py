"""The source's end of the peer protocol: one ssh to the destination, calls and files over it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from ckpt import config
from ckpt.errors import CannotConnect, CkptError, TransferFailed, UsageError
from ckpt.events import Emit, ignore
from ckpt.model import Carriage
from ckpt.peer import files, inherited, messages, ssh_below, streams
from ckpt.peer.frames import Buffer, Frame, Kind
from ckpt.peer.link import BEAT_S, LINK_TIMEOUT_S, Link
from ckpt.peer.ssh_below import SshBelow
from ckpt.peer.wires import Wire
from ckpt.transports import https_peer, ssh, ssh_cipher

CALL_TIMEOUT_S: Final = 60.0
UPLOAD_TIMEOUT_S: Final = 300.0
_GIVE_UP_S: Final = 10.0
_SIGNAL_S: Final = 0.5
_LEAVE_S: Final = 5.0


class _Pending:
    """A call that has no answer yet."""

    def __init__(self) -> None:
        self.ready = False
        self.done = False
        self.result: dict[str, Any] = {}
        self.error: CkptError | None = None
        self.on_told: Callable[[dict[str, Any]], None] | None = None


class Peer:
    """A connected `ckpt peer`. Calls may come from several threads.

    Args:
        inp, out: descriptors or wires, taken over.
        name: what people call the other side, for messages.
        explain: makes the error for a broken link.
        on_event: gets the other side's events; called in the reader thread, so it must be quick.
        carriage: how file content is carried: limit of the rate, compression.
    """

    def __init__(
        self,
        inp: int | Wire,
        out: int | Wire,
        *,
        name: str = "the other side",
        explain: Callable[[CkptError], CkptError] = lambda cause: cause,
        on_event: Emit = ignore,
        carriage: Carriage | None = None,
        link_timeout_s: float = LINK_TIMEOUT_S,
        beat_s: float = BEAT_S,
    ) -> None:
        self.name = name
        self.on_event = on_event
        self.link = Link(
            inp,
            out,
            on_frame=self._on_frame,
            on_end=self._on_end,
            explain=explain,
            link_timeout_s=link_timeout_s,
            beat_s=beat_s,
            carriage=carriage,
        )
        self._pending: dict[int, _Pending] = {}
        self._changed = threading.Condition()
        self._channel = 0
        self._ended = False

    @property
    def hostname(self) -> str:
        """What the other host calls itself."""
        return str(self.link.remote.get("host") or self.name)

    @property
    def version(self) -> str:
        """The version of ckpt on the other host."""
        return str(self.link.remote.get("ckpt", ""))

    @property
    def sent_bytes(self) -> int:
        """Bytes that went to the link so far (after compression, with framing)."""
        return self.link.sent_bytes

    def statistics(self) -> dict[str, float | int | str]:
        """What was sent so far: in all, by kind before and after compression, and what compression left of it."""
        return self.link.statistics()

    def call(self, verb: str, args: dict[str, Any] | None = None, *, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """Run a verb on the other side and return its answer.

        Raises:
            CkptError: the class, message, where, hint and log that the handler raised there.
            TransferFailed: the link broke, or no answer came within `timeout_s` (the handler may still run).
        """
        channel, pending = self._begin(verb, args)
        return self._result(verb, channel, pending, timeout_s)

    def upload(
        self,
        verb: str = "stage",
        args: dict[str, Any] | None = None,
        *,
        timeout_s: float = UPLOAD_TIMEOUT_S,
        on_told: Callable[[dict[str, Any]], None] | None = None,
        kind: str | None = None,
    ) -> Upload:
        """A call whose handler receives files: `with peer.upload("stage", {...}) as up: up.send_stage(...)`, then `up.result`.

        Args:
            timeout_s: for the handler to be ready, and again from the last file to its answer; not for the files between.
            on_told: gets what the handler tells meanwhile (Session.tell); called in the reader thread, so it must be quick.
            kind: what its content counts as in `statistics` (None: the verb).
        """
        return Upload(self, verb, args, timeout_s, kind or verb, on_told)

    def send_stage(
        self,
        stage: Path,
        members: Iterable[str],
        *,
        on_bytes: Callable[[int], None] = lambda done: None,
        verb: str = "stage",
        args: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One upload of files beneath `stage` (see Upload.send_stage); returns the handler's answer."""
        with self.upload(verb, args) as up:
            up.send_stage(stage, members, on_bytes=on_bytes)
        return up.result

    def send_stream(
        self,
        path: str,
        stream: BinaryIO,
        *,
        on_bytes: Callable[[int], None] = lambda done: None,
        verb: str = "stage",
        args: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One upload of what a pipe brings, as the file `path`; returns the handler's answer."""
        with self.upload(verb, args) as up:
            up.send_stream(path, stream, on_bytes=on_bytes)
        return up.result

    def close(self, *, goodbye: bool = True) -> None:
        """End the link; without `goodbye` the other side takes it as lost. Never raises."""
        self.link.close(goodbye=goodbye)

    def _begin(self, verb: str, args: dict[str, Any] | None, on_told: Callable[[dict[str, Any]], None] | None = None) -> tuple[int, _Pending]:
        pending = _Pending()
        pending.on_told = on_told
        with self._changed:
            if self._ended:
                raise self.link.failure()
            while True:
                self._channel = self._channel % 0xFFFF + 1
                if self._channel not in self._pending:
                    break
            channel = self._channel
            self._pending[channel] = pending
        self.link.send_json(Kind.CALL, channel, {"verb": verb, "args": args or {}})
        return channel, pending

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        end_s = time.monotonic() + timeout_s
        with self._changed:
            # In short steps: a signal that comes just before Python begins to wait is seen only when it wakes up.
            while not (condition() or self._ended) and (left_s := end_s - time.monotonic()) > 0:
                self._changed.wait(min(left_s, _SIGNAL_S))
            return condition()

    def _result(self, verb: str, channel: int, pending: _Pending, timeout_s: float) -> dict[str, Any]:
        if not self._wait(lambda: pending.done, timeout_s):
            if self._ended:
                raise self.link.failure()
            # The channel stays taken: a late answer must not be taken for another call's.
            raise TransferFailed(f"{self.name} did not answer {verb!r} within {timeout_s:g} s")
        with self._changed:
            self._pending.pop(channel, None)
        if pending.error is not None:
            raise messages.again(pending.error) from pending.error
        return pending.result

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind is Kind.EVENT and frame.channel:
            with self._changed:
                asking = self._pending.get(frame.channel)
            if asking is None or asking.on_told is None:
                raise TransferFailed(f"{self.name} sent an unexpected {frame.kind.name} message")
            asking.on_told(frame.json())
            return
        if frame.kind is Kind.EVENT:
            event = messages.event_from_json(frame.json())
            if event is not None:
                self.on_event(event)
            return
        if frame.kind not in (Kind.READY, Kind.RESULT, Kind.ERROR):
            raise TransferFailed(f"{self.name} sent an unexpected {frame.kind.name} message")
        value = frame.json()
        with self._changed:
            pending = self._pending.get(frame.channel)
            if pending is None or pending.done:
                raise TransferFailed(f"{self.name} answered a question that was not asked")
            if frame.kind is Kind.READY:
                pending.ready = True
            else:
                pending.done = True
                if frame.kind is Kind.RESULT:
                    pending.result = value
                else:
                    pending.error = messages.error_from_json(value)
            self._changed.notify_all()

    def _on_end(self, error: CkptError | None) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Upload:
    """An open upload; see Peer.upload. The other side's refusal (no space, unexpected path) is raised by the next send."""

    def __init__(
        self,
        peer: Peer,
        verb: str,
        args: dict[str, Any] | None,
        timeout_s: float,
        kind: str,
        on_told: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._peer = peer
        self._kind = kind
        self._on_told = on_told
        self._verb = verb
        self._args = args
        self._timeout_s = timeout_s
        self._channel = 0
        self._pending = _Pending()
        self.done_bytes = 0
        """Bytes of content passed so far, holes included."""
        self.digests: dict[str, str] = {}
        """Path -> sha256 in hex, of what was sent."""
        self.result: dict[str, Any] = {}
        """The handler's answer, after the block."""

    def __enter__(self) -> Self:
        self._channel, self._pending = self._peer._begin(self._verb, self._args, self._on_told)
        if not self._peer._wait(lambda: self._pending.ready or self._pending.done, self._timeout_s):
            self._give_up("it was not ready in time", 0)
            raise self._peer.link.failure() if self._peer._ended else TransferFailed(f"{self._peer.name} was not ready within {self._timeout_s:g} s")
        if not self._pending.ready:
            self._refused()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._control(Kind.DONE, {})
            self.result = self._peer._result(self._verb, self._channel, self._pending, self._timeout_s)
            return
        self._give_up(str(error)[:500], _GIVE_UP_S)

    def _give_up(self, why: str, patience_s: float) -> None:
        """Tell the handler, and give it a moment to clean up, so that what is called next does not meet it at work."""
        if self._peer._ended or self._pending.done:
            return
        try:
            self._peer.link.send_json(Kind.ABORT, self._channel, {"message": why})
        except CkptError:
            return
        self._peer._wait(lambda: self._pending.done, patience_s)

    def send_stage(self, stage: Path, members: Iterable[str], *, on_bytes: Callable[[int], None] = lambda done: None) -> None:
        """Send files beneath `stage`; a directory among the members means every file in it.

        Args:
            members: relative paths; may be a generator that yields files as they become complete.
            on_bytes: called with the bytes of content passed so far in this upload, holes included.

        Raises:
            TransferFailed: a member cannot be read, or the link broke.
            CkptError: what the other side raised while it received.
        """
        for member in files.walk(stage, members):
            self.digests[member] = files.send_file(_Channel(self), stage, member, on_bytes=self._counter(on_bytes))

    def send_stream(
        self, path: str, stream: files.Readable | BinaryIO, *, on_bytes: Callable[[int], None] = lambda done: None, digest: bool = True
    ) -> None:
        """Send what a pipe brings as the file `path`. The caller checks afterwards that the pipe's writer ended well."""
        self.digests[path] = files.send_stream(_Channel(self), path, stream, on_bytes=self._counter(on_bytes), digest=digest)

    @property
    def carrier(self) -> files.Carrier:
        """For a sender that makes its own pieces."""
        return _Channel(self)

    @property
    def over(self) -> bool:
        """The handler has answered already, or the link has ended: nothing more can be sent."""
        return self._pending.done or self._peer._ended

    def _counter(self, on_bytes: Callable[[int], None]) -> Callable[[int], None]:
        def count(more_bytes: int) -> None:
            self.done_bytes += more_bytes
            on_bytes(self.done_bytes)

        return count

    def _control(self, kind: Kind, value: dict[str, Any]) -> None:
        self._refused()
        self._peer.link.send_json(kind, self._channel, value)

    def _refused(self) -> None:
        if self._pending.done:
            self._peer._result(self._verb, self._channel, self._pending, 0)
            raise TransferFailed(f"{self._peer.name} ended {self._verb!r} before all files were there")


class _Channel:
    """The sender's view of an upload."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    def control(self, kind: Kind, value: dict[str, Any]) -> None:
        self._upload._control(kind, value)

    def buffer(self) -> bytearray:
        return self._upload._peer.link.pool.take()

    def data(self, offset: int, data: Buffer, lease: bytearray) -> None:
        self._upload._refused()
        self._upload._peer.link.send_data(self._upload._channel, offset, data, lease=lease, label=self._upload._kind)


def parse(destination: str) -> ssh.Destination | https_peer.Server | str:
    """What `connect` understands. Raises UsageError for anything else."""
    if destination == inherited.DESTINATION:
        return destination
    return https_peer.Server.parse(destination) if https_peer.is_https(destination) else ssh.Destination.parse(destination)


@contextmanager
def connect(
    destination: str,
    *,
    ssh_options: Sequence[str] = (),
    access: https_peer.Access | None = None,
    purpose: str = "migrate",
    timeout_s: float = 20.0,
    link_timeout_s: float | None = None,
    carriage: Carriage | None = None,
    on_event: Emit = ignore,
    command: Sequence[str] = ("ckpt", "peer"),
) -> Iterator[Peer]:
    """Connect to `ckpt peer` on the destination. Leaving the block by an exception ends the link without a goodbye.

    Args:
        ssh_options: the user's `-o` options, as `Key=Value`.
        access: how a server behind `https://` is known, and we to it.
        purpose: "migrate", or "check": then the other side answers questions only.
        timeout_s: for the login and the hello; a person at a terminal gets two minutes for a password.
        link_timeout_s: how long nothing may be heard before the link counts as dead; None: as configured.
        carriage: how file content is carried, and over how many connections.
        command: what to run there.

    Raises:
        UsageError: the destination is not usable.
        CannotConnect: with its cause; ssh.PeerMissing when ckpt is not there.
        RemoteRefused, KeyProblem: a server behind `https://` does not want us; our token or certificate is not usable.
        PeerVersion: ckpt there speaks another protocol.
    """
    if https_peer.is_https(destination):
        with _connect_https(destination, access or https_peer.Access(), purpose, timeout_s, link_timeout_s, carriage, on_event) as peer:
            yield peer
        return
    if destination == inherited.DESTINATION:
        with _connect_inherited(timeout_s, link_timeout_s, carriage, on_event) as peer:
            yield peer
        return
    parsed = ssh.Destination.parse(destination)
    carriage = carriage or Carriage()
    ssh_options = (*ssh_options, *ssh_cipher.preference(parsed, ssh_options))
    process = ssh.open(parsed, command, ssh_options)
    assert process.stdin is not None and process.stdout is not None
    inp, out = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
    process.stdout.close()
    process.stdin.close()
    below = SshBelow(str(parsed), process)
    link_timeout_s = config.load().link_timeout_s if link_timeout_s is None else link_timeout_s
    peer = Peer(inp, out, name=str(parsed), explain=below.explain, on_event=on_event, carriage=carriage, link_timeout_s=link_timeout_s)
    further: list[SshBelow] = []
    well = False
    try:
        _shake(peer, below, parsed, max(timeout_s, 120.0) if ssh.interactive() else timeout_s, command[0])
        if carriage.direct:
            streams.join_direct(peer, carriage.streams)
        elif carriage.streams > 1:
            ssh_below.join(peer, parsed, carriage.streams, command, ssh_options, further)
        yield peer
        well = True
    finally:
        peer.close(goodbye=well)
        for one in (below, *further):
            one.end(_LEAVE_S if well else 1.0)


@contextmanager
def _connect_https(
    destination: str,
    access: https_peer.Access,
    purpose: str,
    timeout_s: float,
    link_timeout_s: float | None,
    carriage: Carriage | None,
    on_event: Emit,
) -> Iterator[Peer]:
    """`connect` through the `ckpt serve` of the other host."""
    if carriage is not None and (carriage.direct or carriage.streams > 1):
        raise UsageError("--streams and --direct go with ssh only", hint=f"{destination} is one TLS connection already")
    server = https_peer.Server.parse(destination)
    wire = https_peer.connect(destination, access, timeout_s=timeout_s, purpose=purpose)
    link_timeout_s = config.load().link_timeout_s if link_timeout_s is None else link_timeout_s

    def explain(cause: CkptError) -> CkptError:
        return TransferFailed(f"lost the link to {server}: {cause.message}")

    peer = Peer(wire, wire, name=str(server), explain=explain, on_event=on_event, carriage=carriage, link_timeout_s=link_timeout_s)
    peer.link.carrier = "https"
    well = False
    try:
        if not peer.link.handshake(timeout_s):
            raise CannotConnect(f"cannot connect to {server}: its ckpt peer ended before it spoke", hint="the log of ckpt serve says why")
        yield peer
        well = True
    finally:
        peer.close(goodbye=well)


_standing: list[Peer] = []
"""The one over our standard input and output."""


@contextmanager
def _connect_inherited(timeout_s: float, link_timeout_s: float | None, carriage: Carriage | None, on_event: Emit) -> Iterator[Peer]:
    """`connect` over our standard input and output; the peer stays until `leave_inherited`, since there is no second link."""
    if carriage is not None and (carriage.direct or carriage.streams > 1):
        raise UsageError("--streams and --direct do not go with --stdio")
    if inherited.several():
        with _connect_lent(timeout_s, link_timeout_s, carriage, on_event) as peer:
            yield peer
        return
    if not _standing:
        inp, out = inherited.ends()
        link_timeout_s = config.load().link_timeout_s if link_timeout_s is None else link_timeout_s
        peer = Peer(inp, out, name="the host that fetches it", on_event=on_event, carriage=carriage, link_timeout_s=link_timeout_s)
        try:
            if not peer.link.handshake(timeout_s):
                raise CannotConnect("the host that fetches it ended before it spoke")
        except CkptError:
            peer.close(goodbye=False)
            raise
        _standing.append(peer)
    try:
        yield _standing[0]
    except BaseException:
        _standing[0].close(goodbye=False)
        raise


@contextmanager
def _connect_lent(timeout_s: float, link_timeout_s: float | None, carriage: Carriage | None, on_event: Emit) -> Iterator[Peer]:
    """`connect` over one of the links that were brought to us."""
    inp, out = inherited.lent()
    link_timeout_s = config.load().link_timeout_s if link_timeout_s is None else link_timeout_s
    peer = Peer(inp, out, name="the host that fetches it", on_event=on_event, carriage=carriage, link_timeout_s=link_timeout_s)
    well = False
    try:
        if not peer.link.handshake(timeout_s):
            raise CannotConnect("the host that fetches it ended before it spoke")
        yield peer
        well = True
    finally:
        peer.close(goodbye=well)


def leave_inherited() -> None:
    """Say goodbye on it."""
    while _standing:
        _standing.pop().close()


def _shake(peer: Peer, below: SshBelow, destination: ssh.Destination, timeout_s: float, command: str) -> None:
    try:
        if peer.link.handshake(timeout_s):
            return
        code = below.returncode()
    except CannotConnect:
        code = None
    raise ssh.explain(destination, code, below.stderr() or peer.link.preamble, command=command)
