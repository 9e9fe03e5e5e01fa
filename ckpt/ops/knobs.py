"""Files of the workload's cgroup that an operation changes for a time: journalled first, so that whoever settles a dead job sets them back."""

from __future__ import annotations

from pathlib import Path

from ckpt.errors import CkptError
from ckpt.host.cgroup import Knob
from ckpt.store.job import Job


def journal(job: Job, knob: Knob) -> None:
    """Remember what a file has to hold at the end; before it is changed. Once for each file: the first value is the workload's own."""
    known = job.facts.get("knobs", {})
    path = str(knob.path)
    if path not in known:
        job.write(job.state, knobs={**known, path: knob.value})


def restore(job: Job) -> None:
    """Set back all that was journalled.

    Raises:
        CkptError: a file could not be set back.
    """
    failed: list[str] = []
    for path, value in job.facts.get("knobs", {}).items():
        try:
            Knob(Path(path), str(value)).restore()
        except OSError as error:
            failed.append(f"{path}: {error.strerror}")
    if failed:
        raise CkptError(f"cannot set back {', '.join(failed)}")
