"""The guard of a job: a process of its own that waits for the owner's end, then settles what it left (see recover.py).

One runs beside every operation, nearly always to no purpose: what settling needs is imported when there is something to settle.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from ckpt.store import place
from ckpt.store.job import Job


def guard_main(directory: str) -> int:
    """The body of a guard: wait until the owner is gone, then settle what it left. Returns an exit status."""
    # Ctrl-C goes to the owner; the guard outlives whatever ends its terminal.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if Path(directory).parent.name == place.HIBERNATIONS:
        return _of_hibernation(Path(directory))
    job = Job(Path(directory))
    try:
        job.acquire(wait=True)
    except OSError:
        job.release()
        return 0  # the owner ended well and took the directory with it
    try:
        if not job.directory.is_dir():
            return 0

        from ckpt.errors import CkptError
        from ckpt.ops import recover
        from ckpt.store import volatile
        from ckpt.store.catalog import Catalog

        try:
            recover.settle(job)
            Catalog(recover.store_root(job)).sweep()
            volatile.sweep()
        except CkptError as error:
            sys.stderr.write(f"{error.message}\n")  # into guard.log; the directory stays for the next sweep
            return 1
    finally:
        job.release()
    return 0


def _of_hibernation(directory: Path) -> int:
    """One guard for all jobs of a hibernation: what its owner was saving goes on, or is ended, as each job's journal says."""
    from ckpt.store.hibernation import Hibernation

    hibernation = Hibernation(directory)
    hibernation.acquire(wait=True)
    try:
        from ckpt.ops import recover

        for line in recover.sweep(place.store_of(directory)):
            sys.stderr.write(line + "\n")
    finally:
        hibernation.release()
    return 0
