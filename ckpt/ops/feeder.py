"""The feeder of a lazy restore from the store's chunks: a small process that answers CRIU's lazy-pages daemon, started by the keeper.

It is a process of its own because the daemon fails without it, and a daemon that fails takes the missing memory with it, unless the keeper is
there to end the tree first (see lazy.py): so that either may be killed. It has the lease on the checkpoint too.

It says its port on its standard output. Until the daemon comes it ends with its standard input, from then on with the daemon.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import ckpt
from ckpt.criu import lazy, pagechunks, pagefeed
from ckpt.errors import CkptError, RestoreFailed
from ckpt.host import run
from ckpt.ops.unpack import PageMember
from ckpt.store.catalog import Catalog

START_LIMIT_S: Final = 30.0
END_LIMIT_S: Final = 5.0
_SWITCH_S: Final = 0.0002
"""Between the threads that read ahead and the one that answers page faults: with Python's 5 ms each fault may wait so long."""
_BODY: Final = (
    "import sys; p = sys.argv[1]; sys.path.count(p) or sys.path.insert(0, p); "
    "from ckpt.ops.feeder import feeder_main; sys.exit(feeder_main(sys.argv[2]))"
)


class Feeder:
    """The keeper's end."""

    def __init__(self, plan: dict[str, Any], keep_fds: Sequence[int]) -> None:
        """Start it; it listens when `port` has returned. Raises CommandFailed."""
        parent = str(Path(ckpt.__file__).resolve().parent.parent)
        argv = [sys.executable or "/usr/bin/python3", "-I", "-c", _BODY, parent, json.dumps(plan)]
        self._process = run.spawn(argv, stdin=run.PIPE, stdout=run.PIPE, stderr=None, cwd="/", pass_fds=keep_fds, new_session=True)

    def port(self) -> int:
        """Where it listens, on the loopback. Raises RestoreFailed: it does not come."""
        assert self._process.stdout is not None
        poller = select.poll()
        poller.register(self._process.stdout, select.POLLIN)
        line = self._process.stdout.readline() if poller.poll(1000 * START_LIMIT_S) else b""
        if not line.strip().isdigit():
            raise RestoreFailed("the process that reads its memory from the store did not start")
        return int(line)

    def close(self) -> None:
        """It is not needed any more."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(Exception):  # subprocess.TimeoutExpired, whose module is not imported here
            self._process.wait(END_LIMIT_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class _Chunks:
    """The pages, with what goes wrong told."""

    def __init__(self, pages: pagechunks.PageChunks, job_dir: Path) -> None:
        self._pages = pages
        self._job_dir = job_dir

    def pieces(self, pid: int, vaddr: int, nr_pages: int) -> list[memoryview]:
        try:
            return self._pages.pieces(pid, vaddr, nr_pages)
        except (CkptError, OSError) as error:
            with suppress(OSError):
                (self._job_dir / lazy.DAMAGE).write_text(error.message if isinstance(error, CkptError) else f"its memory cannot be read: {error}")
            raise BrokenPipeError from error


def feeder_main(text: str) -> int:
    """The body of a feeder. Returns an exit status."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_S)
    plan = json.loads(text)
    catalog = Catalog(Path(plan["root"]))
    checkpoint = catalog.find(str(plan["checkpoint_id"]))
    reader = catalog.page_reader(checkpoint)
    pages = pagechunks.PageChunks(Path(plan["images"]), lambda name: PageMember(reader, name))
    feed = pagefeed.Feed(str(plan["criu_version"]))
    os.write(1, b"%d\n" % feed.port)
    came = threading.Event()

    def watch() -> None:
        while os.read(0, 1):
            pass
        if not came.is_set():
            feed.close()

    threading.Thread(target=watch, daemon=True).start()
    if feed.connect():
        came.set()
        pagefeed.serve(feed, _Chunks(pages, Path(plan["job"])))
    pages.close()
    return 0
