"""memhog in a container or as a process: started, read from outside, checked."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from tests.bench.cases import HIBERNATED, Case
from tests.lab.harness import Host, Lab, Ticks

SETTLE_LIMIT_S = 120.0


class WorkloadError(RuntimeError):
    """The workload does not run, or is not what it was: the measurement does not count."""


@dataclass(slots=True)
class Hog:
    """The workload; `host` is where it is now."""

    host: Host
    case: Case
    pid: str = ""

    @property
    def target(self) -> str:
        return f"pid:{self.pid}" if self.case.runtime == "process" else "hog"

    @property
    def name(self) -> str:
        """As the store has it."""
        return f"memhog-{self.pid}" if self.case.runtime == "process" else "hog"

    def start(self) -> None:
        arguments = [str(self.case.memory_mib), str(self.case.dirty_mb_s)]
        if self.case.runtime == "process":
            self.host.run(["mkdir", "-p", "/srv/hog"])
            # A high pid: it must be free on the other host too.
            script = 'echo 20000 >/proc/sys/kernel/ns_last_pid; setsid /opt/lab/bin/memhog "$@" /srv/hog/ticks </dev/null >/dev/null 2>&1 & echo $!'
            self.pid = self.host.run(["sh", "-c", script, "sh", *arguments]).stdout.strip()
        else:
            self.host.run(["podman", "run", "-d", "--name", "hog", self.host.load_image(), "memhog", *arguments, "/data/ticks"])

    def ticks(self) -> Ticks | None:
        """All ticks so far, without running anything in the host; None while it does not run."""
        try:
            if self.case.runtime == "process":
                return Ticks.parse((self.host.root / "srv/hog/ticks").read_bytes())
            if not self.pid:
                said = self.host.run(["podman", "container", "inspect", "--format", "{{.State.Pid}}", "hog"], check=False)
                self.pid = said.stdout.strip() if said.returncode == 0 and said.stdout.strip() != "0" else ""
            if not self.pid:
                return None
            return Ticks.parse((self.host.root / "proc" / self.pid / "root/data/ticks").read_bytes())
        except OSError:
            if self.case.runtime != "process":
                self.pid = ""
            return None

    def moved(self, host: Host) -> None:
        self.host = host
        if self.case.runtime != "process":
            self.pid = ""

    def wait(self, more: int) -> Ticks:
        """Wait for `more` ticks from now on.

        Raises:
            WorkloadError: they don't come.
        """
        goal, last, changed = -1, -1, time.monotonic()
        while True:
            found = self.ticks()
            if found and found.numbers:
                goal = found.last + more if goal < 0 else goal
                if found.last >= goal:
                    return found
                if found.last != last:
                    last, changed = found.last, time.monotonic()
            if time.monotonic() - changed > SETTLE_LIMIT_S:
                raise WorkloadError(f"{self.target} does not count on {self.host.name}: {self._said()}")
            time.sleep(0.1)

    def whole(self, since: int = 0) -> Ticks:
        """Wait until it has looked at every page once more, and check that no tick is missing.

        Raises:
            WorkloadError: a page was wrong (memhog ended), or the count is broken.
        """
        # memhog checks at most 5 MiB of its memory a tick.
        ticks = self.wait(max(100, self.case.memory_mib // 5 + 1)).after(since)
        if ticks.breaks:
            raise WorkloadError(f"the count is broken: {ticks.breaks[:3]}")
        return ticks

    def _said(self) -> str:
        if self.case.runtime == "process":
            return f"process {self.pid}"
        state = self.host.run(["podman", "container", "inspect", "--format", "{{json .State}}", "hog"], check=False)
        try:
            found = json.loads(state.stdout)
            return f"{found['Status']}, exit code {found['ExitCode']}"
        except (ValueError, KeyError, TypeError):
            return "no such container"


def stalls_s(ticks: Ticks, least_s: float = 0.1) -> float:
    """All gaps of at least `least_s` but the longest: what the workload stood still besides its downtime."""
    gaps = sorted((later - earlier) / 1e9 for earlier, later in zip(ticks.times_ns, ticks.times_ns[1:], strict=False))
    return sum(gap for gap in gaps[:-1] if gap >= least_s)


def first_after(ticks: Ticks, moment_ns: int) -> int | None:
    """Time of the first tick after a moment of the wall clock, in nanoseconds."""
    return next((when for when in ticks.times_ns if when > moment_ns), None)


def room_mib(lab_case: Case) -> int:
    """Size for each of a host's file systems: a memory image may be there twice, with an archive of it (podman leaves one with each copy)."""
    return lab_case.memory_mib * {"clone": 12, "hibernate": 3 * HIBERNATED}.get(lab_case.kind, 3) + 1024


def lab_for(case: Case, **options: object) -> Lab:
    room = room_mib(case)
    runtime = "runc" if case.runtime == "runc" else "crun"
    return Lab(runtime=runtime, containers_mib=room, store_mib=room, root_mib=room, **options)  # type: ignore[arg-type]
