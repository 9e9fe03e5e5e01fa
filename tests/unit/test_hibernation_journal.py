"""The journal of a hibernation, and works in threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckpt.errors import BusyError
from ckpt.ops import parallel
from ckpt.ops.hibernate.status import status
from ckpt.store.hibernation import Hibernation, Item

WEB = Item("podman:web", "podman", "1" * 64, "web", "save", after=("podman:db",), labels={"a": "b"})
DB = Item("podman:db", "podman", "2" * 64, "db", "save")


def test_it_remembers_its_plan_and_where_each_workload_stands(tmp_path: Path) -> None:
    made = Hibernation.create(tmp_path, "reboot", [WEB, DB])
    made.write("saving", item="podman:web")
    made.write("saved", item="podman:web", checkpoint_id="c1", freeze_s=0.5)
    made.write("resuming", item="podman:web", rungs=[])
    found = Hibernation.newest(tmp_path)
    assert found is not None and found.items == (WEB, DB) and found.state == "planned" and found.of_this_boot and found.of_this_host
    states = found.states()
    assert states["podman:web"].state == "resuming" and states["podman:web"].facts["checkpoint_id"] == "c1"
    assert states["podman:db"].state == "planned"


def test_it_has_one_owner_at_a_time(tmp_path: Path) -> None:
    made = Hibernation.create(tmp_path, "manual", [])
    with pytest.raises(BusyError):
        Hibernation(made.directory).acquire()
    made.release()
    Hibernation(made.directory).acquire()


def test_a_dead_owners_guard_is_no_owner(tmp_path: Path) -> None:
    """Until the guard is through, nothing that is begun now may take the dead one's save for one under way."""
    made = Hibernation.create(tmp_path, "manual", [WEB])
    assert made.owned and Hibernation(made.directory).owned
    made.release()
    assert not made.owned
    script = (
        "import os, signal, sys; from pathlib import Path; from ckpt.store.hibernation import Hibernation\n"
        "Hibernation.create(Path(sys.argv[1]), 'manual', []).write('saving'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script, tmp_path], env=env, timeout=60, check=False).returncode == -signal.SIGKILL
    newest = Hibernation.newest(tmp_path)
    assert newest is not None and newest.id != made.id
    newest.acquire(wait=True)
    with pytest.raises(BusyError):
        Hibernation(newest.directory).acquire()
    found = status(store_root=tmp_path)
    assert found is not None and (found.state, found.exit_code) == ("interrupted", 20)
    newest.release()


def test_a_torn_line_is_as_if_it_had_not_been_written(tmp_path: Path) -> None:
    made = Hibernation.create(tmp_path, "manual", [DB])
    made.write("saved", item="podman:db", checkpoint_id="c1")
    with (made.directory / "journal.jsonl").open("a") as journal:
        journal.write('{"t":1,"state":"resum')
    assert made.state == "planned" and made.states()["podman:db"].state == "saved"


def test_works_have_their_results_in_order_and_at_most_so_many_at_once() -> None:
    running, most, lock = 0, 0, threading.Lock()
    gate = threading.Barrier(2, timeout=10)

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait()
        with lock:
            running -= 1
        if number == 3:
            raise ValueError("three")
        return number

    found = parallel.run_all({str(number): lambda number=number: work(number) for number in range(6)}, width=2)  # type: ignore[misc]
    assert most == 2 and list(found) == list("012345") and found["5"] == 5 and isinstance(found["3"], ValueError)


def test_after_the_deadline_nothing_is_begun() -> None:
    found = parallel.run_all({"a": lambda: 1}, width=2, deadline_s=0.0)
    assert isinstance(found["a"], parallel.Dropped)


@pytest.mark.parametrize("where", ["start", "is_alive", "join"])
def test_interrupted_anywhere_it_waits_for_what_has_begun(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    goes_on, done, real, struck = threading.Event(), list[str](), getattr(threading.Thread, where), list[str]()

    def strike(thread: threading.Thread, *rest: float) -> object:
        found = real(thread, *rest)
        if thread.name.startswith("ckpt-work") and not struck:
            struck.append(where)
            threading.Timer(0.1, goes_on.set).start()
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(threading.Thread, where, strike)
    with pytest.raises(KeyboardInterrupt):
        parallel.run_all({"a": lambda: (goes_on.wait(30), done.append("a")), "b": lambda: done.append("b")}, width=1)
    assert done == ["a"]
