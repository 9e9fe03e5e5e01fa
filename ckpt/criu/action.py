"""CRIU's action-script: holds a dump at `post-dump` or a restore at `post-restore` until the job's owner decides.

Run by CRIU as a program of its own (`python -I -S action.py JOB`), so it imports nothing but the standard library and outlives
ckpt. Its exit status is the verdict (criu(8), ACTION SCRIPTS): at post-dump 0 ends the source and anything else resumes it, at
post-restore 0 lets the restored tree run and anything else kills it.

The verdict is a line read from the FIFO `JOB/verdict`. Every owner keeps that FIFO open for writing; end of file means that all
owners are dead. Then the journal decides: a job that reached `commit` goes on holding until a new owner comes
(`ckpt migrate --continue`), any other is undone. A job of a group has reached it when the group's has.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# A frozen workload waits for this program: it imports nothing that it can do without. `json` alone takes as long as Python's start.

HOLD = ("post-dump", "post-restore")
"""Where it holds; `hold.prepare` has it called for nothing else."""
GROUP = "group_job"
"""The fact in a job's first line that names the job of its group, beside its own directory: one decision for several."""


def word_of(journal: "Iterable[str]") -> "bool | None":
    """What the journal's lines decide: True, the point of no return was passed; False, a later line took that back; None, neither."""
    import json

    reached = None
    for line in journal:
        try:
            state = json.loads(line).get("state")
        except (ValueError, AttributeError, RecursionError):
            break
        if state == "commit":
            reached = True
        elif state in ("rolled-back", "failed"):
            reached = False
    return reached


def reached_commit(journal: "Iterable[str]") -> bool:
    """True when the journal's lines say that the point of no return was passed and no later line decided otherwise."""
    return word_of(journal) is True


def committed(job: str) -> bool:
    """`reached_commit` of a job's journal, or, as long as that says nothing, of that of the group's job that it belongs to."""
    try:
        with open(os.path.join(job, "journal.jsonl"), errors="replace") as journal:
            lines = journal.readlines()
    except OSError:
        return False
    word = word_of(lines)
    if word is not None:
        return word
    group = group_of(lines)
    return bool(group) and committed(os.path.join(os.path.dirname(os.path.abspath(job)), group))


def group_of(journal: "list[str]") -> str:
    """The id of the group's job that decides for this one, "" for none: a fact of the first line."""
    import json

    try:
        return os.path.basename(str(json.loads(journal[0]).get(GROUP, "")))
    except (IndexError, ValueError, AttributeError, RecursionError):
        return ""


def note(job: str, name: str, text: str) -> None:
    """Write a marker file so that it is whole or not there, into the block that was laid aside for it: a full disk must not hide it."""
    path = os.path.join(job, name)
    fd = os.open(path + ".part", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(fd, text.encode())
    os.close(fd)
    os.rename(path + ".part", path)


def wait(job: str) -> int:
    """Block until a verdict comes; 0 or 1."""
    fifo = os.path.join(job, "verdict")
    # The writers have the FIFO open already, so this does not block; should they be gone, O_RDWR could never see it.
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(fd, True)
    while True:
        data = os.read(fd, 16)
        if data:
            return 0 if data.lstrip().startswith(b"0") else 1
        if not committed(job):
            return 1
        os.close(fd)
        fd = os.open(fifo, os.O_RDONLY)  # committed: block until a new owner opens it


def main() -> int:
    action = os.environ.get("CRTOOLS_SCRIPT_ACTION", "")
    if action not in HOLD:
        return 0
    job = sys.argv[1]
    if not os.path.isdir(job):
        return 1
    init_pid = "".join(filter(str.isdigit, os.environ.get("CRTOOLS_INIT_PID", "")))
    note(job, "held", f'{{"action": "{action}", "init_pid": "{init_pid}", "pid": {os.getpid()}, "criu_pid": {os.getppid()}}}')
    return wait(job)


if __name__ == "__main__":
    sys.exit(main())
