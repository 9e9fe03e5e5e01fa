"""Client of `criu swrk`: one CRIU process for one request, spoken to over a SOCK_SEQPACKET pair, one protobuf a packet.

Sources: CRIU's images/rpc.proto and criu/cr-service.c. CRIU learns our pid by SO_PEERCRED and opens /proc/PID/fd/N for the
directories named by number, so these are opened here, in the process that makes the pair.
"""

from __future__ import annotations

import os
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckpt.criu.bindings import load
from ckpt.errors import FeatureMissing
from ckpt.host import run

OnNotify = Callable[[str, int | None], bool]
"""Called with the name of CRIU's script (`pre-dump`, `post-dump`, ...) and the pid it concerns; False makes CRIU fail."""

ANSWER_LIMIT_S: Final = 30.0
EXIT_LIMIT_S: Final = 10.0
POLL_S: Final = 0.25
PACKET_BYTES: Final = 1 << 20
GHOST_LIMIT_BYTES: Final = 256 << 20
"""Deleted but open files up to this size go into the CRIU images (CRIU's own default, 1 MiB, fails on ordinary logs)."""


class CriuFailed(Exception):
    """A request that CRIU refused, did not answer in time, or died of. Rooms above turn it into their own error.

    `log` is the path of CRIU's log (may not exist), `timed_out` says that CRIU was killed by us.
    """

    def __init__(self, verb: str, reason: str, *, log: Path | None = None, errno: int = 0, timed_out: bool = False) -> None:
        super().__init__(f"CRIU {verb}: {reason}")
        self.verb = verb
        self.reason = reason
        self.log = log
        self.errno = errno
        self.timed_out = timed_out

    def log_text(self, cap_bytes: int = 8 << 20) -> str:
        """The end of CRIU's log ("" without one)."""
        if self.log is None:
            return ""
        try:
            with open(self.log, "rb") as source:
                source.seek(max(0, os.fstat(source.fileno()).st_size - cap_bytes))
                return source.read(cap_bytes).decode(errors="replace")
        except OSError:
            return ""


class Limit:
    """A time limit that can be stopped while somebody decides, and started again. Thread-safe."""

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self.seconds = seconds
        self._deadline: float | None = time.monotonic() + seconds

    def stop(self) -> None:
        """Wait without a limit from now on."""
        with self._lock:
            self._deadline = None

    def start(self, seconds: float) -> None:
        """`seconds` from now."""
        with self._lock:
            self.seconds = seconds
            self._deadline = time.monotonic() + seconds

    def left_s(self) -> float | None:
        """Seconds left (may be negative), None without a limit."""
        with self._lock:
            return None if self._deadline is None else self._deadline - time.monotonic()


@dataclass(frozen=True, slots=True)
class Request:
    """What dump and restore have in common.

    `images_dir` holds the CRIU images, `work_dir` gets the log, stats-dump and stats-restore. `config_file` is a CRIU
    configuration file that wins over everything said here (see `hold.prepare`).
    """

    images_dir: Path
    work_dir: Path
    log_file: str
    tcp_established: bool = False
    file_locks: bool = False
    shell_job: bool = False
    config_file: Path | None = None
    freeze_limit_s: int = 60
    network_lock: str | None = None
    """None (CRIU's choice), "iptables", "nftables" or "skip"; a restore uses what the dump used."""


def program() -> str:
    """Absolute path of criu. Raises FeatureMissing."""
    path = run.which("criu")
    if path is None:
        raise FeatureMissing("CRIU is not installed", hint="install it: apt install criu, or dnf install criu")
    return path


def version() -> tuple[int, int, int]:
    """CRIU's version as (major, minor, sublevel). Raises FeatureMissing, CriuFailed."""
    answer = _ask(_request("VERSION"), "version").version
    return (answer.major_number, answer.minor_number, answer.sublevel)


def features() -> dict[str, bool]:
    """CRIU's FEATURE_CHECK: mem_track, lazy_pages, pidfd_store. Raises FeatureMissing, CriuFailed."""
    request = _request("FEATURE_CHECK")
    names = [field.name for field in request.features.DESCRIPTOR.fields]
    for name in names:
        setattr(request.features, name, True)
    answer = _ask(request, "feature check").features
    return {name: bool(getattr(answer, name)) for name in names}


def check(limit_s: float = ANSWER_LIMIT_S) -> tuple[bool, str]:
    """Does CRIU really work on this kernel? (`criu check`; the RPC of it drops the reason before CRIU 4.2). Never raises."""
    try:
        result = run.run([program(), "check"], timeout_s=limit_s, check=False)
    except FeatureMissing as error:
        return False, error.message
    except run.CommandFailed as error:
        return False, error.reason
    text = result.text + "\n" + result.error_text
    if result.ok:
        return True, "looks good"
    return False, text.strip() or f"criu check: exit status {result.returncode}"


def dump(request: Request, pid: int, *, leave_running: bool = False, on_notify: OnNotify | None = None, limit: Limit | None = None) -> None:
    """Dump the tree of `pid`; returns when CRIU is done: the tree is killed, or runs on with `leave_running`.

    Args:
        on_notify: answers CRIU's scripts; may block (the time limit stands still meanwhile).

    Raises:
        CriuFailed: CRIU let the tree go on (unless `timed_out`: then CRIU was killed in the middle).
        FeatureMissing: CRIU or pycriu is not there.
    """
    message = _request("DUMP")
    opts = message.opts
    opts.pid = pid
    opts.leave_running = leave_running
    # Reopening files by name fails for unlinked ones unless CRIU may link them back or carry small ones along.
    opts.link_remap = True
    opts.ghost_limit = GHOST_LIMIT_BYTES
    opts.timeout = request.freeze_limit_s
    if request.network_lock:
        rpc = load("rpc_pb2")
        opts.network_lock = getattr(rpc, request.network_lock.upper())
    _operate(message, request, "dump", on_notify, limit)


def restore(request: Request, *, on_notify: OnNotify | None = None, limit: Limit | None = None) -> int:
    """Restore the tree of `request.images_dir`, detached; returns the pid of its root.

    Raises:
        CriuFailed: CRIU removed what it had made (unless `timed_out`).
        FeatureMissing: CRIU or pycriu is not there.
    """
    answer = _operate(_request("RESTORE"), request, "restore", on_notify, limit)
    return int(answer.restore.pid)


def _request(kind: str) -> Any:
    rpc = load("rpc_pb2")
    return rpc.criu_req(type=getattr(rpc, kind))


def _operate(message: Any, request: Request, verb: str, on_notify: OnNotify | None, limit: Limit | None) -> Any:
    opts = message.opts
    opts.log_level = 4
    opts.log_file = request.log_file
    opts.tcp_established = request.tcp_established
    opts.tcp_skip_in_flight = request.tcp_established
    opts.file_locks = request.file_locks
    opts.shell_job = request.shell_job
    # Only a connectionless socket (syslog) can be external; it is connected again by path.
    opts.ext_unix_sk = True
    opts.notify_scripts = True
    if request.config_file is not None:
        opts.config_file = str(request.config_file)
    log = request.work_dir / request.log_file
    log.unlink(missing_ok=True)
    with ExitStack() as stack:
        for name, folder in (("images_dir_fd", request.images_dir), ("work_dir_fd", request.work_dir)):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            setattr(opts, name, fd)
        return _ask(message, verb, on_notify=on_notify, limit=limit, log=log)


def _ask(message: Any, verb: str, *, on_notify: OnNotify | None = None, limit: Limit | None = None, log: Path | None = None) -> Any:
    """Start CRIU, send the request, answer its notifications, return its last word."""
    criu = program()
    limit = limit or Limit(ANSWER_LIMIT_S)
    if not message.opts.HasField("images_dir_fd"):
        message.opts.images_dir_fd = -1  # required by the protocol, even where it means nothing
    with ExitStack() as stack:
        # What CRIU says before its log is open.
        stderr = stack.enter_context(tempfile.TemporaryFile())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        try:
            process = run.spawn([criu, "swrk", str(theirs.fileno())], pass_fds=(theirs.fileno(),), stderr=stderr, new_session=True)
        except run.CommandFailed as error:
            raise CriuFailed(verb, error.reason, log=log) from error
        finally:
            theirs.close()
        try:
            answer = _converse(ours, message, verb, on_notify, limit, log)
        except BaseException as error:
            if not isinstance(error, CriuFailed) or error.timed_out:
                process.kill()
            _reap(process)
            if isinstance(error, CriuFailed):
                stderr.seek(0)
                said = stderr.read(65536).decode(errors="replace").strip()
                if said and not (log and log.exists()):
                    error.reason += f": {said.splitlines()[-1]}"
            raise
        ours.close()
        _reap(process)
    if answer.success:
        return answer
    reason = answer.cr_errmsg or (os.strerror(answer.cr_errno) if answer.cr_errno else "failed without saying why")
    raise CriuFailed(verb, reason, log=log, errno=answer.cr_errno)


def _converse(ours: socket.socket, message: Any, verb: str, on_notify: OnNotify | None, limit: Limit, log: Path | None) -> Any:
    rpc = load("rpc_pb2")
    try:
        ours.send(message.SerializeToString())
        while True:
            _wait(ours, verb, limit, log)
            packet = ours.recv(PACKET_BYTES)
            if not packet:
                raise CriuFailed(verb, "CRIU ended without an answer", log=log)
            answer = rpc.criu_resp()
            answer.ParseFromString(packet)
            if answer.type != rpc.NOTIFY:
                return answer
            pid = answer.notify.pid if answer.notify.HasField("pid") else None
            began = time.monotonic()
            verdict = on_notify is None or on_notify(answer.notify.script, pid)
            left_s = limit.left_s()
            if left_s is not None:
                limit.start(left_s + time.monotonic() - began)
            reply = rpc.criu_req(type=rpc.NOTIFY, notify_success=verdict)
            ours.send(reply.SerializeToString())
    except OSError as error:
        raise CriuFailed(verb, f"CRIU went away: {error.strerror or error}", log=log) from error


def _wait(ours: socket.socket, verb: str, limit: Limit, log: Path | None) -> None:
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    while True:
        left_s = limit.left_s()
        if left_s is not None and left_s <= 0:
            raise CriuFailed(verb, f"no answer in {limit.seconds:g} s, ended", log=log, timed_out=True)
        # Short turns, because the limit may be started by another thread.
        if poll.poll(1000 * (POLL_S if left_s is None else min(POLL_S, left_s))):
            return


def _reap(process: run.Process) -> None:
    try:
        process.wait(EXIT_LIMIT_S)
    except Exception:  # subprocess.TimeoutExpired, whose module is not imported here
        process.kill()
        process.wait()
