"""After a crash: what a dead ckpt left behind is undone, or finished where it had passed its point of no return.

Every operation has a job (its journal) and a *guard*: a small process of its own session that blocks on the job's lock. When
the owner dies the guard gets the lock and settles the job. Should the guard die as well, the next command that looks does it.

The rule is the one of CRIU's action-script: a job whose journal says `commit` is finished, every other one is undone; of
migrations only the uncommitted are touched, because the other end has a say in the rest (`ckpt migrate --continue`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import ckpt
from ckpt.criu import action, lazy, tree
from ckpt.engines import registry
from ckpt.engines.base import Engine, StaysEnded
from ckpt.errors import CkptError
from ckpt.host import announce, netns, traffic
from ckpt.host.run import CommandFailed, Process, spawn
from ckpt.model import Container
from ckpt.ops import groupjob, journald, knobs
from ckpt.store import history, place, volatile
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT, Job
from ckpt.store.journal import Journal

FINAL: Final = ("done", "rolled-back")
"""Journal states after which nothing is left to do."""
NEWBORN_S: Final = 60.0
"""A job directory without a journal is left alone for this long: its owner may just be making it."""
FINISH_LIMIT_S: Final = 60.0
POLL_S: Final = 0.02
ERROR_CAP: Final = 500
"""Characters of an error that a journal keeps; a full disk has room for few."""
KEPT_MIGRATIONS_S: Final = 14 * 86400.0
"""A finished migration's journal is kept this long: the other host may still ask how it ended."""

_GUARD: Final = (
    "import sys; p = sys.argv[1]; sys.path.count(p) or sys.path.insert(0, p); "
    "from ckpt.ops.guard import guard_main; sys.exit(guard_main(sys.argv[2]))"
)


def guard_argv(directory: Path) -> list[str]:
    """The command line of a job's guard. Isolated (-I), so it needs no environment, and finds this very ckpt, checkout or not."""
    parent = str(Path(ckpt.__file__).resolve().parent.parent)
    return [sys.executable or "/usr/bin/python3", "-I", "-c", _GUARD, parent, str(directory)]


def start_guard(job: Job | Journal) -> Process | None:
    """Start the guard of a job, or of several, that this process owns. None when it cannot be started: the next command's sweep is left."""
    try:
        with open(job.directory / "guard.log", "ab") as log:
            return spawn(guard_argv(job.directory), cwd="/", stderr=log, new_session=True)
    except (OSError, CommandFailed):
        return None


def store_root(job: Job) -> Path:
    """The root of the store that a job belongs to (ROOT/jobs/JOB)."""
    return place.store_of(job.directory)


def committed(job: Job) -> bool:
    """Whether the point of no return was passed, by the reading of the journal that CRIU's action-script has as well."""
    return action.committed(os.fspath(job.directory))


def source_settled(job: Job) -> bool:
    """Whether the source of a migration that came here knows how it ended: nobody will ask any more."""
    return any(entry.get("state") == "serving" for entry in job.entries())


def settle(job: Job) -> str:
    """Bring a dead owner's job to its end; the caller has its lock. Idempotent.

    Returns:
        "gone" (nothing was left), "undone", "finished", "lost" (a lazy restore whose memory did not all arrive), or "left" (a
        committed migration: for `--continue`; or memory still arrives).

    Raises:
        CkptError: it could not be done now; the journal is unchanged, so that it can be tried again.
    """
    if not job.directory.is_dir():
        return "gone"
    facts = job.facts
    kind = str(facts.get("kind", ""))
    if not kind or job.state in FINAL:
        remove(job)
        return "gone"
    if job.state == "lost" and (kind != "migrate-destination" or source_settled(job) or _is_old(job)):
        remove(job)
        return "lost"
    if job.state == "serving":
        return _served(job)
    if kind in groupjob.KINDS:
        return _settle_group(job, facts)
    if not groupjob.abandon(job):
        if kind == "migrate-source":
            return "left"
        if kind == "migrate-destination":
            if job.state == "prepared":  # decided for by its group's job
                job.write("commit", hooked="post-restore", **facts.get("ready", {}))
            if job.state == "commit":
                _finish(job, "restore", registry.by_name(str(facts["engine"])), facts)
                job.write("running", by="guard")
            elif _is_old(job):
                remove(job)
                return "left"
            _run_hooks(job, registry.by_name(str(facts["engine"])), "post-restore")
            return "left"
        engine = registry.by_name(str(facts.get("engine", "")))
        _finish(job, kind, engine, facts)
        _run_hooks(job, engine, "post-restore" if kind == "restore" else "post-checkpoint")
        if facts.get("lazy"):
            job.write("serving", by="guard")
            _served(job)  # what follows is its keeper's
            return "finished"
        job.write("done", by="guard")
        remove(job)
        return "finished"
    knobs.restore(job)
    engine = registry.by_name(str(facts.get("engine", "")))
    engine.rollback(job)
    knobs.restore(job)  # CRIU leaves a cgroup frozen that it found frozen
    lazy.end(job.directory)
    if kind == "checkpoint" and facts.get(action.GROUP):
        groupjob.drop(store_root(job), str(facts.get("draft", "")))
    if kind in ("checkpoint", "migrate-source"):
        _run_hooks(job, engine, *(["checkpoint-failed"] if kind == "checkpoint" else ["checkpoint-failed", "migrate-failed"]))
    else:
        _run_hooks(job, engine, "restore-failed")
    job.write("rolled-back", by="guard")
    if kind == "migrate-source":
        announce_home(engine, Container(engine.name, str(facts.get("container_id", "")), str(facts.get("name", "")), "running"))
    keep_logs(job, str(facts.get("name", "")))
    remove(job)
    return "undone"


def _settle_group(job: Job, facts: dict[str, Any]) -> str:
    """The job that decides for several. Committed: it goes when all of those are over, for they look at its journal."""
    root = store_root(job)
    if not committed(job):
        groupjob.withdraw(root, facts)
        job.write("rolled-back", by="guard")
        remove(job)
        return "undone"
    groupjob.publish(root, facts)
    kind, members = facts["kind"], [Job(job.directory.parent / Path(str(identity)).name) for identity in facts.get("jobs", ())]
    if kind == groupjob.MIGRATE and any(member.directory.is_dir() for member in members):
        return "left"  # frozen until the destination has been asked: --continue
    deadline = time.monotonic() + 2 * FINISH_LIMIT_S
    for member in members:
        while member.directory.is_dir() and not (kind == groupjob.RECEIVE and groupjob.has_word(member)):
            try:
                if member.acquire():
                    settle(member)
            except OSError:
                pass  # its own guard is done with it
            finally:
                member.release()
            if time.monotonic() > deadline:
                raise CkptError(f"job {member.id} of group {facts.get('name')} is not over")
            time.sleep(POLL_S)
    job.write("done", by="guard")
    remove(job)
    return "finished"


def settle_group_of(job: Job, facts: dict[str, Any]) -> None:
    """A member is over: so is the job of its group, when it was the last one. Never raises for what can be done later."""
    group = Job(job.directory.parent / Path(str(facts.get(action.GROUP) or "none")).name)
    if group.directory.is_dir():
        with suppress(OSError, CkptError):
            if group.acquire():
                settle(group)
        group.release()


def sweep(root: Path = DEFAULT_ROOT) -> list[str]:
    """Settle every dead job below `root` and remove dead drafts. What cannot be settled now is left for the next time.

    Returns:
        One sentence for each job that was settled, for people.
    """
    said: list[str] = []
    jobs = place.jobs(root)
    for directory in sorted(jobs.iterdir()) if jobs.is_dir() else []:
        job = Job(directory)
        try:
            if _is_newborn(job) or not job.acquire():
                continue
        except OSError:
            job.release()
            if not (directory / "journal.jsonl").exists():
                shutil.rmtree(directory, ignore_errors=True)  # died before it had all its files, so before it did anything
            continue
        try:
            facts = job.facts
            result = settle(job)
            if result in ("undone", "finished"):
                what = "was undone" if result == "undone" else "was finished"
                said.append(f"an interrupted {facts.get('kind')} of {facts.get('name')} {what}")
            elif result == "lost":
                what = "did not all arrive, so it was ended; its checkpoint is as it was, restore it again"
                said.append(f"the memory of {facts.get('name')} (restored with --lazy) {what}: {facts.get('reason')}")
        except CkptError as error:
            said.append(f"an interrupted {job.facts.get('kind')} of {job.facts.get('name')} could not be settled: {error.message}")
        finally:
            job.release()
    Catalog(root).sweep()
    volatile.sweep()
    return said


def close(job: Job, guard: Process | None) -> None:
    """End a job whose journal is final: its directory goes, and so does its guard."""
    _dismiss(guard)
    remove(job)
    job.release()


def dismiss(guard: Process | None) -> None:
    """End the guard of a journal; its owner still has the lock."""
    _dismiss(guard)


def hand_over(job: Job, guard: Process | None) -> None:
    """Leave a job whose restore was lazy to the keeper of its memory; the guard goes."""
    _dismiss(guard)
    job.release()


def _dismiss(guard: Process | None) -> None:
    """End a guard that has nothing left to do; it would stay our zombie until we end."""
    if guard is not None:
        with suppress(ProcessLookupError):
            guard.kill()
        guard.wait()


def served(root: Path) -> list[dict[str, Any]]:
    """The facts of the jobs whose restored workload still gets memory from its checkpoint."""
    jobs = place.jobs(root)
    found = [Job(directory) for directory in (sorted(jobs.iterdir()) if jobs.is_dir() else [])]
    return [job.facts for job in found if job.state == "serving" and lazy.running(job.directory)]


def _served(job: Job) -> str:
    """A lazy restore that nobody owns: left while its daemon runs; afterwards only what a dead keeper did not remove is left of it."""
    facts = job.facts
    keeper = tree.stat(int(facts.get("keeper_pid", 0)))
    if (keeper is None or not keeper.alive) and not tree.same(int(facts.get("restored_pid", 0)), int(facts.get("restored_ticks", 0))):
        lazy.end(job.directory)  # one that brings only what is asked for would not end by itself
    if lazy.running(job.directory) or (keeper is not None and keeper.alive and str(job.directory) in tree.argv(keeper.pid)):
        return "left"
    job.write("done", by="sweep")
    remove(job)
    return "gone"


def remove(job: Job) -> None:
    """Remove a job's directory, its journal and its lock last, so that a crash in between is found and finished. The history keeps a record of it."""
    traffic.unblock(job.directory)
    netns.drop(f"ckpt-{job.id}")
    record = history.of_journal(job)
    if record is not None:
        history.keep(store_root(job), record)
        if record.kind in ("checkpoint", "restore") or record.settled_by:
            journald.record(record)  # a migration's command tells of it by itself, with its figures
    for path in list(job.directory.iterdir()) if job.directory.is_dir() else []:
        if path.name in ("journal.jsonl", "lock"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    (job.directory / "journal.jsonl").unlink(missing_ok=True)  # without a journal and with a lock it is nobody's, and anybody's to remove
    shutil.rmtree(job.directory, ignore_errors=True)


def log_root(root: Path) -> Path:
    """Where logs of failures are kept: /var/log/ckpt, or within a store that is not at its usual place."""
    return Path("/var/log/ckpt") if root == DEFAULT_ROOT else root / "log"


def keep_logs(job: Job, name: str, stage: Path | None = None) -> Path | None:
    """Copy the logs of a failed job (its directory's and the stage's) to where they stay.

    Returns:
        The new directory; None when there is no log, or no place for one.
    """
    # One level below too: engines give CRIU a work directory within the job's.
    places = [job.directory, *([stage] if stage else [])]
    found = (path for place in places for pattern in ("*.log", "*/*.log") for path in sorted(place.glob(pattern)))
    logs = [path for path in found if path.is_file() and path.stat().st_size]
    if not logs:
        return None
    stamp = time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime())
    kept = log_root(store_root(job)) / f"{stamp}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:100] or 'job'}"
    try:
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in logs:
            shutil.copyfile(path, kept / path.name)
    except OSError:
        return None
    return kept


def kept_log(named: str | None, kept: Path | None) -> str | None:
    """The same log file where it is now: the job's directory and the stage, which the engine named, are about to go."""
    if kept is None:
        return None
    if named is None:
        return str(kept)
    path, colon, line = named.rpartition(":")
    if not colon or not line.isdigit():
        path, line = named, ""
    copy = kept / Path(path).name
    return f"{copy}{':' + line if line else ''}" if copy.exists() else named


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals that ask us to stop until the block is over: a half-given verdict helps nobody.

    Only meaningful in the main thread; elsewhere signals do not arrive anyway. The mask is not enough: the kernel gives a signal to any
    thread that does not block it (a library's own, for example), and Python then runs the handler in the main thread.
    """
    asked: set[int] = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    held: set[int] = set()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: found for number in asked if callable(found := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: held.add(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)  # waits for the mask, as the others do
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_hooks(job: Job, engine: Engine, *phases: str) -> None:
    """Run what the job's hooks still owe to the workload (ops/hooks.py), if any ran."""
    if job.facts.get("hooked"):
        from ckpt.ops import hooks

        for text in hooks.settle(job, engine, *phases):
            sys.stderr.write(f"{text}\n")  # of a guard: into guard.log


def _finish(job: Job, kind: str, engine: Engine, facts: dict[str, object]) -> None:
    """Give a committed job's waiting action-script its verdict and wait until the engine agrees."""
    if kind == "checkpoint" and facts.get("leave_running"):
        return  # it went on before the commit
    wanted = kind == "restore"
    if not wanted and isinstance(engine, StaysEnded):
        engine.stay_ended(Container(engine.name, str(facts.get("container_id", "")), str(facts.get("name", "")), "running"))
    job.decide("0")
    traffic.unblock(job.directory)
    name, identity = str(facts.get("name", "")), str(facts.get("new_container_id") or facts.get("container_id") or "")

    def meant(container: Container) -> bool:
        # A restored process tree has another id (its start is part of it) under the old name, which was free when the restore began.
        return not identity or container.id == identity or (wanted and container.name == name)

    deadline = time.monotonic() + FINISH_LIMIT_S
    while True:
        there = {c.id: c for text in (identity, name) if text for c in engine.find(text)}
        runs = any(_runs(engine, c) for c in there.values() if meant(c))
        if runs == wanted:
            _wait_through(job, facts, deadline)
            for container in there.values() if wanted else ():
                announce_home(engine, container)
            return
        if time.monotonic() > deadline:
            raise CkptError(f"{facts.get('name')} is {'not running' if wanted else 'still there'} after {FINISH_LIMIT_S:g} s")
        time.sleep(POLL_S)


def announce_home(engine: Engine, container: Container) -> None:
    """Tell its neighbours that a container, which another host may have drawn to itself, lives here. Never raises for it."""
    with suppress(CkptError, CommandFailed):
        now = engine.describe(container)
        if now.state == "running":
            announce.now(now.pid or 0)


def _wait_through(job: Job, facts: dict[str, object], deadline: float) -> None:
    """Wait until CRIU and the engine's command are through: they need the job's directory to their end, or take the workload back."""
    pids = [int(str(facts.get("engine_pid") or 0))]
    with suppress(OSError, ValueError):
        pids.append(int(json.loads(job.held_path.read_text()).get("criu_pid") or 0))
    while any(pid and (found := tree.stat(pid)) and found.alive for pid in pids) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _runs(engine: Engine, container: Container) -> bool:
    try:
        return engine.describe(container).state in ("running", "paused")
    except CkptError:
        return False


def _is_newborn(job: Job) -> bool:
    if (job.directory / "journal.jsonl").exists():
        return False
    try:
        return time.time() - job.directory.stat().st_mtime < NEWBORN_S
    except OSError:
        return True


def _is_old(job: Job) -> bool:
    entries = job.entries()
    return not entries or time.time() - float(entries[-1].get("t", 0.0)) > KEPT_MIGRATIONS_S
