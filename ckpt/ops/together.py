"""What saving and bringing back a group have in common: the group's job with its guard, and how several failures become outcomes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ckpt.errors import CkptError, DumpFailed, NoSpace, RestoreFailed
from ckpt.events import Emit, Event
from ckpt.host.run import Process
from ckpt.ops import groupjob, parallel, recover
from ckpt.ops.result import Outcome, failure
from ckpt.store.catalog import Catalog
from ckpt.store.job import Job
from ckpt.store.place import jobs as jobs_place


class GroupJob:
    """The group's own job, and its guard."""

    def __init__(self, catalog: Catalog, kind: Literal["checkpoint-group", "restore-group", "migrate-group"], name: str, **facts: Any) -> None:
        self.root = catalog.root
        self.job = Job.create(catalog.root, kind, name=name, **facts)
        self.guard: Process | None = recover.start_guard(self.job)

    @property
    def id(self) -> str:
        return self.job.id

    def withdraw(self, error: BaseException) -> None:
        """Every member is undone."""
        groupjob.withdraw(self.root, self.job.facts)
        self.job.write("rolled-back", error=str(error)[: recover.ERROR_CAP])
        recover.close(self.job, self.guard)

    def over(self) -> None:
        """Every member is through; or it is left to the guards, which look at this job's journal."""
        if any((jobs_place(self.root) / identity).is_dir() for identity in self.job.facts.get("jobs", ())):
            self.job.release()
            return
        self.job.write("done")
        recover.close(self.job, self.guard)


class Failed(Exception):
    """Some of the members failed; which and why is noted elsewhere."""


class NotAlone(DumpFailed):
    """A member that is undone because of another one."""


def one_at_a_time(emit: Emit) -> Emit:
    lock = threading.Lock()

    def emit_one(event: Event) -> None:
        with lock:
            emit(event)

    return emit_one


def settle(results: Mapping[str, object], failed: dict[str, BaseException]) -> None:
    """Note the failures, causes first; an interruption or a bug goes on as it is."""
    bad = {label: result for label, result in results.items() if isinstance(result, BaseException)}
    for label, error in sorted(bad.items(), key=lambda item: isinstance(item[1], (NotAlone, parallel.Dropped))):
        failed[label] = error
    for error in bad.values():
        if not isinstance(error, (Exception,)):
            raise error
    if bad:
        raise Failed


def outcomes_of(
    failed: Mapping[str, BaseException], said: Mapping[str, object], labels: Sequence[str], error: BaseException, kind: type[CkptError]
) -> list[Outcome]:
    """What is told of a group that was undone, causes first. Raises what is no failure of a member, a CkptError as `kind`."""
    where = "all of them run on" if kind is DumpFailed else "none of them runs; their checkpoints are still in the store"
    if not isinstance(error, Failed):
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (NoSpace if full else kind)(f"the group's journal cannot be written: {error.strerror}", where=where) from error
        if isinstance(error, CkptError) and not isinstance(error, (DumpFailed, RestoreFailed, NoSpace)):
            raise kind(error.message, where=error.where or where, hint=error.hint, log=error.log) from error
        raise error
    outcomes = []
    for label in dict.fromkeys([*failed, *labels]):
        told = said.get(label, failed.get(label))
        if isinstance(told, CkptError):
            outcomes.append(failure(label, told) if label else Outcome(labels[0], False, error=told))
        elif isinstance(told, BaseException):
            raise told
    return outcomes


def same(error: CkptError) -> CkptError:
    """An error of its own for each member: where it is now is added to it."""
    return type(error)(error.message)
