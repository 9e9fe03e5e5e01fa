"""Evacuation: placing, the journal, the options and their way to the children, the common limit, the notice."""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click
import pytest

from ckpt.cli import moving
from ckpt.cli.drain import command as drain_command
from ckpt.cli.drain import split
from ckpt.cli.main import main
from ckpt.errors import BusyError, CkptError, MigrationRolledBack, NeedsContinue, UsageError
from ckpt.events import BytesMoved, Event, Figures, StepDone
from ckpt.host.run import PIPE, spawn
from ckpt.model import Compression, Container, JobRecord
from ckpt.ops import children, draining, drainstate, undrain, watch
from ckpt.ops.drain import Report, Went
from ckpt.ops.drainask import Said
from ckpt.ops.placing import Demand, Room, place, reserve_bytes, together
from ckpt.peer import inherited, rate
from ckpt.store import drains
from ckpt.store.drains import Drain, DrainItem

MIB = 1 << 20
GIB = 1 << 30


# -- placing


@pytest.mark.parametrize("seed", range(60))
def test_no_host_gets_more_than_it_has_and_groups_stay_together(seed: int) -> None:
    chance = random.Random(seed)
    rooms = [
        Room(
            f"h{number}",
            chance.randrange(256 * MIB, 8 * GIB),
            {f"podman:c{chance.randrange(20)}": "no such engine" for _ in range(chance.randrange(4))},
            frozenset(f"podman:c{one}" for one in range(20) if chance.random() < 0.3),
        )
        for number in range(chance.randrange(1, 5))
    ]
    demands = [
        Demand(f"podman:c{number}", chance.randrange(1, 2 * GIB), chance.choice(("", "", "x", "y"))) for number in range(chance.randrange(1, 20))
    ]
    found = place(demands, rooms)
    assert found.chosen.keys() | found.unplaced.keys() == {demand.target for demand in demands} and not found.chosen.keys() & found.unplaced.keys()
    for room in rooms:
        taken = [demand for demand in demands if found.chosen.get(demand.target) == room.destination]
        assert sum(demand.memory_bytes for demand in taken) <= room.free_bytes - reserve_bytes(room, None) or not taken
        assert not any(demand.target in room.refused for demand in taken)
    for group in ("x", "y"):
        assert len({found.chosen.get(demand.target) for demand in demands if demand.group == group}) <= 1
    for target, why in found.unplaced.items():
        assert why.keys() == {room.destination for room in rooms} and all(why.values()), target


def test_the_largest_goes_where_most_is_free() -> None:
    found = place([Demand("small", GIB), Demand("large", 6 * GIB), Demand("middle", 3 * GIB)], [Room("b", 4 * GIB), Room("c", 8 * GIB)], reserve=0)
    assert found.chosen == {"large": "c", "middle": "b", "small": "c"}


def test_a_tight_fit_is_found_where_the_emptiest_host_first_is_none() -> None:
    """The emptiest first: 6 go to x, then of 5 and 5 only one has room."""
    demands = [Demand("a", 6 * GIB), Demand("b", 5 * GIB), Demand("c", 5 * GIB)]
    assert place(demands, [Room("x", 10 * GIB), Room("y", 6 * GIB + 1)], reserve=0).unplaced == {}


def test_what_does_not_fit_says_why_for_each_host() -> None:
    found = place([Demand("db", 6 * GIB)], [Room("b", 4 * GIB), Room("c", 8 * GIB, {"db": "CRIU is older"})], reserve=0)
    assert found.unplaced == {"db": {"b": "6.0 GiB of memory needed, 4.0 GiB free there besides what is reserved", "c": "CRIU is older"}}


def test_a_group_goes_together_or_not_at_all() -> None:
    demands = [Demand("web", GIB, "shop"), Demand("db", GIB, "shop")]
    found = place(demands, [Room("b", 8 * GIB, {"db": "the name db is taken"}), Room("c", GIB)], reserve=0)
    assert found.chosen == {} and "db: the name db is taken" in found.unplaced["web"]["b"] and "group of 2" in found.unplaced["db"]["c"]


def test_equal_hosts_share_and_a_container_image_that_is_there_counts() -> None:
    demands = [Demand(f"c{number}", MIB) for number in range(6)]
    found = place(demands, [Room("b", 8 * GIB), Room("c", 8 * GIB)])
    assert sorted(found.chosen.values()) == ["b"] * 3 + ["c"] * 3
    assert place(demands[:1], [Room("b", 8 * GIB), Room("c", 8 * GIB, prepared=frozenset({"c0"}))]).chosen == {"c0": "c"}


def test_hosts_that_differ_by_next_to_nothing_share_too() -> None:
    """One has the container image of both, the other a little more memory, on either side of any round figure."""
    demands = [Demand("c0", MIB), Demand("c1", MIB)]
    for more in range(-256 * MIB, 256 * MIB, 7 * MIB):
        found = place(demands, [Room("b", 8 * GIB, prepared=frozenset({"c0", "c1"})), Room("c", 8 * GIB + more)])
        assert set(found.chosen.values()) == {"b", "c"}, (more, found)


def test_what_a_host_took_before_counts() -> None:
    assert place([Demand("c1", MIB)], [Room("b", 8 * GIB), Room("c", 8 * GIB)], took={"b": 1}).chosen == {"c1": "c"}


def test_an_unknown_amount_of_memory_is_not_counted() -> None:
    assert place([Demand("web", GIB)], [Room("b", 0)]).chosen == {"web": "b"}


def test_who_belongs_together() -> None:
    assert together({"a": ["1"], "b": ["2", "1"], "c": ["3"], "d": ["4", "pod p"], "e": ["5", "pod p"]}) == {"a": "a", "b": "a", "d": "d", "e": "d"}


def container(name: str, **facts: Any) -> Container:
    return Container("podman", name * 8, name, "running", **facts)


def test_ties_of_a_container_and_the_order_of_those_that_require_each_other() -> None:
    web = draining.Candidate("podman:web", None, container("web", requires=("db" * 8,)), 1)  # type: ignore[arg-type]
    db = draining.Candidate("podman:db", None, container("db", labels={"io.podman.compose.project": "shop"}), 1)  # type: ignore[arg-type]
    cache = draining.Candidate("podman:cache", None, container("cache", labels={"io.podman.compose.project": "shop"}), 1, after=("web",))  # type: ignore[arg-type]
    assert [one.container.name for one in draining.in_order([cache, web, db])] == ["db", "web", "cache"]
    groups = together({one.target: draining._ties(one.container) for one in (web, db, cache)})
    assert len(set(groups.values())) == 1 and len(groups) == 3


# -- the journal

WEB = DrainItem("podman:web", "podman", "1" * 64, "web", "root@b", MIB)


def test_the_journal_remembers_plans_and_states(tmp_path: Path) -> None:
    made = Drain.create(tmp_path)
    made.write_plan({"to": ["root@b"]}, [WEB])
    made.write("moving", item=WEB.target, destination="root@b", began_s=1.0)
    made.write_plan({"to": ["root@c"]}, [DrainItem("podman:db", "podman", "2" * 64, "db", "root@c")])
    found = Drain.newest(tmp_path)
    assert found is not None and found.open and [item.target for item in found.items] == ["podman:web", "podman:db"]
    assert found.request == {"to": ["root@c"]} and found.states()["podman:web"].state == "moving"
    assert found.states()["podman:web"].facts["destination"] == "root@b"
    with pytest.raises(BusyError, match="another ckpt works on drain"):
        Drain(made.directory).acquire()
    made.write(drains.DRAINED)
    assert not found.open


def test_a_torn_line_does_not_hide_what_is_written_later(tmp_path: Path) -> None:
    made = Drain.create(tmp_path)
    made.write_plan({}, [WEB])
    made.release()
    with (made.directory / "journal.jsonl").open("a") as file:
        file.write('{"t":1,"state":"mov')
    made.acquire()
    made.write("moved", item=WEB.target)
    assert made.states()[WEB.target].state == "moved"


def test_the_mark_of_a_drained_host(tmp_path: Path) -> None:
    made = Drain.create(tmp_path)
    made.write_plan({}, [WEB])
    made.write("moved", item=WEB.target)
    made.write(drains.DRAINED)
    assert drains.marked(tmp_path) is None
    drains.mark(tmp_path)
    assert (drains.marked(tmp_path) or {})["away"] == 1
    (tmp_path / "drained.json").write_text("[1")
    assert drains.marked(tmp_path) is None
    made.write("returned", item=WEB.target)
    made.write(drains.UNDRAINED)
    drains.mark(tmp_path)
    drains.mark(tmp_path)
    assert not (tmp_path / "drained.json").exists()


def test_two_drains_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more container was started here after the first, and moved too: nobody forgets the first."""
    for item in (WEB, DrainItem("podman:db", "podman", "2" * 64, "db", "root@c")):
        made = Drain.create(tmp_path)
        made.write_plan({}, [item])
        made.write("moved", item=item.target)
        made.write(drains.DRAINED)
        made.release()
    drains.mark(tmp_path)
    assert (drains.marked(tmp_path) or {})["away"] == 2
    monkeypatch.setattr(undrain.drainask, "ask", lambda sent, **how: {one.item.target: Said("there") for one in sent})
    went = undrain.undrain(undrain.UndrainRequest(), dry_run=True, store_root=tmp_path, emit=lambda event: None).went
    assert {(one.name, one.destination) for one in went} == {("web", "root@b"), ("db", "root@c")}
    with pytest.raises(CkptError, match="'x' is not among"):
        undrain.undrain(undrain.UndrainRequest(only=("x",)), store_root=tmp_path, emit=lambda event: None)


@pytest.mark.parametrize(
    ("record", "here", "state"),
    [("done", False, "moved"), ("waiting", False, "waiting"), ("rolled-back", True, "dropped"), (None, True, "dropped"), (None, False, "gone")],
)
def test_what_really_is_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str | None, here: bool, state: str) -> None:
    """A drain died after it had begun a migration: its job, then its engine, tell what became of it."""
    made = Drain.create(tmp_path)
    made.write_plan({}, [WEB])
    made.write("moving", item=WEB.target, destination="root@b", began_s=100.0, child=[1 << 22, 1])
    old = JobRecord("20261122T000000-00000000", "migrate", "done", engine="podman", container_id=WEB.container_id, started_s=50.0)
    job = "20261122T000001-00000000"
    new = [JobRecord(job, "migrate", record, "web", "podman", WEB.container_id, "", "root@b", started_s=101.0)] if record else []
    monkeypatch.setattr(drainstate.jobs, "jobs", lambda store_root: [old, *new])
    monkeypatch.setattr(drainstate, "runs_here", lambda item: here)
    monkeypatch.setattr(drainstate, "continue_", lambda job, **more: NeedsContinue("not yet"))
    drainstate.settle(made, store_root=tmp_path, emit=lambda event: None)
    assert made.states()[WEB.target].state == state
    if state == "moved":
        assert made.states()[WEB.target].facts["destination"] == "root@b"


# -- the options


def test_destinations() -> None:
    assert split(("root@b,root@c", "d")) == ("root@b", "root@c", "d")
    with pytest.raises(UsageError, match="empty"):
        split(("root@b,",))


def parsed(words: list[str]) -> click.Context:
    # The command remembers the names of its help option: they are those that it has below `ckpt`.
    return drain_command.make_context("drain", words, help_option_names=["-h", "--help"])


def test_options_become_the_words_of_a_command_line_again() -> None:
    words = ["--precopy", "--max-downtime", "150ms", "--max-rounds", "3", "--no-lazy", "--compress", "zstd:5", "--ssh-option", "Port=2222"]
    words += ["--ssh-option", "User=x", "--token-file", "/t", "--file-locks", "--direct", "--timeout", "30"]
    with parsed([*words]) as context:
        taken = {name: context.params[name] for name in moving.NAMES}
    again = moving.words(drain_command, taken, server=True)
    with parsed(again) as second:
        assert {name: second.params[name] for name in moving.NAMES} == taken
    assert "--token-file" not in moving.words(drain_command, taken, server=False)
    with parsed([]) as context:
        assert moving.words(drain_command, {name: context.params[name] for name in moving.NAMES}, server=True) == []
    assert taken["compress"] == Compression("zstd", 5)


@pytest.mark.parametrize(
    "words",
    [
        ["drain"],
        ["drain", "--resume", "--to", "b"],
        ["drain", "--to", "b,"],
        ["drain", "--to", "b", "--precopy", "--postcopy"],
        ["drain", "--to", "b", "--parallel", "0"],
        ["drain", "--to", "b", "--reserve", "much"],
        ["drain", "--to", "b", "--deadline", "soon"],
        ["drain", "--to", "b", "--else-checkpoint", "store"],
        ["drain", "--to", "b", "--token-file", "x"],
        ["undrain", "--direct"],
        ["undrain", "--allow", "nonsense"],
        ["watch", "--on", "true"],
        ["watch", "--on", " ", "--to", "b"],
        ["watch", "--on", "true", "--to", "b", "--do", "checkpoint -a"],
        ["watch", "--on", "true", "--do", "frobnicate"],
        ["watch", "--on", "true", "--do", "'"],
        ["watch", "--on", "true", "--every", "0", "--to", "b"],
    ],
    ids=" ".join,
)
def test_a_bad_option_is_one_message_and_exit_code_2(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and not list(tmp_path.iterdir())


def test_a_request_survives_its_journal() -> None:
    asked = draining.DrainRequest(("root@b",), 2, 1000, ("x",), ("name=a",), ("pid:1",), ("--direct",), ssh_options=("Port=1",), deadline_s=5.0)
    assert draining.DrainRequest.from_json(asked.to_json()) == asked
    for bad in ({}, {"to": "b"}, {"to": [1]}):
        with pytest.raises(UsageError, match="journal"):
            draining.DrainRequest.from_json({**bad, "to": bad.get("to") if isinstance(bad.get("to"), list) else []})


def test_the_exit_code_tells_the_gravest() -> None:
    moved, skipped = Went("a", "a", "moved"), Went("b", "b", "skipped")
    failed, waits = Went("c", "c", "failed", error=MigrationRolledBack("x")), Went("d", "d", "waiting", error=NeedsContinue("y"))
    assert Report("", (moved,)).exit_code == 0 and Report("", (moved, skipped)).exit_code == 100
    assert Report("", (moved, failed, skipped)).exit_code == 50 and Report("", (failed, waits)).exit_code == 51


# -- children


def follow(script: str, **more: Any) -> tuple[children.Ended, list[Event]]:
    events: list[Event] = []
    process = spawn([sys.executable, "-c", script], stdout=PIPE, stderr=PIPE)
    return children.follow(process, emit=events.append, stopped=more.pop("stopped", lambda: False)), events


def test_a_child_tells_its_events_its_result_and_its_job() -> None:
    ended, events = follow(
        "import json\n"
        "for row in ({'event': 'figures', 'target': 'w', 'values': {'job': 'J'}}, {'event': 'step_done', 'target': 'w', 'step': 'dump'},"
        " {'event': 'bytes_moved', 'target': 'w', 'step': 'x', 'done_bytes': 'many'}, {'event': '__class__'}, 3,"
        " {'event': 'result', 'ok': True, 'id': 'I'}):\n"
        "    print(json.dumps(row))\nprint('{torn')"
    )
    assert ended.ok and ended.job == "J" and ended.row["id"] == "I" and ended.returncode == 0
    assert [type(event) for event in events] == [Figures, StepDone] and not any(isinstance(event, BytesMoved) for event in events)


def test_a_childs_error_is_raised_again_as_what_it_was() -> None:
    ended, _ = follow("""print('{"event": "result", "ok": false, "error": {"code": "needs-continue", "message": "frozen", "hint": "h"}}')""")
    assert isinstance(ended.error, NeedsContinue) and ended.error.hint == "h"


def test_a_child_that_dies_without_a_word_has_failed() -> None:
    ended, _ = follow("import os, signal, sys; print('boom', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.error is not None and "SIGKILL" in ended.error.message and "boom" in ended.error.message


def test_a_child_is_told_to_stop_once_and_waited_for(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time\nfrom pathlib import Path\nsignal.signal(signal.SIGINT, lambda *a: sys.exit(130))\n"
        f"print(flush=True)\nPath({str(tmp_path / 'there')!r}).touch()\ntime.sleep(60)"
    )
    began_s = time.monotonic()
    ended, _ = follow(script, stopped=(tmp_path / "there").exists)
    assert ended.returncode == 130 and isinstance(ended.error, CkptError) and time.monotonic() - began_s < 30


def test_a_child_of_a_journal_is_known_by_its_start() -> None:
    process = spawn([sys.executable, "-c", "import time; time.sleep(60)"])
    found = children.tree.stat(process.pid)
    assert found is not None and children.alive([process.pid, found.start_ticks])
    assert not children.alive([process.pid, found.start_ticks - 1]) and not children.alive(None) and not children.alive(["x", 1])
    process.kill()
    process.wait()
    assert not children.alive([process.pid, found.start_ticks])


# -- the common limit


def test_several_share_one_limit_and_one_alone_has_all_of_it(tmp_path: Path) -> None:
    now = [100.0]
    first, second = (rate.SharedBucket(tmp_path / "limit", 1000, clock=lambda: now[0]) for _ in range(2))

    def sent(takers: list[rate.SharedBucket], seconds: float) -> int:
        total, until_s = 0, now[0] + seconds
        while now[0] < until_s:
            for bucket in takers:
                if not bucket.wait_s():
                    bucket.take(50)
                    total += 50
            now[0] += 0.01
        return total

    assert sent([first, second], 20.0) == pytest.approx(20_000, rel=0.03)
    assert sent([first], 20.0) == pytest.approx(20_000, rel=0.03)
    now[0] = 1.0  # another boot
    assert first.wait_s() == 0.0


def test_the_limit_holds_between_processes(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom ckpt.peer.rate import SharedBucket\n"
        "bucket, total, until = SharedBucket(Path(sys.argv[1]), 1 << 20), 0, time.monotonic() + 1.0\n"
        "while time.monotonic() < until:\n"
        "    wait = bucket.wait_s()\n"
        "    if wait: time.sleep(min(wait, 0.05)); continue\n"
        "    bucket.take(bucket.piece_bytes); total += bucket.piece_bytes\nprint(total)"
    )
    began_s = time.monotonic()
    env = {"PYTHONPATH": str(Path(rate.__file__).parents[2])}
    running = [spawn([sys.executable, "-c", script, tmp_path / "limit"], stdout=PIPE, env=env) for _ in range(3)]
    sums = [int(process.communicate(timeout=60)[0]) for process in running]
    assert all(sums) and sum(sums) <= (1 << 20) * (time.monotonic() - began_s + 0.5)


# -- the notice


def asked(command: str, **more: Any) -> watch.WatchRequest:
    return watch.WatchRequest(command, every_s=0.02, **more)


def test_only_a_command_that_succeeds_in_time_is_a_notice() -> None:
    assert watch.noticed(asked("true")) is True and watch.noticed(asked("false")) is False and watch.noticed(asked("no-such-command-at-all")) is False
    assert watch.noticed(asked("sleep 60", limit_s=0.1)) is None


def test_a_notice_is_acted_on_once_until_it_is_gone(tmp_path: Path) -> None:
    flag, stop, acted = tmp_path / "flag", threading.Event(), []
    flag.touch()

    def act() -> int:
        acted.append(flag.exists())
        if len(acted) == 3:
            stop.set()
        threading.Timer(0.2, flag.unlink).start()
        threading.Timer(0.5, flag.touch).start()
        return 7

    assert watch.watch(asked(f"test -e {flag}"), act, emit=lambda event: None, stop=stop) == 7
    assert len(acted) == 3


def test_once_ends_with_what_was_done() -> None:
    assert watch.watch(asked("true", once=True), lambda: 50, emit=lambda event: None) == 50


# -- the link that is there already


def test_the_link_of_this_process_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherited, "_ways", [7, 8])
    assert inherited.ends() == (7, 8)
    with pytest.raises(CkptError, match="link"):
        inherited.ends()
