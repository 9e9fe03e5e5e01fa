"""A group that comes here: its members arrive over links of their own, so in processes of their own, and one of them decides for all.

Whoever undoes a member forbids the decision before it (groupjob.abandon); whoever decides looks, with the same lock, whether all are held.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from ckpt.criu import action
from ckpt.errors import BusyError, UsageError
from ckpt.host.run import Process
from ckpt.ops import faults, groupjob, recover
from ckpt.store import groups, place
from ckpt.store.job import Job

MEMBERS_CAP: Final = 256
_JOB_ID: Final = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")


def join(root: Path, args: dict[str, Any], source: str) -> tuple[Lead | None, dict[str, str]]:
    """What `begin` says of a group: the one that decides names it (`group`), the others name its job here (`group_job`).

    Returns:
        The group's job if it was made now, and what the member's journal has to say of it.

    Raises:
        UsageError: there is no such group.
    """
    if args.get("group"):
        lead = Lead(root, str(args["group"]), source)
        return lead, {action.GROUP: lead.job.id}
    identity = args.get(action.GROUP)
    if not identity:
        return None, {}
    job = Job(place.jobs(root) / str(identity))
    if not _JOB_ID.fullmatch(str(identity)) or job.facts.get("kind") != groupjob.RECEIVE or job.facts.get("source") != source:
        raise UsageError("there is no such group here")
    return None, {action.GROUP: job.id}


class Lead:
    """The group's job; its owner is the process of one member."""

    def __init__(self, root: Path, name: str, source: str) -> None:
        self.job = Job.create(root, groupjob.RECEIVE, name=groups.check_name(name), source=source)
        self.guard: Process | None = recover.start_guard(self.job)

    def decide(self, identities: object) -> None:
        """Write the one line, if every member is held and has its owner.

        Raises:
            UsageError: these are no members of the group.
            BusyError: one of them was undone, or is about to be. The group never comes to be then.
        """
        try:
            members = self._members(identities)
            with ExitStack() as stack:
                for member in members:
                    # As long as we have it open, CRIU's action-script does not take the end of its owner for the end of all.
                    fd = os.open(member.verdict_path, os.O_RDWR | os.O_CLOEXEC)
                    stack.callback(os.close, fd)
                stack.enter_context(groupjob.deciding(self.job))
                for member in members:
                    if member.state != "prepared" or not _has_owner(member):
                        raise BusyError(f"{member.facts.get('name')} is not held here any more")
                if self.job.state != "started":
                    raise BusyError("a member of the group was undone here")
                faults.point("destination-group-commit")
                self.job.write("commit", jobs=[member.id for member in members])
                faults.point("destination-group-committed")
        except BaseException:
            if recover.committed(self.job):
                return  # what went wrong after the line does not take it back: the source must not hear of a refusal
            self.job.write("rolled-back")
            raise

    def _members(self, identities: object) -> list[Job]:
        if not isinstance(identities, list) or not 0 < len(identities) <= MEMBERS_CAP:
            raise UsageError("a group has members")
        members = [Job(self.job.directory.parent / str(identity)) for identity in identities]
        for member in members:
            if not _JOB_ID.fullmatch(member.id) or member.facts.get(action.GROUP) != self.job.id:
                raise BusyError(f"{member.id} is no member of the group here")
        return members

    def leave(self) -> None:
        """The member whose process this is, is over: so is the group's job, unless another one still needs its line. Its guard sees to that."""
        if not self.job.directory.is_dir():
            return
        if not recover.committed(self.job):
            self.job.write("rolled-back")
        elif all(groupjob.has_word(Job(self.job.directory.parent / str(identity))) for identity in self.job.facts.get("jobs", ())):
            self.job.write("done")
        else:
            self.job.release()
            return
        recover.close(self.job, self.guard)


def _has_owner(job: Job) -> bool:
    """Whether the process that restored it has its lever open: it has not ended, and had not when somebody else opened it too."""
    try:
        wanted = os.stat(job.verdict_path)
        directory = f"/proc/{int(job.facts.get('owner_pid', 0))}/fd"
        for name in os.listdir(directory):
            with suppress(OSError):
                found = os.stat(f"{directory}/{name}")
                if stat.S_ISFIFO(found.st_mode) and os.path.samestat(found, wanted):
                    return True
    except (OSError, ValueError):
        pass
    return False
