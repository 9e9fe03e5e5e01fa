"""CRIU's lazy-pages daemon over local CRIU images: a restored tree runs at once, its memory is brought behind it (criu(8), LAZY-PAGES).

The daemon listens on `lazy-pages.socket` in its work directory, which must be the work directory of the restore too. Before CRIU
calls its `post-restore` script every task has handed its userfaultfd over that socket. The daemon then answers page faults, copies
the rest in the background, and ends with status 0 when nothing is left.

The daemon fails when it is stopped and continued, by SIGCONT or a thawed cgroup: that interrupts its epoll_wait (CRIU 4.2.1). A
userfaultfd that is closed too early, as the kernel does for a daemon that has ended, does not make faults fail: the missing pages
become *zeros*, and the tree computes on with them. Therefore whoever supervises a daemon keeps copies of its descriptors
(`Daemon.follow`): faults then wait, until the tree has been ended.

A job's directory (see ckpt/store/job.py) has `lazy.json` (the daemon's pid and start) as soon as it listens, or `lazy.failed`.
"""

from __future__ import annotations

import errno
import json
import os
import select
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ckpt.criu import loopback, swrk, tree
from ckpt.errors import FeatureMissing, RestoreFailed
from ckpt.host import procread, run, uffd

LOG: Final = "lazy-pages.log"
READY: Final = "lazy.json"
FAILED: Final = "lazy.failed"
DAMAGE: Final = "pages.damaged"
"""Why the process that fed the daemon gave up (ckpt/ops/feeder.py)."""
START_LIMIT_S: Final = 30.0
END_LIMIT_S: Final = 10.0
POLL_S: Final = 0.003
_NICE: Final = 10


def require() -> None:
    """Raise FeatureMissing unless CRIU and the kernel can bring memory later."""
    # What FEATURE_CHECK calls lazy_pages; asked this way it takes 10 ms and no pycriu.
    try:
        result = run.run([swrk.program(), "check", "--feature", "uffd-noncoop"], check=False)
    except run.CommandFailed as error:
        raise FeatureMissing(f"CRIU cannot be asked for lazy pages: {error.reason}", hint="criu check tells whether CRIU works here") from error
    if not result.ok:
        hint = "restore without --lazy; it takes a kernel with CONFIG_USERFAULTFD (4.11 or later), and root or CAP_SYS_PTRACE"
        raise FeatureMissing("memory cannot be brought after a restore here: the kernel lacks userfaultfd, or CRIU its use", hint=hint)


def work_dir(job_dir: Path) -> Path:
    """The work directory that the daemon and the restore of a job share."""
    return job_dir / "criu"


class Daemon:
    """A running `criu lazy-pages`, child of this process."""

    def __init__(self, images_dir: Path, work: Path, keep_fds: Sequence[int] = (), *, page_server_port: int | None = None) -> None:
        """Start it.

        Args:
            keep_fds: stay open in it: locks on what it reads live as long as it does.
            page_server_port: of the loopback, where it asks for the memory (see pagefeed.py); None: the images have it.

        Raises:
            FeatureMissing: no CRIU.
            CommandFailed: it cannot be started.
        """
        self._copies: list[int] = []
        self._log = work / LOG
        self._ready, theirs = os.pipe()
        argv: list[str | os.PathLike[str]] = [swrk.program(), "lazy-pages", "-D", images_dir, "-W", work, "-o", LOG, "--status-fd", str(theirs)]
        if page_server_port is not None:
            argv += ["--page-server", "--address", loopback.ADDRESS, "--port", str(page_server_port)]
        try:
            # Its first words, before there is a log, go where ours go.
            self._process = run.spawn(argv, cwd="/", stderr=None, pass_fds=(theirs, *keep_fds), new_session=True)
        except BaseException:
            os.close(self._ready)
            raise
        finally:
            os.close(theirs)
        if page_server_port is not None:
            with suppress(OSError):  # it polls without a pause while it waits for an answer (handle_requests in criu/uffd.c)
                os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICE)
        self.pidfd = os.pidfd_open(self._process.pid)
        """Readable when it has ended."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """How it ended (negative: by a signal); None while it runs. 0: every page is where it belongs."""
        return self._process.poll()

    def last_words(self) -> str:
        """The last error in its log ("" for none)."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        said = [line for line in lines if "Error" in line and "RLIMIT_NOFILE" not in line]
        return said[-1].partition("): ")[2] if said else ""

    def wait_listening(self, limit_s: float = START_LIMIT_S) -> bool:
        """Wait until a restore can connect; False when it ended instead or took too long."""
        poller = select.poll()
        poller.register(self._ready, select.POLLIN)
        try:
            # CRIU writes a zero byte; end of file without it means that CRIU is gone.
            return bool(poller.poll(1000 * limit_s)) and os.read(self._ready, 1) == b"\0"
        finally:
            os.close(self._ready)

    def follow(self) -> None:
        """Copy the userfaultfds that it has now, and close the copies of before.

        To be called again and again: of a task that is complete, or has ended, the daemon closes its own, and our copy holds the
        task's next faults until this is called. Once the daemon is ending the copies stay, until `let_go`.
        """
        found = uffd.descriptors(self.pid)
        if found is None:
            return
        fresh: list[int] = []
        try:
            for fd in found:
                fresh.append(uffd.copy(self.pidfd, fd))
        except OSError as error:
            for fd in fresh:
                os.close(fd)
            if error.errno not in (errno.EBADF, errno.ESRCH):
                raise
            return  # one was closed while we looked, or all of them were: the next look tells
        old, self._copies = self._copies, fresh
        for fd in old:
            os.close(fd)

    def let_go(self) -> None:
        """Close all copies: the daemon is through, or nobody is left to be harmed."""
        while self._copies:
            os.close(self._copies.pop())

    def end(self) -> None:
        """Kill it, unless it has ended, and close the copies."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self.let_go()


def mark_ready(job_dir: Path, daemon: Daemon) -> None:
    """Say in the job's directory that the daemon listens, and which process it is."""
    found = tree.stat(daemon.pid)
    _write(job_dir / READY, json.dumps({"pid": daemon.pid, "ticks": found.start_ticks if found else -1}))


def mark_failed(job_dir: Path, reason: str) -> None:
    """Say in the job's directory that there is no daemon (any more)."""
    _write(job_dir / FAILED, reason)


def damage(job_dir: Path) -> str:
    """Why the feeder of this job gave up; "" when it did not."""
    try:
        return (job_dir / DAMAGE).read_text()
    except OSError:
        return ""


def wait_listening(job_dir: Path, keeper_pid: int) -> None:
    """Wait until the job's daemon, which the process `keeper_pid` starts, listens.

    Raises:
        RestoreFailed: it does not come.
    """
    end = time.monotonic() + START_LIMIT_S
    while not (job_dir / READY).exists():
        check(job_dir, keeper_pid)
        if time.monotonic() > end:
            raise RestoreFailed(f"CRIU's lazy-pages daemon did not listen within {START_LIMIT_S:g} s", log=_log(job_dir))
        time.sleep(POLL_S)


def check(job_dir: Path, keeper_pid: int) -> None:
    """Raise RestoreFailed when the job's daemon has failed, or the process that looks after it is gone."""
    with suppress(FileNotFoundError):
        reason = (job_dir / FAILED).read_text()
        raise RestoreFailed(f"the memory cannot be brought: {reason}", log=_log(job_dir))
    keeper = tree.stat(keeper_pid)
    if keeper is None or not keeper.alive:
        raise RestoreFailed("the memory cannot be brought: the process that sees to it has ended", log=_log(job_dir))


def running(job_dir: Path) -> bool:
    """Whether the daemon that this job's directory names is alive."""
    pid, ticks = _recorded(job_dir)
    return pid > 0 and tree.same(pid, ticks)


def end(job_dir: Path) -> None:
    """Kill the daemon that this job's directory names, should its supervisor have died; wait until it is gone. Idempotent."""
    pid, ticks = _recorded(job_dir)
    until = time.monotonic() + END_LIMIT_S
    while pid > 0 and tree.same(pid, ticks) and time.monotonic() < until:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
        time.sleep(POLL_S)


def arriving(pids: Iterable[int]) -> bool:
    """Whether memory of any of these processes is still being brought by a lazy-pages daemon of this host.

    A dump in this state would silently leave out what has not arrived: CRIU saves the pages that are there, and says success.
    """
    daemons = (pid for pid in procread.all_pids() if procread.comm_of(pid) == "criu" and "lazy-pages" in tree.argv(pid))
    return any(daemons) and any(uffd.served(pid) for pid in pids)


def _recorded(job_dir: Path) -> tuple[int, int]:
    try:
        found = json.loads((job_dir / READY).read_text())
        return int(found["pid"]), int(found["ticks"])
    except (OSError, ValueError, KeyError):
        return 0, 0


def _log(job_dir: Path) -> str | None:
    return next((str(path) for path in sorted(job_dir.glob(f"*/{LOG}"))), None)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.rename(path)
