"""The end of a migration: the source goes for good or goes on, as the destination's journal says; also for `--continue`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.criu import netlock
from ckpt.engines.base import Engine, HeldDump
from ckpt.errors import BusyError, CkptError, NeedsContinue, RestoreFailed, StateUnknown, TargetNotFound
from ckpt.events import BytesMoved, Emit, Notice, StepDone, StepStarted
from ckpt.host import traffic
from ckpt.model import Container
from ckpt.ops import faults, hooks, knobs, recover
from ckpt.ops.result import Outcome, failure
from ckpt.peer import client
from ckpt.peer.client import Peer
from ckpt.store import history, place
from ckpt.store.job import DEFAULT_ROOT, Job
from ckpt.transports.https_peer import Access


def end_source(engine: Engine, container: Container, held: HeldDump, job: Job, keep: bool, *, stage: Path | None = None, faults_at: str = "") -> None:
    """End the frozen source for good and, unless it is to be kept, remove it with the volumes that moved along."""
    held.end()
    traffic.unblock(job.directory)
    job.write("ended")
    if stage is not None:
        # A process tree shares this host's network: the locks of its connections would stay.
        netlock.unlock(stage / "checkpoint")
    if faults_at:
        faults.point(faults_at)
    if not keep:
        with suppress(CkptError):
            engine.remove(container)
        remove_volumes = getattr(engine, "remove_volumes", None)
        if remove_volumes is not None:
            remove_volumes(job.facts.get("moved_volumes", []))


def reached(facts: Mapping[str, Any]) -> dict[str, Any]:
    """How the destination of a journal was reached: arguments of `client.connect`."""
    return {"ssh_options": tuple(facts.get("ssh_options", ())), "access": Access.from_json(facts.get("access"))}


def tell_destination(job: Job, peer: Peer | None = None, *, greeting_s: float = 60.0, warn: Callable[[str], None] | None = None) -> bool:
    """Tell the destination that the source knows how it ended, so that its journal goes; False when it cannot be reached.

    Args:
        greeting_s: how long the hooks may take that run there now.
        warn: gets what went wrong with them.
    """
    if peer is not None:
        try:
            answer = peer.call("finish", timeout_s=greeting_s)
            if warn is not None:
                for text in answer.get("warnings") or ():
                    warn(f"{peer.hostname}: {text}"[:500])
            return True
        except CkptError:
            pass
    facts = job.facts
    if "plain_name" in facts:
        return True
    try:
        with client.connect(str(facts["destination"]), purpose="check", **reached(facts)) as again:
            again.call("settle", {"job": facts["remote_job"]})
        return True
    except CkptError:
        return False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the destination says of a migration (see migrate_dest.status)."""

    state: str
    memory: str = "all"
    reason: str = ""


def ask_destination(job: Job) -> Answer:
    """Ask the destination of a committed migration how it ended: "running", "failed", "undecided" or "lost".

    Raises:
        CkptError: it cannot be reached, or it is another machine by now.
    """
    facts = job.facts
    if "plain_name" in facts:
        from ckpt.ops import migrate_plain

        return Answer(migrate_plain.ask(job))
    with client.connect(str(facts["destination"]), purpose="check", **reached(facts)) as peer:
        answer = peer.call("status", {"job": facts["remote_job"]})
    if answer.get("machine") != facts.get("remote_machine"):
        raise StateUnknown(f"{facts['destination']} is another machine than the one that the migration went to")
    return Answer(str(answer["state"]), str(answer.get("memory", "all")), str(answer.get("reason", "")))


def follow_again(job: Job, container: Container, emit: Emit) -> None:
    """Post-copy whose link was cut: bring the destination the rest of the memory.

    Raises:
        NeedsContinue: cut again.
    """
    from ckpt.ops.postcopy import Follow

    facts = job.facts
    name, destination = str(facts.get("name")), str(facts["destination"])
    emit(StepStarted(name, "follow"))
    try:
        with client.connect(destination, **reached(facts)) as peer:
            assert container.pid is not None
            follow = Follow(peer, container.pid, {"job": facts["remote_job"]}, lambda done: emit(BytesMoved(name, "follow", done)))
            follow.wait()
    except CkptError as error:
        raise NeedsContinue(
            f"not all of the memory of {name} is on {destination}: {error.message}",
            where=f"{name} runs there and waits for its memory, which is in the frozen source here",
            hint=f"try again soon: ckpt migrate --continue {job.id}",
        ) from error
    emit(StepDone(name, "follow", f"{follow.sent_bytes / (1 << 20):.1f} MiB"))


def continue_(job_id: str, *, store_root: Path = DEFAULT_ROOT, emit: Emit) -> Outcome:
    """Finish a migration that was cut after its point of no return: end the source or let it go on, as the destination says."""
    from ckpt.engines import registry

    job = Job(place.jobs(store_root) / job_id)
    nothing = TargetNotFound(f"no migration {job_id} waits here", hint="look into the message of the migration that was cut")
    try:
        if "/" in job_id or not job.directory.is_dir() or job.facts.get("kind") != "migrate-source":
            raise nothing
        try:
            if not job.acquire():
                raise BusyError(f"migration {job_id} is under way")
        except FileNotFoundError:  # its guard has just put it away
            raise nothing from None
        facts = job.facts
        name = str(facts.get("name"))
        try:
            if not recover.committed(job):
                recover.settle(job)
                return Outcome(name, True, warnings=(f"{name} was running here already",))
            if not any(entry.get("state") == "commit" for entry in job.entries()):
                job.write("commit")  # its group was decided for
            engine = registry.by_name(str(facts["engine"]))
            container = Container(engine.name, str(facts["container_id"]), name, "running", pid=facts.get("init_pid"))
            with suppress(TargetNotFound):  # a process tree that has ended already cannot be described any more
                container = engine.describe(container)
            answer = ask_destination(job)
            state = answer.state
            if state == "undecided":
                raise NeedsContinue(
                    f"{facts['destination']} has not decided yet", where=f"{name} is frozen here", hint=f"try again: ckpt migrate --continue {job_id}"
                )
            if state == "running" and answer.memory == "waiting":
                follow_again(job, container, emit)
            with recover.uninterrupted():
                held = engine.adopt(container, job)
                if state == "lost":
                    # It ran there, so what is frozen here must never run again.
                    end_source(engine, container, held, job, keep=True)
                    tell_destination(job)
                    job.write("lost", reason=answer.reason[: recover.ERROR_CAP])
                    job.write("done")
                    recover.remove(job)
                    raise RestoreFailed(
                        f"{name} was lost on {facts['destination']} after the switchover: {answer.reason}",
                        where="nothing is running; the frozen source was ended, because its copy had run",
                        hint=f"restore an older checkpoint: ckpt list {name}",
                    )
                if state == "running":
                    if job.state != "ended":
                        end_source(engine, container, held, job, bool(facts.get("keep_source")))
                    hooks.settle(job, engine, "post-checkpoint", "post-migrate")
                    emit(Notice(name, f"{name} runs on {facts['destination']}; the frozen source was ended"))
                else:
                    held.resume()
                    knobs.restore(job)  # of a group: CRIU leaves a cgroup frozen that it found frozen
                    recover.announce_home(engine, container)
                    hooks.settle(job, engine, "checkpoint-failed", "migrate-failed")
                    job.write("failed")
                    emit(Notice(name, f"{facts['destination']} has no copy; {name} goes on here"))
            tell_destination(job)
            job.write("done")
            recover.remove(job)
            recover.settle_group_of(job, facts)
            return Outcome(name, True, container=container, record=history.load(store_root, job_id))
        finally:
            job.release()
    except CkptError as error:
        return failure(job_id, error)
