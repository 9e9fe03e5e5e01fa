"""Several works at once, in threads: what each of them does is waiting for engines, compressing, hashing and writing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from ckpt.errors import CkptError

T = TypeVar("T")
_LOOK_S: Final = 0.2
"""How often the main thread wakes up, so that a signal is handled while it waits."""


class Dropped(CkptError):
    """A work that was never begun: time was up, or somebody broke off."""

    slug, exit_code, summary = "failed", 1, "not begun"


def run_all(
    works: Mapping[str, Callable[[], T]],
    *,
    width: int,
    deadline_s: float | None = None,
    stop: threading.Event | None = None,
    on_done: Callable[[str, T | BaseException], None] | None = None,
) -> dict[str, T | BaseException]:
    """Run all works, at most `width` at a time, in their order; every one has its result, or what it raised.

    A work that has begun is never broken off in here: threads cannot be, and half a dump helps nobody; it has time limits of its own.
    After a KeyboardInterrupt no further ones begin, those under way are waited for, and it is raised again.

    Args:
        works: by label.
        deadline_s: time.monotonic() from which no work is begun any more.
        stop: no work is begun once it is set.
        on_done: called in the worker's thread as each is over (not for dropped ones).

    Raises:
        KeyboardInterrupt: the main thread was told to stop; all that had begun is over, `on_done` told of it.
    """
    waiting = list(works.items())
    results: dict[str, T | BaseException] = {}
    lock = threading.Lock()
    halt = stop or threading.Event()

    def body() -> None:
        while True:
            with lock:
                if not waiting or halt.is_set() or (deadline_s is not None and time.monotonic() >= deadline_s):
                    return
                label, work = waiting.pop(0)
            result: T | BaseException
            try:
                result = work()
            except BaseException as error:  # whoever asked for the work judges it
                result = error
            results[label] = result
            if on_done is not None:
                on_done(label, result)

    threads = [threading.Thread(target=body, name=f"ckpt-work-{number}") for number in range(max(1, min(width, len(waiting))))]
    interrupted: KeyboardInterrupt | None = None
    left = iter(threads)
    while True:
        try:  # wherever in here it comes: what has begun is waited for
            for thread in left:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_LOOK_S)
            break
        except KeyboardInterrupt as error:
            halt.set()
            interrupted, left = error, iter(())
    if interrupted is not None:
        raise interrupted
    for label, _ in waiting:
        results[label] = Dropped("it was not begun: " + ("it was broken off" if halt.is_set() else "time was up"))
    return {label: results[label] for label in works}
