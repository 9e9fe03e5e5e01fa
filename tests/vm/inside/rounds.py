"""Run in the machine: rounds of pre-copy over a podman container's memory, with nobody to send it to; prints what was seen as JSON.

python3 -m tests.vm.inside.rounds PID SECONDS
"""

from __future__ import annotations

import json
import os
import sys
import time

from ckpt.criu import softdirty, tree
from ckpt.criu.digests import DigestTable
from ckpt.criu.livemem import LiveMemory, Run
from ckpt.host.cgroup import Freezer
from ckpt.host.procmem import PAGE


def main(pid: int, pause_s: float) -> None:
    tracker = softdirty.choose()
    assert tracker is not None, "this kernel has no soft-dirty marks"
    live = LiveMemory(lambda: tree.pids(pid), tracker=tracker)
    table, rounds = DigestTable(), []
    held: dict[tuple[int, int], bytes] = {}

    def scan() -> dict[str, object]:
        now: dict[tuple[int, int], bytes] = {}
        for step in live.scan(table):
            for n in range(len(step.pages) // PAGE if isinstance(step, Run) else step.page_count):
                key = (step.pid, step.vaddr + n * PAGE)
                now[key] = step.pages[n * PAGE : (n + 1) * PAGE].tobytes() if isinstance(step, Run) else held[key]
        held.clear()
        held.update(now)
        seen = live.statistics
        return {
            "read": seen.scanned_bytes,
            "sent": seen.changed_bytes,
            "settled": seen.settled_bytes,
            "stopped_s": tracker.stopped_s,
            "reason": tracker.reason,
        }

    for _ in range(3):
        rounds.append(scan())
        time.sleep(pause_s)
    with Freezer.of(tree.pids(pid)).frozen():  # as at the end: nothing of it runs, and what is held must be what it has
        last = scan()
        wrong = []
        for (owner, vaddr), page in held.items():
            with open(f"/proc/{owner}/mem", "rb", buffering=0) as memory:
                if os.pread(memory.fileno(), PAGE, vaddr) != page:
                    wrong.append(hex(vaddr))
    print(json.dumps({"rounds": rounds, "last": last, "wrong": wrong, "pages": len(held)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
