"""The largest resident set of every ckpt process on the lab's hosts, watched from outside."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from ckpt.cli.app import VERBS
from tests.lab.harness import Host

INTERVAL_S = 0.05


class PeakWatcher:
    """Samples VmHWM (proc_pid_status(5): the kernel's own high-water mark, so what lies between two samples is seen too) while it is open.

    ckpt is what Python runs directly in a host's pid namespace: nothing else there is written in Python. Processes are told apart by their
    verb and host: "migrate@a", "peer@b", "guard@a".
    """

    def __init__(self, hosts: Iterable[Host]) -> None:
        self._namespaces = {os.readlink(f"/proc/{host.pid}/ns/pid"): host.name for host in hosts}
        self._others: set[str] = set()
        self._host_of: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes: dict[str, int] = {}

    def __enter__(self) -> PeakWatcher:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            pids = {entry for entry in os.listdir("/proc") if entry.isdigit()}
            self._others &= pids
            for pid in pids - self._others:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    self._sample(pid)

    def _sample(self, pid: str) -> None:
        if pid not in self._host_of:
            host = self._namespaces.get(os.readlink(f"/proc/{pid}/ns/pid"))
            if host is None:
                self._others.add(pid)
                return
            self._host_of[pid] = host
        proc = Path("/proc", pid)
        if not Path(os.readlink(proc / "exe")).name.startswith("python"):  # asked anew each time: it may be on its way to another program
            return
        peak = max(int(line.split()[1]) << 10 for line in (proc / "status").read_text().splitlines() if line.startswith("VmHWM:"))
        role = f"{_verb((proc / 'cmdline').read_bytes())}@{self._host_of[pid]}"
        self.peak_bytes[role] = max(peak, self.peak_bytes.get(role, 0))


def _verb(cmdline: bytes) -> str:
    """ckpt's verb; of what ckpt starts by `python -c`, the function that is called; of another script its name."""
    words = [word for word in cmdline.decode(errors="replace").split("\0")[1:] if word]
    if words[:1] == ["-c"] or "-c" in words[:4]:
        code = words[words.index("-c") + 1] if words.index("-c") + 1 < len(words) else ""
        called = re.findall(r"\b(\w+)_main\b", code)
        return called[0] if called else "unpack" if "extraction" in code else "python"
    names = [Path(word).name for word in words if not word.startswith("-")]
    if names[:1] == ["ckpt"]:
        return next((name for name in names[1:] if name in VERBS), "ckpt")
    return names[0] if names else "python"
