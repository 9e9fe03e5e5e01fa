"""The record of a migration: what its events say, put together for `--format json` and for the store's history."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckpt.archive import layout
from ckpt.errors import CkptError, NeedsContinue, StateUnknown
from ckpt.events import BytesMoved, Emit, Event, Figures, Frozen, RoundDone, StepDone, StepStarted, Thawed
from ckpt.model import Container, JobRecord
from ckpt.ops import capture, journald
from ckpt.ops.result import Outcome
from ckpt.store import history, place
from ckpt.store.job import Job, new_id

if TYPE_CHECKING:
    from ckpt.ops.migrate import MigrateOptions


def mode_of(options: MigrateOptions) -> str:
    """How the memory goes over, in one word."""
    return "post-copy" if options.postcopy else "pre-copy" if options.precopy else "stop-and-copy"


def of_hosts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Which versions met: of this host, and of the destination as it reports them."""
    here, there = capture.host_facts(), dict(report.get("facts") or {})
    return {
        "versions": {
            "source": {"hostname": here.hostname, "ckpt": here.ckpt_version, "criu": here.criu_version, "kernel": here.kernel},
            "destination": {
                **{key: str(there.get(name, "")) for key, name in (("hostname", "hostname"), ("ckpt", "ckpt_version"))},
                **{key: str(there.get(name, "")) for key, name in (("criu", "criu_version"), ("kernel", "kernel"))},
                "engine": str((report.get("engine") or {}).get("version", "")),
            },
        }
    }


def of_members(sizes_bytes: Mapping[str, int]) -> dict[str, Any]:
    """The sizes of a checkpoint's members, by kind."""
    kinds = {"memory": 0, "criu_images": 0, "rootfs": 0, "volumes": 0, "other": 0}
    for name, size in sizes_bytes.items():
        head = name.partition("/")[0]
        if name in (layout.ROOTFS_DIFF, layout.DELETED_FILES):
            kind = "rootfs"
        elif layout.is_pages(name):
            kind = "memory"
        else:
            kind = {"checkpoint": "criu_images", "volumes": "volumes"}.get(head, "other")
        kinds[kind] += size
    return {"bytes": {kind: count for kind, count in kinds.items() if count}}


_KINDS: Final = {
    "precopy": "memory_ahead",
    "pages": "memory",
    "follow": "memory_after",
    "files": "files_ahead",
    "capture": "files",
    "transfer": "checkpoint",
}
"""Step -> the kind of what it moves."""


class Migration:
    """The events of one migration pass through here (it is an `Emit`), and become its record in the end."""

    def __init__(self, typed: str, destination: str, mode: str, root: Path, emit: Emit) -> None:
        self._emit = emit
        self._root = root
        self._typed = typed
        self._destination = destination
        self._mode = mode
        self._container: Container | None = None
        self._job_id = ""
        self._began_s, self._clock_s = time.time(), time.monotonic()
        self._started: dict[str, float] = {}
        self._steps: dict[str, float] = {}
        self._moved: dict[str, int] = {}
        self._rounds: list[dict[str, Any]] = []
        self._frozen_at_s: float | None = None
        self._dumped_at_s: float | None = None
        self._downtime_s: float | None = None
        self._figures: dict[str, Any] = {}

    def begin(self, container: Container) -> None:
        """The workload is known: from here on there is something to remember."""
        self._container = container

    def __call__(self, event: Event) -> None:
        now_s = time.monotonic()
        match event:
            case StepStarted():
                self._started[event.step] = now_s
            case StepDone():
                if event.step in self._started:
                    self._steps[event.step] = round(now_s - self._started[event.step], 6)
                if event.step == "dump":
                    self._dumped_at_s = now_s
            case BytesMoved():
                self._moved[event.step] = event.done_bytes
            case Frozen():
                self._frozen_at_s = event.at_s
            case Thawed():
                self._downtime_s = event.frozen_s
            case RoundDone():
                self._round(event)
            case Figures():
                self._add(event.values)
        self._emit(event)

    def _add(self, values: Mapping[str, Any]) -> None:
        values = dict(values)
        self._job_id = str(values.pop("job", self._job_id))
        self._mode = str(values.pop("mode", self._mode))
        self._figures |= values

    def _round(self, event: RoundDone) -> None:
        # What a round finds changed was written since the round before looked.
        before_s = self._rounds[-1]["duration_s"] if self._rounds else 0.0
        self._rounds.append({
            "number": event.number,
            "scanned_bytes": event.scanned_bytes,
            "sent_bytes": event.sent_bytes,
            "duration_s": round(event.duration_s, 6),
            "dirty_bytes_per_s": round(event.sent_bytes / before_s) if before_s else None,
        })  # fmt: skip

    def close(self, outcome: Outcome) -> Outcome:
        """The migration is over: its record is kept, and goes with the outcome."""
        record = self._keep(outcome.error, outcome.stats)
        return replace(outcome, record=record)

    def broken_off(self, error: BaseException) -> None:
        """It ends with something else than an outcome: a signal, a bug."""
        said = error if isinstance(error, CkptError) else CkptError(str(error) or type(error).__name__)
        self._keep(said, {})

    def _keep(self, error: CkptError | None, stats: Mapping[str, Any]) -> JobRecord | None:
        if self._container is None:
            return None
        job = Job(place.jobs(self._root) / (self._job_id or new_id()))
        waits = isinstance(error, NeedsContinue | StateUnknown)
        record = JobRecord(
            id=job.id,
            kind="migrate",
            state="waiting" if waits else "done" if error is None else "rolled-back" if self._job_id else "refused",
            name=self._container.name or self._typed,
            engine=self._container.engine,
            container_id=self._container.id,
            destination=self._destination,
            mode=self._mode,
            started_s=self._began_s,
            ended_s=None if waits else time.time(),
            next=f"ckpt migrate --continue {job.id}" if waits else "",
            error=error.to_json() if error else None,
            statistics=self._statistics(stats),
        )
        journald.record(record)
        if job.directory.is_dir():
            history.stash(job, record)  # somebody else brings it to its end
        else:
            history.keep(self._root, record)
        return record

    def _statistics(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        dump_s = self._steps.get("dump")
        if self._frozen_at_s is not None and self._dumped_at_s is not None:
            dump_s = round(self._dumped_at_s - self._frozen_at_s, 6)
        sent = {_KINDS.get(step, step.replace("-", "_")): count for step, count in self._moved.items()}
        if self._rounds:
            sent["memory_ahead"] = sum(one["sent_bytes"] for one in self._rounds)
        found: dict[str, Any] = {
            "freeze_s": dump_s,
            "downtime_s": stats.get("downtime_s", self._downtime_s),
            "total_s": stats.get("total_s", time.monotonic() - self._clock_s),
            "sent_bytes": stats.get("sent_bytes", sum(sent.values())),
            "memory_bytes": self._rounds[0]["scanned_bytes"] if self._rounds else sent.get("memory"),
            "compression": stats.get("compress"),
            "compression_ratio": stats.get("compress_ratio"),
            "memory_tracker": stats.get("memory_tracker"),
            "wire_bytes": {key.removesuffix("_wire_bytes"): count for key, count in stats.items() if key.endswith("_wire_bytes")} or None,
            "rounds": self._rounds,
            "steps": self._steps,
            **self._figures,
        }
        kinds = found.get("bytes", {})
        found["bytes"] = {**{kind: count for kind, count in sent.items() if not kinds or kind != "checkpoint"}, **kinds}
        for name in ("freeze_s", "downtime_s", "total_s"):
            found[name] = None if found[name] is None else round(found[name], 6)
        return {name: value for name, value in found.items() if value is not None}
