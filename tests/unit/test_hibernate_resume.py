"""Coming back after a boot, over the fake engine: which hibernation, in which order, by which rung, and killed at every step."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt.archive import layout
from ckpt.errors import BusyError, CkptError, IncompatibleHost, StartedCold
from ckpt.events import ignore
from ckpt.host.run import run
from ckpt.model import Container, DumpOptions, Manifest, RestoreOptions, Target
from ckpt.ops import arm, faults, mark
from ckpt.ops.checkpoint import checkpoint
from ckpt.ops.group import checkpoint_group
from ckpt.ops.hibernate import canary, guards, sets
from ckpt.ops.hibernate import resume as resuming
from ckpt.ops.hibernate.ladder import Climb
from ckpt.ops.hibernate.resume import Resumed, _by_after, layers
from ckpt.ops.hibernate.settings import HibernateSettings
from ckpt.store import hibernation as journals
from ckpt.store import place
from ckpt.store.hibernation import Hibernation, Item
from tests.contract import fake
from tests.contract.subject import DRIVER, LIMIT_S, parse, wait_until

BEFORE = "the-boot-before"
SETTINGS = HibernateSettings()


class World:
    def __init__(self, directory: Path, engine: fake.FakeEngine) -> None:
        self.engine, self.root = engine, directory / "store"

    def save(self, name: str, tag: str = "hibernate", *, leave_running: bool = False) -> str:
        options = DumpOptions(tcp_established=False, file_locks=False, shell_job=False, leave_running=leave_running)
        (outcome,) = checkpoint([Target.parse(name)], options=options, store_root=self.root, emit=ignore)
        assert outcome.checkpoint, outcome.error
        if tag:
            mark.tag([outcome.checkpoint.manifest.id], [tag], [], store_root=self.root)
        return outcome.checkpoint.manifest.id

    def plan(self, *containers: Container, **facts: str) -> Hibernation:
        items = [Item(f"fake:{c.name}", "fake", c.id, c.name, "save") for c in containers]
        made = Hibernation.create(self.root, "reboot", items, **{"boot_id": BEFORE, **facts})
        made.release()
        return made

    def saved(self, *containers: Container) -> Hibernation:
        """All of them saved, as before a reboot."""
        made = self.plan(*containers)
        for container in containers:
            made.write("saved", item=f"fake:{container.name}", checkpoint_id=self.save(container.name))
        made.write("saved")
        return made

    def resume(self, settings: HibernateSettings = SETTINGS, *, same_boot: bool = False) -> Resumed:
        return resuming.resume(store_root=self.root, settings=settings, same_boot=same_boot, emit=ignore)

    def how(self, settings: HibernateSettings = SETTINGS) -> dict[str, str]:
        return {one.target.removeprefix("fake:"): one.how for one in self.resume(settings).back}

    def counters(self, container: Container) -> int:
        """How many processes count for it."""
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += container.id.encode() in path.read_bytes()
            except OSError:
                continue
        return found

    def state(self, container: Container) -> str:
        return next((c.state for c in self.engine.containers() if c.id == container.id), "gone")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "world").mkdir()
    monkeypatch.setattr(resuming, "SETTLE_S", 0.05)
    made = World(tmp_path, fake.install(tmp_path / "world", monkeypatch.setattr))
    yield made
    made.engine.end_all()


def another_boot(monkeypatch: pytest.MonkeyPatch, boot_id: str = "a-later-boot") -> None:
    now = {**journals.identity(), "boot_id": boot_id}
    monkeypatch.setattr(journals, "identity", lambda: now)
    monkeypatch.setattr(resuming, "identity", lambda: now)


def test_nothing_was_saved(world: World) -> None:
    done = world.resume()
    assert done.back == () and done.reason == "nothing was saved"


def test_all_come_back_once(world: World) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    journal = world.saved(web, db)
    at = world.engine.ticks(web.id)
    assert world.how() == {"web": "restored", "db": "restored"}
    assert wait_until(lambda: world.engine.ticks(web.id) > at)
    assert journal.state == "resumed" and journal.states()["fake:web"].facts["rungs"][0]["ok"]
    again = world.resume()
    assert again.back == () and "is over" in again.reason
    assert world.counters(web) == 1


def test_a_volume_that_several_have_stays_as_the_last_of_them_left_it(world: World) -> None:
    """Of whom the older checkpoint is, he must not bring its content back."""
    web, db = world.engine.start("web", volumes=("data", "own")), world.engine.start("db", volumes=("data",))
    data, own = (world.engine.world / "volumes" / name / "rows" for name in ("data", "own"))
    data.write_text("old")
    own.write_text("kept")
    journal = world.plan(db, web)
    for container in (web, db):
        journal.write("saved", item=f"fake:{container.name}", checkpoint_id=world.save(container.name))
        data.write_text("new")
    journal.write("saved")
    own.write_text("lost")
    assert world.how(replace(SETTINGS, parallel_boot=1)) == {"db": "restored", "web": "restored"}
    assert (data.read_text(), own.read_text()) == ("new", "kept")


def test_not_by_itself(world: World) -> None:
    web = world.engine.start("web")
    world.saved(web)
    settings = replace(SETTINGS, on_boot="ignore")
    assert "on_boot" in resuming.resume(store_root=world.root, settings=settings, at_boot=True, emit=ignore).reason
    assert world.state(web) == "exited" and world.how(settings) == {"web": "restored"}


def test_not_in_the_same_boot_unless_told_so(world: World) -> None:
    web = world.engine.start("web")
    world.plan(web, boot_id=journals.identity()["boot_id"])
    world.save("web")
    assert "not been started anew" in world.resume().reason and world.state(web) == "exited"
    assert [one.how for one in world.resume(same_boot=True).back] == ["restored"]


def test_another_hosts_journal(world: World) -> None:
    journal = world.plan(world.engine.start("web"), machine_id="0" * 32)
    before = journal.entries()
    with pytest.raises(IncompatibleHost) as refused:
        world.resume()
    assert refused.value.exit_code == 33 and journal.entries() == before


def test_another_ckpt_is_at_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = world.saved(world.engine.start("web"))
    journal.acquire()
    monkeypatch.setattr(resuming, "GUARDS_LIMIT_S", 0.0)
    with pytest.raises(BusyError):
        world.resume()


def test_one_that_cannot_be_restored_starts_cold_with_its_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    (world.engine.world / web.id / "upper" / "written").write_text("changed")
    journal = world.saved(web, db)
    monkeypatch.setenv("CKPT_FAKE_BROKEN", "web")
    done = world.resume()
    (cold,) = (one for one in done.back if one.target == "fake:web")
    assert {one.target: one.how for one in done.back} == {"fake:web": "cold", "fake:db": "restored"}, cold.rungs
    assert isinstance(cold.error, StartedCold) and "it is broken" in cold.error.message
    assert [(row["rung"], row["ok"]) for row in cold.rungs] == [("restore", False), ("restore-closed", False), ("cold", True)]
    assert world.state(web) == "running" and (world.engine.world / web.id / "upper" / "written").read_text() == "changed"
    assert journal.states()["fake:web"].state == "cold"


def test_nothing_begins_anew_before_all_restores_are_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the first free address, which one that is still to be restored may have had."""
    world.saved(world.engine.start("db"), world.engine.start("web"))
    monkeypatch.setenv("CKPT_FAKE_BROKEN", "db")
    climbed: list[tuple[str, str]] = []
    climb = Climb._climb
    monkeypatch.setattr(Climb, "_climb", lambda self, rung: (climbed.append((self.item.name, rung)), climb(self, rung))[1])
    monkeypatch.setattr(resuming, "layers", lambda todo: [[item for item in todo if item.name == name] for name in ("db", "web")])
    assert world.how() == {"db": "cold", "web": "restored"}
    assert climbed[-1] == ("db", "cold") and climbed.index(("web", "restore")) < len(climbed) - 1


def test_restore_or_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    world.saved(web)
    monkeypatch.setenv("CKPT_FAKE_BROKEN", "web")
    done = world.resume(replace(SETTINGS, ladder=("restore",)))
    assert [one.how for one in done.back] == ["failed"] and world.state(web) == "gone"


def test_one_that_ends_at_once_has_not_come_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    world.saved(web)
    step = Climb.step

    def killed(climb: Climb) -> None:
        step(climb)
        if climb.rungs[:1] == ["restore"] and climb.container:
            world.engine.stop(climb.container, 0.0)

    monkeypatch.setattr(Climb, "step", killed)
    (back,) = world.resume().back
    assert back.how == "restored-closed" and "ended as soon" in back.rungs[0]["error"]["message"]


def test_a_bug_in_a_rung_is_a_failed_rung(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    world.saved(web)
    restore = Climb._restore
    monkeypatch.setattr(Climb, "_restore", lambda climb, options: restore(climb, options) if options.cold else 1 / 0)
    assert world.how() == {"web": "cold"}


def test_what_something_else_started_is_left_alone(world: World) -> None:
    web = world.engine.start("web")
    world.saved(web)
    world.engine.start(web)
    (back,) = world.resume().back
    assert back.how == "cold" and back.error and "something else" in back.error.message
    assert world.counters(web) == 1


def test_a_checkpoint_that_is_gone(world: World) -> None:
    web = world.engine.start("web")
    journal = world.saved(web)
    journal.write("saved", item="fake:web", checkpoint_id="f" * 32)
    (back,) = world.resume().back
    assert back.how == "cold" and back.error and "not in the store" in back.error.message


def test_stopped_ones_begin_anew_and_ignored_ones_are_left(world: World) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    items = [Item("fake:web", "fake", web.id, "web", "stop"), Item("fake:db", "fake", db.id, "db", "ignore")]
    journal = Hibernation.create(world.root, "reboot", items, boot_id=BEFORE)
    journal.release()
    world.engine.stop(web, 0.0)
    world.engine.stop(db, 0.0)
    journal.write("stopped", item="fake:web")
    journal.write("saved")
    done = world.resume()
    assert [(one.how, one.error) for one in done.back] == [("cold", None), ("left", None)]
    assert (world.state(web), world.state(db)) == ("running", "exited")


def cut(world: World) -> tuple[Container, Container, Container, Container]:
    """The power went while it was saving: one saved, one saved without a line, one armed, one neither."""
    all_four = (one, two, three, _four) = tuple(world.engine.start(name) for name in ("one", "two", "three", "four"))
    world.save("three", arm.TAG, leave_running=True)
    journal = world.plan(*all_four)
    journal.write("saved", item="fake:one", checkpoint_id=world.save("one"))
    journal.write("saving", item="fake:two")
    world.save("two", "")
    for container in all_four[2:]:
        world.engine.stop(container, 0.0)
    return one, two, three, _four


def test_power_was_cut_while_saving(world: World) -> None:
    containers = cut(world)
    assert world.how() == {"one": "restored", "two": "restored", "three": "restored", "four": "cold"}
    assert [world.state(c) for c in containers] == ["running"] * 4
    states = Hibernation.every(world.root)[-1].states()
    assert "armed checkpoint" in states["fake:three"].facts["note"] and "before it was saved" in states["fake:four"].facts["note"]


@pytest.mark.parametrize(("on_crash", "wanted"), [("cold", "cold"), ("ignore", "left")])
def test_power_was_cut_and_the_settings_decide(world: World, on_crash: str, wanted: str) -> None:
    cut(world)
    how = world.how(replace(SETTINGS, on_crash=on_crash))  # type: ignore[arg-type]
    assert how == {"one": "restored", "two": "restored", "three": wanted, "four": wanted}


def test_a_crash_without_a_hibernation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    at = world.engine.ticks(web.id)
    world.save("web", arm.TAG, leave_running=True)
    row = {"every_s": 60.0, "keep_last": 3, "engine": "fake"}
    armed = {f"fake:{c.name}": {**row, "container_id": c.id, "name": c.name} for c in (web, db)}
    (place.own(world.root) / "armed.json").write_text(json.dumps(armed))
    assert world.resume().reason == "nothing was saved", "this boot's own are no reason"
    for container in (web, db):
        world.engine.stop(container, 0.0)
    another_boot(monkeypatch)
    assert world.how(replace(SETTINGS, on_crash="ignore")) == {}
    assert world.how() == {"web": "restored"}
    assert world.engine.ticks(web.id) >= at and Hibernation.every(world.root)[-1].plan["kind"] == "crash"
    world.engine.stop(web, 0.0)
    assert world.how() == {}, "once in a boot"
    assert world.state(web) == "exited"


def test_a_canary_that_dies_keeps_all_from_being_restored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    journal = world.plan(web, kernel="another")
    journal.write("saved", item="fake:web", checkpoint_id=world.save("web"))
    journal.write("saved")
    monkeypatch.setattr(canary, "sing", lambda: canary.Song(False, "it died", 0.1))
    done = world.resume()
    assert [one.how for one in done.back] == ["cold"] and done.canary and not done.canary.ok
    assert [(row["rung"], row["ok"]) for row in done.back[0].rungs] == [("restore", False), ("restore-closed", False), ("cold", True)]
    assert any(entry.get("canary") for entry in journal.entries())


def test_no_canary_for_the_same_kernel(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.saved(world.engine.start("web"))
    monkeypatch.setattr(canary, "sing", lambda: 1 / 0)
    assert world.how() == {"web": "restored"}


def test_layers(world: World) -> None:
    def item(name: str, *after: str) -> Item:
        return Item(f"fake:{name}", "fake", name * 8, name, "save", after=after)

    found = layers([item("c", "fake:b"), item("a"), item("b", "a", "fake:elsewhere"), item("x", "fake:y"), item("y", "fake:x")])
    assert [[one.name for one in layer] for layer in found] == [["a"], ["b"], ["c"], ["x", "y"]]


def saved_group(world: World) -> tuple[Hibernation, Container, Container]:
    """A group of two."""
    web, db = (world.engine.start(name) for name in ("web", "db"))
    items = [Item(f"fake:{c.name}", "fake", c.id, c.name, "save", group="shop", after=("fake:db",) if c is web else ()) for c in (web, db)]
    made = Hibernation.create(world.root, "reboot", items, boot_id=BEFORE)
    made.release()
    options = DumpOptions(tcp_established=False, file_locks=False, shell_job=False)
    targets = [Target.parse("web"), Target.parse("db")]
    for one in checkpoint_group("shop", targets, options=options, store_root=world.root, emit=ignore, tags=["hibernate"]):
        assert one.checkpoint, one.error
        made.write("saved", item=f"fake:{one.checkpoint.manifest.name}", checkpoint_id=one.checkpoint.manifest.id)
    made.write("saved")
    return made, web, db


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    passed: list[str] = []
    real = faults.point
    monkeypatch.setattr(faults, "point", lambda name: (passed.append(name), real(name))[1])
    return passed


def test_a_group_comes_back_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, web, db = saved_group(world)
    passed = watched(monkeypatch)
    assert world.how() == {"web": "restored", "db": "restored"}
    assert passed.count("group-restore-commit") == 1 and passed.count("hibernate-rung") == 1
    assert [world.state(c) for c in (web, db)] == ["running"] * 2 and not list(place.jobs(world.root).iterdir())
    assert all(state.facts["rungs"] == [{**state.facts["rungs"][0], "rung": "restore", "ok": True}] for state in journal.states().values())


def test_of_a_group_one_cannot_be_restored_and_each_goes_on_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, web, db = saved_group(world)
    monkeypatch.setenv("CKPT_FAKE_BROKEN", "web")
    done = world.resume()
    assert {one.target: one.how for one in done.back} == {"fake:web": "cold", "fake:db": "restored-closed"}
    rungs = {one.target: [(row["rung"], row["ok"]) for row in one.rungs] for one in done.back}
    assert rungs["fake:db"] == [("restore", False), ("restore-closed", True)]
    assert [world.state(c) for c in (web, db)] == ["running"] * 2


def test_of_a_set_that_is_not_whole_each_comes_back_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, web, _ = saved_group(world)
    world.engine.start(web)
    passed = watched(monkeypatch)
    assert world.how() == {"web": "cold", "db": "restored"}
    assert "group-restore-commit" not in passed


def test_the_pods_of_a_layer_are_there_before_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_group(world)
    started: list[str] = []
    monkeypatch.setattr(fake.FakeEngine, "pod", lambda self, name: (name, "infra"), raising=False)
    monkeypatch.setattr(fake.FakeEngine, "start_pod", lambda self, name: started.append(name), raising=False)
    monkeypatch.setattr(sets, "described", lambda checkpoint: {"pod": "shop"})
    assert world.how() == {"web": "restored", "db": "restored"} and started == ["shop"]


@pytest.mark.parametrize("at_boot", [True, False])
@pytest.mark.parametrize("there", ["gone", "left", "runs"])
def test_a_pod_that_its_unit_makes_anew(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_boot: bool, there: str) -> None:
    """Its unit is started, and its containers come back into the new one; theirs are not to start them meanwhile. One that runs is left alone."""
    journal, *_ = saved_group(world)
    items = [replace(item, units=(f"{item.name}.service",)) for item in journal.items]
    journal.acquire()
    journal.extend(items, "reboot")
    journal.write("saved")
    journal.release()
    happened: list[object] = []
    engine = fake.FakeEngine
    real = engine.restore
    infra = Container("fake", "infra", "infra", "running" if there == "runs" else "exited")

    def restore(self: fake.FakeEngine, stage: Path, manifest: Manifest, options: RestoreOptions, *rest: object, **more: object) -> object:
        happened.append((manifest.name, options.pods))
        return real(self, stage, manifest, options, *rest, **more)  # type: ignore[arg-type]

    described = engine.describe
    new = {
        "pod": lambda self, name: None if there == "gone" and name == "then" else (name, "infra"),
        "start_pod": lambda self, name: happened.append(("start_pod", name)),
        "command_of": lambda self, container: [],
        "command_in": lambda self, config: ["made"],
        "pod_unit": lambda self, command: "shop-pod.service",
        "pod_now": lambda self, command: "now",
        "describe": lambda self, one: infra if one.id == "infra" else described(self, one),
    }
    for name, does in new.items():
        monkeypatch.setattr(engine, name, does, raising=False)
    monkeypatch.setattr(engine, "restore", restore)
    monkeypatch.setattr(sets, "described", lambda checkpoint: {"pod": "then"})
    monkeypatch.setattr(layout, "CONFIG", "artifacts/ckpt.json")  # any file: the fake's have none
    monkeypatch.setattr(guards, "RESUMED", tmp_path / "resumed")
    monkeypatch.setattr(guards, "guarded", lambda: ())
    monkeypatch.setattr(sets.systemd, "running", lambda: True)
    monkeypatch.setattr(sets.systemd, "notify", lambda *words, **more: None)

    def control(*words: str, **more: object) -> str:
        marked = sorted(path.name for path in (tmp_path / "resumed").iterdir()) if (tmp_path / "resumed").exists() else []
        happened.append((words, marked))
        return ""

    monkeypatch.setattr(sets.systemd, "control", control)
    done = resuming.resume(store_root=world.root, settings=SETTINGS, at_boot=at_boot, emit=ignore)
    assert {one.target: one.how for one in done.back} == {"fake:web": "restored", "fake:db": "restored"}, done.back
    if there == "runs":
        assert happened[0] == ("start_pod", "then") and sorted(happened[1:]) == [("db", ()), ("web", ())]  # type: ignore[type-var]
        return
    assert happened[:2] == [(("start", "--", "shop-pod.service"), [] if at_boot else ["db.service", "web.service"]), ("start_pod", "now")]
    assert sorted(happened[2:]) == [("db", (("then", "now"),)), ("web", (("then", "now"),))]  # type: ignore[type-var]


def test_layers_of_groups() -> None:
    def item(name: str, *after: str, group: str = "") -> Item:
        return Item(f"fake:{name}", "fake", name * 8, name, "save", after=after, group=group)

    def names(*items: Item) -> list[list[str]]:
        return [sorted(one.name for one in layer) for layer in _by_after(items)]

    assert names(item("a", group="g"), item("b", "a", "c", group="g"), item("c"), item("d", "a")) == [["c"], ["a", "b"], ["d"]]
    assert names(item("a", group="g"), item("x", "a"), item("b", "x", group="g"), item("z")) == [["z"], ["a"], ["x"], ["b"]]


@pytest.mark.parametrize("step", ["hibernate-rung", "removed", "group-restored", "group-restore-commit", "hibernate-climbed", "hibernate-healthy"])
def test_a_group_killed_and_run_again(world: World, step: str) -> None:
    journal, web, db = saved_group(world)
    argv = [sys.executable, DRIVER, "fake", world.engine.world, "hibernate-resume", "", "--store", world.root]
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "CKPT_FAULT": f"{step}:kill"}
    assert parse(run(argv, env=env, timeout_s=LIMIT_S, check=False)).get("killed")
    assert world.how() == {"web": "restored", "db": "restored"}
    assert wait_until(lambda: [world.counters(c) for c in (web, db)] == [1, 1]), "a process that was just begun is not known for a counter yet"
    assert [world.counters(c) for c in (web, db)] == [1, 1] and [world.state(c) for c in (web, db)] == ["running"] * 2
    assert journal.state == "resumed" and wait_until(lambda: not list(place.jobs(world.root).iterdir()))


STEPS = ("hibernate-rung", "removed", "restored", "restore-commit", "resumed", "hibernate-healthy", "hibernate-back")


@pytest.mark.parametrize("step", STEPS)
def test_killed_and_run_again(world: World, step: str) -> None:
    web = world.engine.start("web")
    journal = world.saved(web)
    at = world.engine.ticks(web.id)
    argv = [sys.executable, DRIVER, "fake", world.engine.world, "hibernate-resume", "", "--store", world.root]
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "CKPT_FAULT": f"{step}:kill"}
    assert parse(run(argv, env=env, timeout_s=LIMIT_S, check=False)).get("killed")
    assert world.how() == {"web": "restored"}
    assert wait_until(lambda: world.engine.ticks(web.id) > at)
    assert world.counters(web) == 1 and world.state(web) == "running"
    assert journal.state == "resumed" and wait_until(lambda: not list(place.jobs(world.root).iterdir())), "guards are given a moment"
    assert "is over" in world.resume().reason and world.counters(web) == 1


def test_a_full_disk_does_not_keep_anything_down(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    world.saved(web)
    write = Hibernation.write

    def full(self: Hibernation, state: str, *, item: str = "", **facts: object) -> None:
        if item:
            raise OSError(28, "No space left on device")
        write(self, state, item=item, **facts)

    monkeypatch.setattr(Hibernation, "write", full)
    assert world.how() == {"web": "restored"}


def test_a_journal_without_sense(world: World) -> None:
    journal = world.plan(world.engine.start("web"))
    text = (journal.directory / "journal.jsonl").read_text().replace('"engine"', '"motor"')
    (journal.directory / "journal.jsonl").write_text(text)
    with pytest.raises(CkptError, match="makes no sense"):
        world.resume()
