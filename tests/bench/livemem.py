"""How fast ckpt looks through live memory: `python -m tests.bench.livemem [--mib 1024]`. Root, or a kernel that lets a process read its child.

One process with that much private memory, half of it incompressible. First scan (all is new), a second one (nothing changed), one after one page
in a hundred was written, one after all of it was written. Rates are of the scan itself, on one core, without sending anything.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import time
import tracemalloc
from collections.abc import Callable

from ckpt.criu.digests import DigestTable
from ckpt.criu.livemem import LiveMemory, Run
from ckpt.host.procmem import PAGE, scan_excludes

MIB = 1 << 20
TURNS = (("first scan", 0), ("unchanged", 0), ("unchanged", 0), ("1 page in 100", 100), ("every 2nd page", 2), ("all pages", 1), ("unchanged", 0))


def hog(size: int) -> tuple[int, Callable[[int], None]]:
    """A child with `size` bytes of memory; what is returned makes it write into every n-th page."""
    asks, ask = os.pipe()
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ask)
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, size, MIB):
            area[at : at + MIB] = os.urandom(MIB) if at < size // 2 else (at.to_bytes(8, "little") * 512) * (MIB // PAGE)
        turn = 0
        os.write(tell, b".")
        while step := os.read(asks, 8):
            turn += 1
            for at in range(0, size, PAGE * int.from_bytes(step, "little")):
                area[at : at + 8] = turn.to_bytes(8, "little")
            os.write(tell, b".")
        os._exit(0)
    os.close(asks)
    os.read(told, 1)

    def write(every: int) -> None:
        if every:
            os.write(ask, every.to_bytes(8, "little"))
            os.read(told, 1)

    return pid, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--no-ioctl", action="store_true", help="read /proc/PID/pagemap instead of PAGEMAP_SCAN")
    parser.add_argument("--trace", action="store_true", help="count Python's own memory too (slow)")
    options = parser.parse_args()
    pid, write = hog(options.mib * MIB)
    if options.trace:
        tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table, live = DigestTable(), LiveMemory(lambda: [pid], ioctl=not options.no_ioctl)
    print(f"{options.mib} MiB, PAGEMAP_SCAN {'off' if options.no_ioctl else 'on' if scan_excludes() else 'not there'}")
    for name, every in TURNS:
        write(every)
        cpu = time.process_time()
        runs = sum(isinstance(step, Run) for step in live.scan(table))
        cpu = time.process_time() - cpu
        seen = live.statistics
        rate = seen.scanned_bytes / seen.seconds / 1e9
        print(f"  {name:15} {seen.seconds:6.3f} s  cpu {cpu:6.3f} s  {rate:5.2f} GB/s  changed {seen.changed_bytes / MIB:8.1f} MiB in {runs} runs")

    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pages = memoryview(bytearray(os.urandom(MIB)))
    table.compare_and_update(1, 0, pages)
    began = time.perf_counter()
    for _ in range(options.mib):
        table.compare(1, 0, pages)
    print(f"  compare of pages in hand (in the CPU's cache) {options.mib * MIB / (time.perf_counter() - began) / 1e9:.2f} GB/s")
    fresh = os.urandom(64 * MIB) * max(1, options.mib // 256)
    began = time.perf_counter()
    for at in range(0, len(fresh), MIB):
        table.compare(2, at, memoryview(fresh)[at : at + MIB])
    print(f"  compare of pages in hand (from memory)        {len(fresh) / (time.perf_counter() - began) / 1e9:.2f} GB/s")
    print(f"  {table.known_pages} pages known")
    if options.trace:
        print(f"  Python memory: now {tracemalloc.get_traced_memory()[0] / MIB:.1f} MiB, at most {tracemalloc.get_traced_memory()[1] / MIB:.1f} MiB")
    else:
        print(f"  resident set grew by {grown / 1024:.1f} MiB at most")
    os.kill(pid, 9)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
