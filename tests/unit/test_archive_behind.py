"""Data on its way through a thread: all of it in order, errors where they are noticed, no thread left."""

from __future__ import annotations

import threading

import pytest

from ckpt.archive.behind import Behind


def test_everything_in_order() -> None:
    found = bytearray()
    behind = Behind(found.extend)
    pieces = [bytes([n]) * size for n, size in enumerate((1, 0, 5 << 20, 70_000, 9 << 20))]
    for piece in pieces:
        assert behind.write(memoryview(piece)) == len(piece)
    behind.finish()
    assert bytes(found) == b"".join(pieces)


@pytest.mark.timeout(20)
def test_an_error_comes_back_and_nobody_hangs() -> None:
    def full(piece: bytes) -> None:
        raise OSError(28, "full")

    behind = Behind(full)
    with pytest.raises(OSError, match="full"):
        for _ in range(100):
            behind.write(b"x" * (4 << 20))
    behind.abort()
    behind = Behind(full)
    behind.write(b"x")
    with pytest.raises(OSError, match="full"):
        behind.finish()
    assert not [thread for thread in threading.enumerate() if thread.name == "ckpt-behind"]


@pytest.mark.timeout(20)
def test_broken_off_while_the_other_end_takes_nothing() -> None:
    gate, taken = threading.Event(), []

    def slow(piece: bytes) -> None:
        gate.wait()
        taken.append(piece)

    behind = Behind(slow)
    for _ in range(3):
        behind.write(b"x")
    threading.Timer(0.2, gate.set).start()
    behind.abort()
    assert len(taken) <= 1


@pytest.mark.timeout(20)
def test_broken_off_while_the_queue_is_full_and_the_link_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.archive.behind._LEAVE_S", 0.2)
    gate, begun = threading.Event(), threading.Event()

    def dead(piece: bytes) -> None:
        begun.set()
        gate.wait()

    behind = Behind(dead)
    behind.write(b"x")
    assert begun.wait(10)
    for _ in range(2):
        behind.write(b"x")  # the queue is full now
    leaving = threading.Thread(target=behind.abort, daemon=True)
    leaving.start()
    leaving.join(5)
    left = not leaving.is_alive()
    gate.set()
    leaving.join(5)
    behind._thread.join(5)
    assert left, "it waits for a link that is dead"
    assert not behind._thread.is_alive()
