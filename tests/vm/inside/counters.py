"""Run in the machine: where all counters stand, as JSON; nothing is started for it but one program an engine.

python3 -m tests.vm.inside.counters [NAME=FILE …]      with files of process trees
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TICKS = "data/ticks"


def main(trees: list[str]) -> None:
    found: dict[str, dict[str, Any]] = {}
    for row in _rows("podman", "ps", "-a", "--format", "json"):
        found[row["Names"][0]] = {"state": row["State"], **_ticks(Path(f"/proc/{row['Pid']}/root") / TICKS if row["Pid"] else None)}
    for runtime in ("runc", "crun"):
        for row in _rows(runtime, "list", "--format", "json"):
            if len(row["id"]) < 64:  # the others are podman's
                alive = row["status"] == "running"
                found[row["id"]] = {"state": row["status"], **_ticks(Path(f"/proc/{row['pid']}/root") / TICKS if alive else None)}
    living = {}
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (proc / "cmdline").read_bytes().split(b"\0")
            if argv[0].endswith(b"/counter"):
                living[argv[1].decode()] = int(proc.name)
    for tree in trees:
        name, _, path = tree.partition("=")
        pid = living.get(path, 0)
        unit = Path(f"/proc/{pid}/cgroup").read_text().strip() if pid else ""
        found[name] = {"state": "running" if pid else "", "pid": pid, "cgroup": unit, **_ticks(Path(path))}
    print(json.dumps(found))


def _rows(*argv: str) -> list[dict[str, Any]]:
    return list(json.loads(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout or "[]") or [])


def _ticks(path: Path | None) -> dict[str, Any]:
    """`last`: the newest, -1 without any. `starts`: how often it began at 0. `whole`: each followed the one before."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = path.read_text().split("\n")[:-1] if path is not None else []
    ticks = [int(line.split()[0]) for line in lines if line[:1].isdigit()]  # after a power cut a file may have holes
    whole = all(after == before + 1 for before, after in zip(ticks, ticks[1:], strict=False))
    return {"last": ticks[-1] if ticks else -1, "starts": ticks.count(0), "whole": whole}


if __name__ == "__main__":
    main(sys.argv[1:])
