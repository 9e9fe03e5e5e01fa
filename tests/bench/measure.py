"""One measurement: fresh hosts, the workload, one way to save or move it, and a look whether it is whole."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tests.bench.cases import COPIES, DIRTIED, GENERATIONS, HIBERNATED, MIGRATE_FLAGS, Case
from tests.bench.rss import PeakWatcher
from tests.bench.workload import Hog, WorkloadError, first_after, lab_for, stalls_s
from tests.lab.harness import Host, Lab

Figures = dict[str, float]
"""Seconds (`_s`), bytes (`_bytes`) and counts."""
OWN_TIMES = 5
"""An own-share measurement is a median of so many dumps, after one that does not count."""


class Skipped(Exception):
    """This ckpt does not know that way."""


def limit_s(case: Case) -> float:
    """Time limit of one command: several times what the slowest way needs."""
    wire_s = case.memory_mib * 8.4 / case.link_mbit if case.link_mbit else 0.0
    return 120.0 + case.memory_mib * 0.15 + 3 * wire_s


def measure(case: Case, way: str, wheel: Path) -> tuple[Figures, dict[str, int]]:
    """One case done one way: its figures, and the peak of memory of each ckpt process.

    Raises:
        CommandError, WorkloadError, LabUnavailable: it does not count.
        Skipped: there is no such way.
    """
    with lab_for(case, wheel=wheel) as lab, PeakWatcher(lab) as peaks:
        kinds = {
            "migrate": _migrate, "store": _store, "dedup": _dedup, "archive": _archive, "own": _own, "clone": _clone, "hibernate": _hibernate,
        }  # fmt: skip
        figures = kinds[case.kind](lab, case, way)
    return {key: round(value, 4) for key, value in figures.items()}, dict(sorted(peaks.peak_bytes.items()))


# -- to the other host --------------------------------------------------------------------------------------------------------------


def _migrate(lab: Lab, case: Case, way: str) -> Figures:
    flags = MIGRATE_FLAGS.get(way, ())
    known = lab.a.run(["ckpt", "migrate", "--help"]).stdout if flags else ""
    if missing := [flag for flag in flags if flag.startswith("--") and flag not in known]:
        raise Skipped(f"this ckpt has no {' '.join(missing)}")
    lab.b.load_image()  # podman's way needs it there
    hog = Hog(lab.a, case)
    hog.start()
    before = hog.wait(50).last
    lab.limit_rate(case.link_mbit or None)
    limit, said = limit_s(case), {}
    sent, began_s = lab.received_bytes("b"), time.monotonic()
    if way == "podman":
        _podman_migrates(lab, limit)
    else:
        said = _stats(lab.a.run(["ckpt", "--format", "json", "migrate", *flags, hog.target, "root@b"], timeout_s=limit).stdout)
    total_s, sent = time.monotonic() - began_s, lab.received_bytes("b") - sent
    hog.moved(lab.b)
    ticks = hog.whole(before)
    said |= {"total_s": total_s, "downtime_s": ticks.longest_gap_s, "stalls_s": stalls_s(ticks), "sent_bytes": sent}
    return said


def _podman_migrates(lab: Lab, limit: float) -> None:
    lab.a.run(["podman", "container", "checkpoint", "-c", "zstd", "-e", "/root/hog.tar.zst", "hog"], timeout_s=limit)
    lab.a.run(["scp", "-q", "/root/hog.tar.zst", "b:/root/"], timeout_s=limit)
    lab.b.run(["podman", "container", "restore", "-i", "/root/hog.tar.zst"], timeout_s=limit)


def _stats(stdout: str) -> Figures:
    """What ckpt itself says about it, under names of their own."""
    row = json.loads(stdout)["results"][0]
    return {f"said_{key}": value for key, value in row.get("stats", {}).items() if isinstance(value, (int, float))}


# -- to the store and back, on one host -----------------------------------------------------------------------------------------------


def _store(lab: Lab, case: Case, way: str) -> Figures:
    """`checkpoint_s`, `restore_s`, `lazy_s`: the commands. `stopped_s`: from the last tick to the end of the checkpoint's command.
    `back_s`, `lazy_back_s`: from the start of the restore's command to the first tick."""
    host, limit = lab.a, limit_s(case)
    hog = Hog(host, case)
    hog.start()
    hog.wait(50)
    last_ns = 0

    def save() -> None:
        if way == "podman":
            host.run(["podman", "container", "checkpoint", "-c", "zstd", "-e", "/root/hog.tar.zst", "hog"], timeout_s=limit)
        else:
            host.run(["ckpt", "checkpoint", hog.target], timeout_s=limit)

    def bring(*flags: str) -> None:
        if way == "podman":
            host.run(["podman", "container", "restore", "-i", "/root/hog.tar.zst"], timeout_s=limit)
        else:
            host.run(["ckpt", "restore", *flags, hog.name], timeout_s=limit)

    figures = {"checkpoint_s": _timed(save)}
    saved_ns = time.time_ns()
    restores = {"restore_s": ("back_s", ())} if way == "podman" else {"restore_s": ("back_s", ()), "lazy_s": ("lazy_back_s", ("--lazy",))}
    for command, (back, flags) in restores.items():
        if way == "podman":
            host.run(["podman", "rm", "hog"])  # it refuses to restore over what has ended; ckpt does not
        elif last_ns:
            host.run(["podman", "kill", "hog"])
        hog.moved(host)
        asked_ns = time.time_ns()
        figures[command] = _timed(lambda flags=flags: bring(*flags))  # type: ignore[misc]
        ticks = hog.whole()
        first_ns = first_after(ticks, asked_ns)
        if first_ns is None:
            raise WorkloadError("no tick after the restore")
        figures[back] = (first_ns - asked_ns) / 1e9
        if not last_ns:
            last_ns = max(when for when in ticks.times_ns if when < saved_ns)
            figures["stopped_s"] = (saved_ns - last_ns) / 1e9
    return figures


def _dedup(lab: Lab, case: Case, way: str) -> Figures:
    """`podman_archive_s`, `archive_s`: an archive with zstd of the running container, by podman and by ckpt. `first_s`, `later_s`: a checkpoint
    of it to the empty store, and the median of those that follow. `growth`: size of the store after all of them to that after the first."""
    host, limit = lab.a, limit_s(case)
    hog = Hog(host, case)
    hog.start()
    hog.wait(50)
    podman = ["podman", "container", "checkpoint", "-R", "-c", "zstd", "-e", "/root/podman.tar.zst", "hog"]
    figures = {"podman_archive_s": _timed(lambda: host.run(podman, timeout_s=limit))}
    host.run(["rm", "/root/podman.tar.zst"])
    figures["archive_s"] = _timed(lambda: host.run(["ckpt", "export", "-R", "podman:hog", "-o", "/root/ckpt.tar.zst"], timeout_s=limit))
    host.run(["rm", "/root/ckpt.tar.zst"])
    # memhog takes its pages by chance, some of them twice.
    ticks = math.ceil(-math.log(1 - DIRTIED) * case.memory_mib * (1 << 20) / (case.dirty_mb_s * 1e6 / 100))
    took: list[float] = []
    sizes: list[int] = []
    for _ in range(GENERATIONS):
        began = hog.wait(1).last
        took.append(_timed(lambda: host.run(["ckpt", "checkpoint", "-R", "hog"], timeout_s=limit)))
        sizes.append(int(host.run(["du", "-s", "--block-size=1", "/var/lib/ckpt"]).stdout.split()[0]))
        while (found := hog.ticks()) is None or found.last < began + ticks:
            hog.wait(1)
    hog.whole()
    figures |= {"first_s": took[0], "later_s": median(took[1:]), "first_bytes": sizes[0], "last_bytes": sizes[-1], "growth": sizes[-1] / sizes[0]}
    return figures


def _archive(lab: Lab, case: Case, way: str) -> Figures:
    """`export_s`, `sealed_s`: a checkpoint of the store as an archive, and encrypted; the better of two each. `inspect_s`,
    `checkpointctl_s`: a look into the archive, by ckpt and by checkpointctl, the better of three."""
    host, limit = lab.a, limit_s(case)
    hog = Hog(host, case)
    hog.start()
    hog.wait(50)
    host.run(["ckpt", "checkpoint", hog.target], timeout_s=limit)
    host.run(["sh", "-c", "umask 077; age-keygen -o /root/key.txt"])
    recipient = host.run(["age-keygen", "-y", "/root/key.txt"]).stdout.strip()
    plain = ["ckpt", "export", hog.name, "-o", "/root/plain.tar.zst"]
    sealed = ["ckpt", "export", hog.name, "-o", "/root/sealed.age", "--encrypt", f"age:{recipient}"]
    took: dict[str, list[float]] = {}
    for _ in range(2):
        for figure, argv in (("export_s", plain), ("sealed_s", sealed)):
            host.run(["rm", "-f", argv[4]])
            took.setdefault(figure, []).append(_timed(lambda argv=argv: host.run(argv, timeout_s=limit)))  # type: ignore[misc]
    for _ in range(3):
        for figure, program in (("inspect_s", "ckpt"), ("checkpointctl_s", "checkpointctl")):
            argv = [program, "inspect", "/root/plain.tar.zst"]
            took.setdefault(figure, []).append(_timed(lambda argv=argv: host.run(argv, timeout_s=limit)))  # type: ignore[misc]
    return {figure: min(times) for figure, times in took.items()}


# -- copies ---------------------------------------------------------------------------------------------------------------------------

SERVED = """
port=$1; shift
for address in $(podman container inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}' "$@"); do
    timeout 30 bash -c 'until exec 3<>"/dev/tcp/$0/$1"; do :; done 2>/dev/null; cat <&3' "$address" "$port" || exit 1
done
"""
"""Asks each container once; prints what they answer."""


def _clone(lab: Lab, case: Case, way: str) -> Figures:
    """`command_s`: to make the copies of a checkpoint. `serving_s`: until each of them has answered, too. `pss_bytes`, `resident_bytes`: of all
    copies together after that; `helpers_bytes`: of the processes that serve them their memory."""
    host, limit, port = lab.a, limit_s(case) * 2, "7000"
    host.run(["podman", "run", "-d", "--name", "web", host.load_image(), "warm", str(case.memory_mib), port, "0", "/data/starts"])
    host.run(["bash", "-c", SERVED, "ask", port, "web"], timeout_s=limit)
    copies = [f"web-{number}" for number in range(1, COPIES + 1)]
    if way == "podman":
        host.run(["podman", "container", "checkpoint", "-R", "-c", "zstd", "-e", "/root/web.tar.zst", "web"], timeout_s=limit)
    else:
        host.run(["ckpt", "checkpoint", "-R", "web"], timeout_s=limit)

    def make() -> None:
        if way == "podman":
            for name in copies:
                host.run(["podman", "container", "restore", "-i", "/root/web.tar.zst", "-n", name], timeout_s=limit)
        else:
            host.run(["ckpt", "clone", "web@latest", "--count", str(COPIES)], timeout_s=limit)

    began_s = time.monotonic()
    make()
    figures = {"command_s": time.monotonic() - began_s}
    answers = host.run(["bash", "-c", SERVED, "ask", port, *copies], timeout_s=limit).stdout.split()
    figures["serving_s"] = time.monotonic() - began_s
    if answers != ["2"] * COPIES:
        raise WorkloadError(f"the copies answered {answers}")
    pids = host.run(["podman", "container", "inspect", "--format", "{{.State.Pid}}", *copies]).stdout.split()
    figures["pss_bytes"], figures["resident_bytes"] = _memory(host, pids)
    helpers = host.run(["sh", "-c", "grep -lE 'lazy-pages|keeper_main' /proc/[0-9]*/cmdline | cut -d/ -f3; true"]).stdout.split()
    figures["helpers_bytes"] = _memory(host, helpers)[0]
    return figures


def _memory(host: Host, pids: list[str]) -> tuple[float, float]:
    """Proportional and resident memory of processes, in bytes."""
    sums = {"Pss:": 0, "Rss:": 0}
    for pid in pids:
        for line in host.run(["cat", f"/proc/{pid}/smaps_rollup"], check=False).stdout.splitlines():
            if (words := line.split()) and words[0] in sums:
                sums[words[0]] += int(words[1]) * 1024
    return float(sums["Pss:"]), float(sums["Rss:"])


def _timed(act: Callable[[], object]) -> float:
    began_s = time.monotonic()
    act()
    return time.monotonic() - began_s


# -- what ckpt adds to CRIU -------------------------------------------------------------------------------------------------------------


def _own(lab: Lab, case: Case, way: str) -> Figures:
    """Dumps and restores of one small process, each the median of several."""
    took: dict[str, list[float]] = {"checkpoint_s": [], "restore_s": []}
    for number in range(OWN_TIMES + 1):
        hog = Hog(lab.a, case)
        lab.a.run(["rm", "-rf", "/srv/hog"])
        hog.start()
        hog.wait(5)
        directory = f"/var/lib/ckpt/criu-{number}"
        if way == "criu":
            lab.a.run(["mkdir", "-p", directory])
        dump = ["criu", "dump", "-t", hog.pid, "-D", directory] if way == "criu" else ["ckpt", "checkpoint", hog.target]
        restore = ["criu", "restore", "-d", "-D", directory] if way == "criu" else ["ckpt", "restore", hog.name]
        took["checkpoint_s"].append(_timed(lambda dump=dump: lab.a.run(dump)))  # type: ignore[misc]
        took["restore_s"].append(_timed(lambda restore=restore: lab.a.run(restore)))  # type: ignore[misc]
        hog.wait(5)
        _end(lab.a, hog.pid)
    return {key: median(times[1:]) for key, times in took.items()}


def _end(host: Host, pid: str) -> None:
    host.run(["sh", "-c", 'kill -9 "$1"; while [ -e "/proc/$1" ]; do sleep 0.02; done', "sh", pid], check=False)


# -- a whole host -------------------------------------------------------------------------------------------------------------------------


def _hibernate(lab: Lab, case: Case, way: str) -> Figures:
    """`save_s`, `resume_s`: all containers, with ckpt hibernate, and one after another with podman's checkpoint -e and restore -i."""
    host, limit = lab.a, HIBERNATED * 20.0
    names = [f"hog-{number}" for number in range(HIBERNATED)]
    image = host.load_image()
    for name in names:
        host.run(["podman", "run", "-d", "--name", name, image, "memhog", str(case.memory_mib), str(case.dirty_mb_s), "/data/ticks"])
    for name in names:
        _counts(host, name)
    if way == "podman":
        save = ["sh", "-ec", 'for name; do podman container checkpoint -c zstd -e "/root/$name.tar.zst" "$name"; done', "sh", *names]
        bring = ["sh", "-ec", 'for name; do podman container restore -i "/root/$name.tar.zst"; done', "sh", *names]
    else:
        save, bring = ["ckpt", "-q", "hibernate", "save"], ["ckpt", "-q", "hibernate", "resume", "--same-boot"]
    figures = {"save_s": _timed(lambda: host.run(save, timeout_s=limit))}
    if way == "podman":
        host.run(["podman", "rm", *names])
    figures["resume_s"] = _timed(lambda: host.run(bring, timeout_s=limit))
    for name in names:
        _counts(host, name)
    return figures


def _counts(host: Host, name: str) -> None:
    """Wait for a tick more. Raises WorkloadError."""
    last = ["podman", "exec", name, "tail", "-n", "1", "/data/ticks"]
    first, end = host.run(last, check=False).stdout, time.monotonic() + 60
    while (now := host.run(last, check=False).stdout) == first or not now:
        if time.monotonic() > end:
            raise WorkloadError(f"{name} does not count")
        time.sleep(0.05)
