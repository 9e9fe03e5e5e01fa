"""A drain's groups: which move as one, what the journal says of them, and what becomes of each when their one migration ends somehow."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt.cli import moving
from ckpt.cli.drain import command as drain_command
from ckpt.errors import Bug, CannotConnect, CkptError, DumpFailed, MigrationRolledBack, NeedsContinue
from ckpt.events import Event
from ckpt.model import Container, JobRecord, Volume
from ckpt.ops import children, destination, drainask, draining, drainstate, realgroups, undrain
from ckpt.ops import drain as use_case
from ckpt.ops.placing import Placement, Room
from ckpt.store import drains
from ckpt.store.drains import Drain, DrainItem

SHOP = {"ckpt.group": "shop"}
COMPOSE = {"io.podman.compose.project": "shop"}


def container(name: str, labels: dict[str, str] = SHOP, **facts: Any) -> Container:
    return Container("podman", name * 8, name, "running", labels=labels, **facts)


def found(*containers: Container, skipped: tuple[Container, ...] = (), unfit: tuple[Container, ...] = (), ignore: bool = False) -> realgroups.Sets:
    return realgroups.find(
        [(f"podman:{one.name}", None, one) for one in containers],  # type: ignore[misc]
        [(f"podman:{one.name}", one) for one in skipped],
        [(f"podman:{one.name}", one, DumpFailed("it holds an io_uring")) for one in unfit],
        ignore_volumes=ignore,
    )


def test_a_label_or_a_compose_project_makes_a_group_that_moves_as_one() -> None:
    sets = found(container("web"), container("db", COMPOSE), container("alone", {}), container("only", {"ckpt.group": "one"}))
    assert sets.names == {"podman:web": "shop", "podman:db": "shop"} and not sets.held_back and not sets.notes


def test_what_podman_cannot_restore_together_moves_one_after_the_other_and_that_is_told() -> None:
    volume = Volume("data", Path("/v"), "/data")
    assert found(container("web", requires=("db" * 8,)), container("db")).names == {}
    sets = found(container("web", volumes=(volume,)), container("db", volumes=(volume,)))
    assert sets.names == {} and "one after the other" in sets.notes[0] and "data" in sets.notes[0]
    assert found(container("web", volumes=(volume,)), container("db", volumes=(volume,)), ignore=True).names
    assert found(container("web", {"ckpt.group": "a b"}), container("db", {"ckpt.group": "a b"})).names == {}


def test_without_one_that_cannot_be_saved_none_goes_and_without_one_that_is_to_stay_the_others_go() -> None:
    sets = found(container("web"), container("db"), unfit=(container("cache"),))
    assert sets.names == {} and set(sets.held_back) == {"podman:web", "podman:db"}
    assert isinstance(sets.held_back["podman:web"], DumpFailed) and "cache" in sets.held_back["podman:web"].message
    sets = found(container("web"), container("db"), skipped=(container("cache"),))
    assert set(sets.names) == {"podman:web", "podman:db"} and "without cache" in sets.notes[0]
    sets = found(container("web"), skipped=(container("cache"),))
    assert sets.names == {} and "without cache" in sets.notes[0]


def candidate(name: str, as_one: str = "shop", **facts: Any) -> draining.Candidate:
    engine: Any = SimpleNamespace(name="podman")
    return draining.Candidate(f"podman:{name}", engine, container(name, **facts), 1 << 20, "podman:web", as_one=as_one)


def test_a_group_goes_at_once_between_what_it_needs_and_what_needs_it() -> None:
    base, web, db = candidate("base", ""), candidate("web", requires=("base" * 8,)), candidate("db")
    proxy = candidate("proxy", "", requires=("db" * 8,))
    names = [[one.container.name for one in unit] for unit in draining.units([proxy, web, db, base])]
    assert names == [["base"], ["web", "db"], ["proxy"]]


# -- the journal

ITEMS = [DrainItem(f"podman:{name}", "podman", name * 8, name, "root@b", 1, "podman:web", "shop") for name in ("web", "db")]
TARGETS = [item.target for item in ITEMS]


def journal(root: Path) -> Drain:
    made = Drain.create(root)
    made.write_plan({"to": ["root@b"]}, ITEMS)
    made.write("draining")
    return made


def test_one_line_is_about_all_members_and_not_about_the_drain(tmp_path: Path) -> None:
    made = journal(tmp_path)
    made.tell("moving", TARGETS, destination="root@b", began_s=1.0)
    made.tell("moved", TARGETS[:1], container_id="x")
    states = made.states()
    assert [states[target].state for target in TARGETS] == ["moved", "moving"] and made.open and made.state == "draining"
    assert states[TARGETS[1]].facts == {"destination": "root@b", "began_s": 1.0} and made.items == tuple(ITEMS)


@pytest.mark.parametrize("noted", [0, 1])
@pytest.mark.parametrize(("records", "here", "becomes"), [
    (("done", "done"), False, ["moved", "moved"]),
    (("rolled-back", "rolled-back"), True, ["dropped", "dropped"]),
    ((None, None), True, ["dropped", "dropped"]),
    (("done", "waiting"), False, ["moved", "waiting"]),
])  # fmt: skip
def test_a_drain_killed_with_a_group_under_way_finds_the_truth_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: int, records: tuple[str | None, ...], here: bool, becomes: list[str]
) -> None:
    """At whatever line it was killed: before its child was begun, or with one of the two noted already."""
    made = journal(tmp_path)
    made.tell("moving", TARGETS, destination="root@b", began_s=100.0, child=[1 << 22, 1])
    for target in TARGETS[: noted if records[0] == "done" else 0]:
        made.write("moved", item=target)
    jobs = [
        JobRecord(f"2026112{number}T000001-00000000", "migrate", state, item.name, "podman", item.container_id, "", "root@b", started_s=101.0)
        for number, (state, item) in enumerate(zip(records, ITEMS, strict=True))
        if state
    ]
    monkeypatch.setattr(drainstate.jobs, "jobs", lambda store_root: jobs)
    monkeypatch.setattr(drainstate, "runs_here", lambda item: here)
    monkeypatch.setattr(drainstate, "continue_", lambda job, **more: NeedsContinue("not yet"))
    drainstate.settle(made, store_root=tmp_path, emit=lambda event: None)
    assert [made.states()[target].state for target in TARGETS] == becomes


# -- one migration, several results


def row(name: str, error: CkptError | None = None) -> dict[str, Any]:
    return {"name": f"podman:{name}", "ok": error is None, "container_id": name * 8, "error": error.to_json() if error else None}


def ended(*rows: dict[str, Any], error: CkptError | None = None) -> children.Ended:
    return children.Ended(0, rows[-1] if rows else {}, error, "", rows=rows, jobs={f"podman:{name}": f"J-{name}" for name in ("web", "db")})


def test_each_member_has_its_own_result_or_its_childs() -> None:
    both = ended(row("web"), row("db", NeedsContinue("frozen")))
    assert both.of("podman:web").ok and both.of("podman:web").job == "J-web"
    assert isinstance(both.of("podman:db").error, NeedsContinue) and both.of("podman:db").job == "J-db"
    crashed = ended(error=Bug("its ckpt ended by SIGKILL"))
    assert isinstance(crashed.of("podman:db").error, Bug) and crashed.of("podman:db").error is not crashed.of("podman:web").error


class Moves:
    """A drain of the group whose children end as told."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *ends: children.Ended, truth: str = "here", **request: Any) -> None:
        self.words: list[list[str]] = []
        left = list(ends)

        def run(words: list[str], *, on_start: Any = None, **more: Any) -> children.Ended:
            self.words.append(words)
            if on_start is not None:
                on_start(1 << 22, 1)
            return left.pop(0)

        monkeypatch.setattr(use_case.children, "run", run)
        monkeypatch.setattr(use_case.drainstate, "settled", lambda journal, target, root, emit: drainstate.Truth(truth, "J"))
        monkeypatch.setattr(use_case.drainstate, "continue_", lambda job, **more: NeedsContinue("not yet"))
        self.journal = journal(root)
        asked = draining.DrainRequest(("root@b", "root@c"), words=("--precopy",), group_words=("--no-lazy",), **request)
        looked = draining.Looked((candidate("web"), candidate("db")), (), ())
        rooms = [Room("root@b", 8 << 30), Room("root@c", 8 << 30)]
        placed = Placement(dict.fromkeys(TARGETS, "root@b"), {})
        self.events: list[Event] = []
        went = use_case._Draining(asked, self.journal, looked, placed, rooms, root, self.events.append, time.monotonic(), threading.Event())
        self.report = went.run([], [])
        self.states = [self.journal.states()[target].state for target in TARGETS]


def test_one_command_moves_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = Moves(tmp_path, monkeypatch, ended(row("web"), row("db")))
    assert moves.states == ["moved", "moved"] and moves.report.exit_code == 0
    (words,) = moves.words
    assert words[-6:] == ["--group", "shop", "--", "root@b", *TARGETS] and "--no-lazy" in words and "--precopy" not in words
    assert all(item.as_one == "shop" for item in moves.journal.items)


def test_a_group_that_is_not_taken_goes_elsewhere_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is the cause; the others are of members that were stopped for it, some before they had a journal."""
    refused = ended(row("db", MigrationRolledBack("boom")), row("web", DumpFailed("it was not moved: db could not be")))
    moves = Moves(tmp_path, monkeypatch, refused, ended(row("web"), row("db")))
    assert moves.states == ["moved", "moved"] and "root@c" in moves.words[1]
    failed = Moves(tmp_path / "2", monkeypatch, refused, refused)
    assert failed.states == ["failed", "failed"] and failed.report.exit_code == 50


def test_one_in_doubt_waits_and_nobody_tries_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = Moves(tmp_path, monkeypatch, ended(row("web"), row("db", NeedsContinue("frozen"))), truth="waiting")
    assert moves.states == ["moved", "waiting"] and moves.report.exit_code == 51 and len(moves.words) == 1


def test_with_one_in_doubt_no_other_host_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ended(row("web", MigrationRolledBack("boom")), row("db", NeedsContinue("frozen")))
    moves = Moves(tmp_path, monkeypatch, broken, ended(row("web"), row("db")), truth="waiting")
    assert moves.states == ["failed", "waiting"] and len(moves.words) == 1


def test_one_in_doubt_that_goes_on_here_when_it_is_continued_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubt = ended(row("web", NeedsContinue("frozen")), row("db", NeedsContinue("frozen")))
    refused = ended(row("web", MigrationRolledBack("boom")), row("db", MigrationRolledBack("boom")))
    moves = Moves(tmp_path, monkeypatch, doubt, refused, truth="here")
    assert moves.states == ["failed", "failed"] and moves.report.exit_code == 50 and "root@c" in moves.words[1]


@pytest.mark.parametrize(("truth", "state", "code"), [("moved", "moved", 0), ("here", "failed", 70), ("waiting", "waiting", 51)])
def test_what_a_crashed_migration_did_its_jobs_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truth: str, state: str, code: int) -> None:
    moves = Moves(tmp_path, monkeypatch, ended(error=Bug("its ckpt ended by SIGKILL")), truth=truth)
    assert moves.states == [state, state] and moves.report.exit_code == code


def test_in_a_hurry_a_group_is_saved_at_one_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = ended({**row("web"), "ref": "web@1"}, {**row("db"), "ref": "db@1"})
    moves = Moves(tmp_path, monkeypatch, saved, deadline_s=2.5, else_checkpoint="store")
    assert moves.states == ["saved", "saved"] and moves.words[0][-5:] == ["--group", "shop", "--", *TARGETS]
    assert moves.journal.states()["podman:db"].facts["ref"] == "db@1"


# -- back


def test_what_went_as_one_is_fetched_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = journal(tmp_path)
    made.tell("moved", TARGETS, destination="root@b")
    made.write(drains.DRAINED)
    made.release()
    asked: list[Any] = []
    here: list[str] = []

    def fetch(self: Any, destination: str, words: list[str], targets: list[str], *, emit: Any) -> children.Ended:
        asked.append((destination, words, targets))
        here.extend(item.container_id for item in ITEMS)
        return children.Ended(0, {}, None, "", rows=tuple({"name": target, "ok": True, "downtime_s": 0.5} for target in targets))

    monkeypatch.setattr(undrain.Fetch, "group", fetch)
    monkeypatch.setattr(drainask, "_ask", lambda destination, sent, *how: {one.item.target: drainask.Said("there") for one in sent})
    monkeypatch.setattr(undrain.drainstate, "runs_here", lambda item: item.container_id in here)
    monkeypatch.setattr(undrain.registry, "by_name", lambda name: SimpleNamespace(prefixes=("podman",)))
    request = undrain.UndrainRequest(words=("--precopy",), group_words=("--no-lazy",))
    report = undrain.undrain(request, store_root=tmp_path, emit=lambda event: None)
    assert asked == [("root@b", ["--no-lazy", "--group", "shop"], [f"podman:{item.container_id}" for item in ITEMS])]
    assert [one.state for one in report.went] == ["returned", "returned"] and report.exit_code == 0 and report.went[0].facts["downtime_s"] == 0.5


def test_a_groups_words_are_without_what_is_for_single_containers() -> None:
    words = ["--precopy", "--max-rounds", "3", "--auto-converge", "--compress", "none", "--no-lazy"]
    with drain_command.make_context("drain", words, help_option_names=["-h", "--help"]) as context:
        taken = {name: context.params[name] for name in moving.NAMES}
    assert moving.words(drain_command, moving.for_group(taken), server=False) == ["--no-lazy", "--compress", "none"]


# -- what the other hosts say


class There:
    """A host that answers, or does not."""

    hostname = "b"

    def __init__(self, answers: Any) -> None:
        self.answers = answers
        self.asked: list[Any] = []

    def call(self, verb: str, args: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(args["workloads"])
        return {"workloads": self.answers}

    def __enter__(self) -> There:
        if self.answers is None:
            raise CannotConnect("cannot connect to root@b: it does not answer")
        return self

    def __exit__(self, *how: object) -> None:
        pass


def standing(name: str, state: str = "running", name_taken: bool = False) -> dict[str, Any]:
    return {"state": state, "name": name, "name_taken": name_taken}


@pytest.mark.parametrize(("answers", "states", "words"), [
    ([standing("web"), standing("db")], ["there", "there"], ""),
    ([standing("web", "exited"), standing("db")], ["there", "there"], "it is exited on b"),
    ([standing("", ""), standing("old")], ["changed", "changed"], "it is not on b any more"),
    ([standing("", "", True), standing("db")], ["changed", "there"], "another one is called web there"),
    ([None, standing("db")], ["unknown", "there"], "podman on b cannot be used"),
    ([], ["unknown", "unknown"], "could not be asked: its ckpt is too old"),
    ({"a": 1}, ["unknown", "unknown"], "could not be asked"),
    (None, ["unknown", "unknown"], "could not be asked: cannot connect to root@b"),
])  # fmt: skip
def test_the_other_host_is_asked_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: Any, states: list[str], words: str
) -> None:
    made = journal(tmp_path)
    made.tell("moved", TARGETS, destination="root@b")
    there = There(answers)
    monkeypatch.setattr(drainask.client, "connect", lambda destination, **how: there)
    said = drainask.ask(drainask.sent(made))
    assert [said[target].state for target in TARGETS] == states and words in said["podman:web"].reason
    assert len(there.asked) == (answers is not None)
    # A drain that is taken up again: its rows say so, and its journal what it has learned.
    rows = use_case._asked(made, draining.DrainRequest(("root@b",)), use_case._earlier(made))
    assert [one.state for one in rows] == ["changed" if state == "changed" else "moved" for state in states] and words in rows[0].reason
    assert [made.states()[target].state for target in TARGETS] == [one.state for one in rows]
    assert use_case.Report("", tuple(rows)).exit_code == (0 if states == ["there", "there"] and not words else 100)


def test_a_host_says_how_workloads_stand_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    present = [container("web"), Container("podman", "x", "db", "exited")]
    monkeypatch.setattr(destination.registry, "by_name", lambda name: SimpleNamespace(containers=lambda: present) if name == "podman" else fail())
    asked: list[Any] = [{"engine": "podman", "id": one.container_id, "name": one.name} for one in ITEMS]
    found = destination.standing([*asked, {"engine": "none"}, 3])
    assert found == [standing("web"), standing("", "", True), None, None]


def fail() -> Any:
    raise CkptError("no such engine")
