"""The keeper of a lazy restore: a small process of its own session that outlives ckpt while the restored memory arrives.

It starts CRIU's lazy-pages daemon for a restore and waits for ckpt's word on its standard input: "0", the tree runs, serve it; "1",
the restore was undone. Without a word (ckpt died) the journal decides, as it does for CRIU's action-script: committed, go on.

A keeper that is told so (`on_demand`) has the daemon bring only what the tree asks for, until somebody wants all of it (`fill`) or the tree has
ended: memory that a copy never touches stays one with that of all other copies, in the page cache (see lazyrelay.py).

Serving, it holds the lease on the checkpoint (the daemon holds it too, so it outlives a killed keeper) and owns the job, whose journal
says `serving`. Memory in the store's chunks the daemon gets from a feeder (feeder.py). When all memory is there the keeper removes the
job, and the draft that was made for this one restore.

A keeper that is killed takes nothing away. Its daemon is not made to end with it (PR_SET_PDEATHSIG): it alone can still bring what is missing,
and a tree whose daemon ends reads zeros there. It serves on as long as the tree lives, and what a tree that has ended leaves of it the next
command removes (recover.py); only to watch for that nobody is kept beside every keeper.

There is one for each copy of a set: one for all would be a death for all, and its journal, lease and verdict are those of one job. It is
kept small instead: what only some need is imported by them.

When the daemon fails, or a chunk is damaged, the tree is *ended* before it can compute with memory that it never had. The checkpoint
stays in the store, the journal says `lost`, and the next command tells it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

import ckpt
from ckpt.criu import action, lazy, tree
from ckpt.criu.lazyrelay import Relay
from ckpt.errors import CkptError, RestoreFailed
from ckpt.host import run
from ckpt.ops.filling import FILL
from ckpt.store import place
from ckpt.store.job import Job

FOLLOW_S: Final = 0.05
"""A task whose memory is complete may have to wait this long once, for our copy of its descriptor to be closed."""
REST_S: Final = 0.5
"""The same where nothing is brought that nobody asked for; so long may a wish for the rest have to wait, too."""
ABORT_LIMIT_S: Final = 30.0
_BODY: Final = (
    "import sys; p = sys.argv[1]; sys.path.count(p) or sys.path.insert(0, p); "
    "from ckpt.ops.lazy import keeper_main; sys.exit(keeper_main(sys.argv[2]))"
)


_SWITCH_S: Final = 0.0002
"""Between the thread that takes in and the one that answers page faults: with Python's 5 ms each fault may wait so long."""
_GO: Final = b"g"
Memory = Literal["images", "chunks", "chain", "source"]


class Keeper:
    """ckpt's end: the keeper of one restore."""

    def __init__(
        self,
        job: Job,
        stage: Path,
        *,
        lease_fds: Sequence[int],
        draft: bool,
        memory: Memory = "images",
        criu_version: str = "",
        checkpoint_id: str = "",
        newest: Path | None = None,
        waits: bool = False,
        shared: bool = False,
        on_demand: bool = False,
    ) -> None:
        """Start it; the daemon is on its way (`criu.lazy.wait_listening`).

        Args:
            lease_fds: the locks on the checkpoint and the stage; the keeper and the daemon keep them until they end.
            draft: the stage is a draft, to be removed in the end.
            memory: where it is: in the stage's CRIU images; "chunks", in the store, of the checkpoint `checkpoint_id`; "chain", in the images
                `newest` and their parents; "source", still on the source of a migration (see postcopy.py).
            criu_version: of this host, for all but the first.
            waits: for `go`, because the stage is not complete.
            shared: other keepers have the same draft, which goes with the last of them.
            on_demand: only what the tree asks for is brought, until `fill`.

        Raises:
            CommandFailed, OSError: it cannot be started.
        """
        self._job = job
        lazy.work_dir(job.directory).mkdir(mode=0o700, exist_ok=True)
        self._plan = {
            "stage": str(stage), "fds": list(lease_fds), "draft": draft, "memory": memory, "criu_version": criu_version,
            "checkpoint_id": checkpoint_id, "shared": shared, "on_demand": on_demand,
        }  # fmt: skip
        job.write("lazy", lazy={**self._plan, "newest": str(newest or ""), "waits": waits})
        parent = str(Path(ckpt.__file__).resolve().parent.parent)
        argv = [sys.executable or "/usr/bin/python3", "-I", "-c", _BODY, parent, str(job.directory)]
        with open(job.directory / "keeper.log", "ab") as log:
            self._process = run.spawn(argv, stdin=run.PIPE, stderr=log, cwd="/", pass_fds=lease_fds, new_session=True)
        job.write("lazy", keeper_pid=self._process.pid)

    def go(self, newest: Path | None) -> None:
        """The stage is complete: start the daemon. `newest` as for `memory` "chain"."""
        self._job.write("lazy", lazy={**self._plan, "newest": str(newest or "")})
        assert self._process.stdin is not None
        with suppress(OSError):  # it is dead: `wait_listening` finds that
            self._process.stdin.write(_GO)
            self._process.stdin.flush()

    def check(self) -> None:
        """Raise RestoreFailed when the daemon is no longer there to serve."""
        lazy.check(self._job.directory, self._process.pid)

    def serve(self) -> None:
        """The tree runs, and the job is free: from here on it is the keeper's."""
        self._say(b"0")

    def abort(self) -> None:
        """The restore was undone: the daemon goes, and so does the keeper. Never raises."""
        self._say(b"1")
        with suppress(Exception):  # subprocess.TimeoutExpired, whose module is not imported here
            self._process.wait(ABORT_LIMIT_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        lazy.end(self._job.directory)

    def _say(self, word: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is dead: the sweep of the next command settles the job
            self._process.stdin.write(word)
            self._process.stdin.close()


def identity(pid: int, name: str) -> dict[str, int]:
    """The first process of a restored tree, for the journal: should its memory not arrive, it is ended.

    Raises:
        RestoreFailed: it is not known.
    """
    found = tree.stat(pid) if pid else None
    if found is None:
        raise RestoreFailed(f"{name}: its first process is not known, so nobody could end it if its memory did not arrive")
    return {"restored_pid": pid, "restored_ticks": found.start_ticks}


def keeper_main(directory: str) -> int:
    """The body of a keeper. Returns an exit status."""
    # Ignored by the daemon too, which inherits it: only SIGKILL takes the memory away.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    job = Job(Path(directory))
    try:
        # Kept open: it can still be read when the job's directory has been removed.
        journal = open(job.directory / "journal.jsonl")
    except FileNotFoundError:
        return 0
    with journal:
        plan = _facts(journal)["lazy"]
        stage = Path(plan["stage"])
        try:
            if plan.get("waits"):
                from ckpt.criu import bindings, pagefeed  # noqa: F401 - takes a moment, and the source is frozen later

                bindings.load("images.pagemap_pb2")
                if os.read(0, 1) != _GO:
                    return 0
                plan = _facts(journal)["lazy"]
            return _keep(_Served(job, journal, stage), plan)
        finally:
            if plan.get("shared"):
                _drop(job.directory, plan["fds"])
            elif plan["draft"]:
                shutil.rmtree(stage, ignore_errors=True)


def _drop(job_dir: Path, fds: Sequence[int]) -> None:
    """Give up our share of a draft; nobody's drafts are removed."""
    for fd in fds:
        os.close(fd)
    from ckpt.store.catalog import Catalog  # at a keeper's end, not at its start

    with suppress(CkptError, OSError):
        Catalog(place.store_of(job_dir)).sweep()


@dataclass(slots=True)
class _Served:
    """What a keeper works for."""

    job: Job
    journal: IO[str]
    stage: Path
    lost: str = ""
    """Why the tree was ended."""

    @property
    def committed(self) -> bool:
        self.journal.seek(0)
        return action.reached_commit(self.journal)

    @property
    def root(self) -> tuple[int, int]:
        """The first process of the tree and its start; (0, 0) while it is not known."""
        facts = _facts(self.journal)
        return int(facts.get("restored_pid", 0)), int(facts.get("restored_ticks", 0))

    def alive(self) -> bool:
        pid, ticks = self.root
        return pid > 0 and tree.same(pid, ticks)

    def end(self, reason: str) -> None:
        """Kill the tree, which is then lost."""
        pid, ticks = self.root
        if not self.alive():
            return
        self.lost = reason
        for member in reversed(tree.pids(pid)):
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        while tree.same(pid, ticks):
            select.select([], [], [], lazy.POLL_S)


def _feed(served: _Served, plan: dict[str, Any], stack: ExitStack) -> int | None:
    """Make the page server that the daemon asks, where CRIU's images alone will not do; its port."""
    if plan["memory"] == "images":
        return None
    if plan["memory"] == "chunks":
        from ckpt.ops.feeder import Feeder

        found = {"root": place.store_of(served.job.directory), "job": served.job.directory, "images": served.stage / "checkpoint"}
        wanted = {name: plan[name] for name in ("criu_version", "checkpoint_id")}
        feeder = Feeder({**{name: str(path) for name, path in found.items()}, **wanted}, plan["fds"])
        stack.callback(feeder.close)
        return feeder.port()
    from ckpt.criu import pagefeed

    feed = pagefeed.Feed(str(plan["criu_version"]))
    stack.callback(feed.close)
    if plan["memory"] == "source":
        from ckpt.ops import arriving

        sys.setswitchinterval(_SWITCH_S)

        def patience_s() -> float:
            # Not `served.committed`: this is another thread, and the open journal has one position.
            return arriving.PATIENCE_S if action.committed(os.fspath(served.job.directory)) else arriving.EARLY_PATIENCE_S

        source = arriving.Arriving(served.job.directory, served.stage / "checkpoint", served.stage, patience_s=patience_s)
        stack.callback(source.close)
        pagefeed.start(feed, source)
    else:
        files = pagefeed.PageFiles(Path(plan["newest"]))
        files.require(served.stage / "checkpoint")
        pagefeed.start(feed, files)
    return feed.port


def _keep(served: _Served, plan: dict[str, Any]) -> int:
    with ExitStack() as stack:
        lost = _bring(served, plan, stack)
    if lost is None:
        return 1 if (served.job.directory / lazy.FAILED).exists() else 0
    _close(served, lost)
    return 1 if lost else 0


def _bring(served: _Served, plan: dict[str, Any], stack: ExitStack) -> str | None:
    """All of the keeper's work: "" or why the memory is lost; None when there was nothing to bring it to in the end."""
    directory = served.job.directory
    relay: Relay | None = None
    try:
        port = _feed(served, plan, stack)
        work, fds = lazy.work_dir(directory), list(plan["fds"])
        if plan.get("on_demand"):
            relay = Relay(work)
            stack.callback(relay.close)
            work, fds = relay.daemon_dir, [*fds, relay.upstream.fileno()]
        daemon = lazy.Daemon(served.stage / "checkpoint", work, fds, page_server_port=port)
    except (CkptError, run.CommandFailed, OSError) as error:
        lazy.mark_failed(directory, str(error))
        return None
    try:
        if not daemon.wait_listening():
            lazy.mark_failed(directory, "CRIU's lazy-pages daemon did not start")
            return None
        if relay is not None:
            relay.start()
        lazy.mark_ready(directory, daemon)
        if not _wanted(served, daemon):
            return None
        if relay is not None:
            _rest(served, daemon, relay)
        lost = _serve(served, daemon)
    except Exception as error:
        # Whatever it is: the daemon ends with us, so a tree that runs must end before.
        reason = str(error) or type(error).__name__
        if not served.committed:
            with suppress(OSError):  # the directory may be gone, with the restore
                lazy.mark_failed(directory, reason)
            return None
        served.end(reason)
        lost = served.lost
    finally:
        daemon.end()
    return lost


def _wanted(served: _Served, daemon: lazy.Daemon) -> bool:
    """Wait for ckpt's word, or its end; whether the tree runs."""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(daemon.pidfd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll(1000 * FOLLOW_S)}
        if 0 in ready:
            word = os.read(0, 1)
            return word == b"0" or (not word and served.committed)
        if daemon.pidfd in ready:
            poller.unregister(daemon.pidfd)
            if daemon.status:
                lazy.mark_failed(served.job.directory, _ended(served, daemon))
                if served.committed:
                    served.end(_ended(served, daemon))
                daemon.let_go()  # a restore that still waits for a page comes to its end, and is refused by `Keeper.check`
        else:
            daemon.follow()


def _rest(served: _Served, daemon: lazy.Daemon, relay: Relay) -> None:
    """Let the daemon answer faults only, until the rest is wanted, the tree has ended, or the daemon has."""
    wish = served.job.directory / FILL
    poller = select.poll()
    poller.register(daemon.pidfd, select.POLLIN)
    tree_fd = -1
    with suppress(OSError):  # it has ended
        tree_fd = os.pidfd_open(served.root[0])
        poller.register(tree_fd, select.POLLIN)
    try:
        daemon.follow()
        while served.alive() and not wish.exists() and not poller.poll(1000 * REST_S):
            daemon.follow()
    finally:
        if tree_fd >= 0:
            os.close(tree_fd)
        relay.fill()


def _serve(served: _Served, daemon: lazy.Daemon) -> str:
    """Wait until all memory is there. "" or what went wrong; then the tree has been ended."""
    poller = select.poll()
    poller.register(daemon.pidfd, select.POLLIN)
    while daemon.status is None:
        if not poller.poll(1000 * FOLLOW_S):
            daemon.follow()
    if daemon.status == 0:
        daemon.let_go()
    else:
        served.end(_ended(served, daemon))
    return served.lost


def _close(served: _Served, lost: str) -> None:
    """Bring the job to its end: ckpt, or the guard that took its place, gives it free."""
    from ckpt.ops import recover

    job = served.job
    try:
        job.acquire(wait=True)
    except OSError:
        job.release()
        return
    try:
        if job.facts.get("kind") == "migrate-destination" and not recover.source_settled(job):
            # The source asks how it ended, and must not take an answer that is missing for "there is no copy".
            job.write("lost" if lost else "served", **({"reason": lost} if lost else {}))
        elif lost:
            job.write("lost", reason=lost)
            recover.keep_logs(job, str(job.facts.get("name", "")))
        else:
            job.write("done", by="keeper")
            recover.remove(job)
    finally:
        job.release()


def _ended(served: _Served, daemon: lazy.Daemon) -> str:
    if said := lazy.damage(served.job.directory):
        return said
    status = daemon.status or 0
    if status < 0:
        return f"CRIU's lazy-pages daemon was ended by signal {-status}"
    return f"CRIU's lazy-pages daemon failed: {daemon.last_words() or f'status {status}'}"


def _facts(journal: IO[str]) -> dict[str, Any]:
    """All facts of all lines, later ones winning; a torn last line is left out."""
    journal.seek(0)
    merged: dict[str, Any] = {}
    for line in journal:
        try:
            merged.update(json.loads(line))
        except ValueError:
            break
    return merged
