"""Selection, order, and saving all, over the fake engine in one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt.engines.registry import NamedEngine
from ckpt.errors import BusyError, CkptError, DumpFailed, TargetNotFound, UsageError
from ckpt.events import Event, Notice
from ckpt.host import facts as host_facts
from ckpt.model import Container, Target
from ckpt.ops import faults
from ckpt.ops.hibernate import order
from ckpt.ops.hibernate.plan import Wish, plan
from ckpt.ops.hibernate.save import Saved, save
from ckpt.ops.hibernate.selection import Chosen, Selection, select
from ckpt.ops.hibernate.settings import HibernateSettings, Workload
from ckpt.ops.hibernate.status import Status, status
from ckpt.store import groups
from ckpt.store.catalog import Catalog
from ckpt.store.hibernation import Hibernation
from tests.contract import fake

SETTINGS = HibernateSettings(parallel_shutdown=3)


class World:
    def __init__(self, directory: Path, engine: fake.FakeEngine) -> None:
        self.engine, self.root = engine, directory / "store"
        self.events: list[Event] = []

    def save(self, *names: str, settings: HibernateSettings = SETTINGS, **wish: Any) -> Saved:
        targets = tuple(Target.parse(name) for name in names)
        return save(Wish(targets, **wish), settings=settings, store_root=self.root, emit=self.events.append)

    def status(self) -> Status:
        found = status(store_root=self.root)
        assert found is not None
        return found

    def states(self) -> dict[str, str]:
        return {line.target: line.state for line in self.status().lines}

    def runs(self, container: Container) -> bool:
        return self.engine.describe(container).state == "running"

    def leftovers(self) -> list[str]:
        return [str(p) for place in ("jobs", "tmp") for p in sorted((self.root / place).glob("*"))]

    def killed(self, fault: str, *names: str) -> None:
        """A save in a process of its own, that dies at a step."""
        script = (
            "import os, sys; from pathlib import Path; from tests.contract import fake; fake.install(Path(os.environ[fake.WORLD]), setattr);"
            "from ckpt.model import Target; from ckpt.ops.hibernate.plan import Wish; from ckpt.ops.hibernate.save import save;"
            "from ckpt.ops.hibernate.settings import HibernateSettings;"
            "save(Wish(tuple(map(Target.parse, sys.argv[2:]))), settings=HibernateSettings(parallel_shutdown=1), store_root=Path(sys.argv[1]),"
            " emit=lambda event: None)"
        )
        env = {**os.environ, fake.WORLD: str(self.engine.world), "CKPT_FAULT": f"{fault}:kill", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", script, str(self.root), *names], env=env, timeout=60, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "world").mkdir()
    made = World(tmp_path, fake.install(tmp_path / "world", monkeypatch.setattr))
    yield made
    made.engine.end_all()


# -- who ------------------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_a_label_and_a_label_over_the_file(world: World) -> None:
    world.engine.start("a", labels={"ckpt.reboot": "stop"})
    world.engine.start("b")
    world.engine.start("c", labels={"ckpt.checkpoint": "deny"})
    settings = replace(SETTINGS, workloads={"a": Workload("ignore"), "fake:b": Workload("ignore")})

    def actions(targets: tuple[str, ...] = (), **options: Any) -> dict[str, str]:
        found = select(tuple(map(Target.parse, targets)), settings=settings, **options)
        return {one.target: one.action for one in found.chosen}

    assert actions() == {"fake:a": "stop", "fake:b": "ignore", "fake:c": "stop"}
    assert actions(("a", "b")) == {"fake:a": "save", "fake:b": "save"}
    assert actions(filters=("name=^[ab]$",)) == {"fake:a": "stop", "fake:b": "ignore"}
    assert actions(filters=("label=ckpt.reboot", "engine=fake")) == {"fake:a": "stop"}
    assert actions(filters=("label=ckpt.reboot=save",)) == {}
    for wrong in ("lable=x", "name=(", "name"):
        with pytest.raises(UsageError):
            actions(filters=(wrong,))
    with pytest.raises(UsageError, match="forbids"):
        actions(("c",))


def test_a_label_that_means_nothing_stops_all_but_a_shutdown(world: World) -> None:
    web = world.engine.start("web", labels={"ckpt.reboot": "maybe"})
    db = world.engine.start("db")
    with pytest.raises(UsageError, match="maybe"):
        world.save()
    assert world.runs(web) and world.runs(db) and Hibernation.newest(world.root) is None
    saved = world.save(kind="shutdown")
    assert not world.runs(db) and {o.target: o.ok for o in saved.outcomes}["fake:db"]
    assert any(isinstance(e, Notice) and "maybe" in e.text for e in world.events)


# -- in which order --------------------------------------------------------------------------------------------------------


def chosen(engine: NamedEngine, name: str, *after: str, requires: tuple[str, ...] = (), **labels: str) -> Chosen:
    container = Container("fake", name * 12, name, "running", requires=requires, labels={key.replace("__", "."): v for key, v in labels.items()})
    return Chosen(engine, container, "save", f"fake:{name}", (name, f"fake:{name}", container.id), after, labels=container.labels)


def layers(*all: Chosen, known: tuple[str, ...] = ()) -> list[list[str]]:
    return order.layers(order.edges(Selection(all, frozenset(known))))


def test_what_is_needed_comes_first(world: World) -> None:
    e: NamedEngine = world.engine
    project = {"com__docker__compose__project": "shop"}
    web = chosen(e, "web", "cache", com__docker__compose__service="web", com__docker__compose__depends_on="db:service_started:false,gone", **project)
    db = chosen(e, "db", com__docker__compose__service="db", **project)
    assert layers(web, db, chosen(e, "cache", "fake:db")) == [["fake:db"], ["fake:cache"], ["fake:web"]]
    assert layers(chosen(e, "a", requires=("b" * 12,)), chosen(e, "b")) == [["fake:b"], ["fake:a"]]
    assert layers(chosen(e, "a", "stopped"), known=("stopped",)) == [["fake:a"]]


def test_a_circle_and_a_name_that_nobody_has_are_one_error(world: World) -> None:
    e: NamedEngine = world.engine
    with pytest.raises(UsageError, match="circle") as caught:
        layers(chosen(e, "a", "b"), chosen(e, "b", "c"), chosen(e, "c", "a", "nobody"))
    assert "nobody" in caught.value.message
    with pytest.raises(UsageError, match="itself"):
        layers(chosen(e, "a", "a"))
    loose = order.edges(Selection((chosen(e, "a", "b"), chosen(e, "b", "a", "nobody"))), lenient=True)
    assert sorted(map(len, order.layers(loose))) == [1, 1]


# -- saving ----------------------------------------------------------------------------------------------------------------


def test_all_are_saved_stopped_or_left(world: World) -> None:
    saved = {name: world.engine.start(name, labels={"ckpt.after": "db"} if name != "db" else None) for name in ("web", "db", "cache")}
    stopped, left = world.engine.start("log", labels={"ckpt.reboot": "stop"}), world.engine.start("dns", labels={"ckpt.reboot": "ignore"})
    done = world.save()
    assert done.whole and len(done.outcomes) == 4
    assert world.states() == {**{f"fake:{name}": "saved" for name in saved}, "fake:log": "stopped", "fake:dns": "ignored"}
    assert not any(world.runs(one) for one in (*saved.values(), stopped)) and world.runs(left)
    checkpoints = Catalog(world.root).all()
    assert len(checkpoints) == 3 and all(c.entry.tags == ("hibernate",) and not c.entry.foreign for c in checkpoints)
    facts = {line.target: line.facts for line in world.status().lines}
    assert {facts[f"fake:{c.manifest.name}"]["checkpoint_id"] for c in checkpoints} == {c.manifest.id for c in checkpoints}
    written = [entry["item"] for entry in Hibernation.every(world.root)[0].entries() if entry["state"] in ("saved", "stopped") and "item" in entry]
    assert written[-1] == "fake:db", "what others need is saved last"
    assert world.status().exit_code == 0 and world.leftovers() == []
    again = world.save()
    assert again.outcomes == () and again.hibernation == done.hibernation and len(Catalog(world.root).all()) == 3


def test_one_that_cannot_be_saved_stops_all_before_anything_is_touched(world: World) -> None:
    web, bad, worse = world.engine.start("web"), world.engine.start("bad", broken="preflight"), world.engine.start("worse", broken="preflight")
    with pytest.raises(DumpFailed) as caught:
        world.save()
    assert caught.value.exit_code == 20 and "fake:bad" in caught.value.message and "fake:worse" in caught.value.message
    assert all(map(world.runs, (web, bad, worse))) and Catalog(world.root).all() == [] and Hibernation.newest(world.root) is None
    done = world.save(best_effort=True)
    assert not done.whole and {o.target: o.ok for o in done.outcomes} == {"fake:web": True, "fake:bad": False, "fake:worse": False}
    assert world.states() == {"fake:web": "saved", "fake:bad": "save-failed", "fake:worse": "save-failed"} and world.status().exit_code == 20


def test_all_together_must_fit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    needed = plan(Wish(), SETTINGS, Catalog(world.root), world.events.append).needed_bytes
    monkeypatch.setattr(host_facts, "free_bytes", lambda path: needed * 3 // 4)
    with pytest.raises(DumpFailed, match="for all together"):
        world.save()
    assert world.runs(web) and world.runs(db)


@pytest.mark.parametrize("width", [1, 3])
def test_a_dump_that_fails_brings_back_those_that_had_ended(world: World, width: int) -> None:
    web, db = world.engine.start("web"), world.engine.start("db", broken="dump", labels={"ckpt.after": "late"})
    late = world.engine.start("late", labels={"ckpt.after": "stop"})
    stop = world.engine.start("stop", labels={"ckpt.reboot": "stop"})
    early = world.engine.start("early", labels={"ckpt.after": "db"})
    with pytest.raises(DumpFailed) as caught:
        world.save(parallel=width)
    assert "brought back" in (caught.value.where or "") and "it is broken" in caught.value.message
    assert all(map(world.runs, (web, db, late, stop, early))) and world.leftovers() == []
    assert world.status().state == "abandoned" and world.states()["fake:early"] == "restored" and world.states()["fake:late"] == "dropped"


STEPS = ("hibernate-planned", "hibernate-saving", "hibernate-one", "hibernate-ended", "hibernate-one-saved", "hibernate-all")


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_it_brings_back_what_had_ended(world: World, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    web, stop = world.engine.start("web"), world.engine.start("stop", labels={"ckpt.reboot": "stop"})
    monkeypatch.setenv("CKPT_FAULT", f"{step}:interrupt")
    with pytest.raises(KeyboardInterrupt):
        world.save()
    monkeypatch.delenv("CKPT_FAULT")
    assert world.runs(web) and world.runs(stop) and world.leftovers() == []
    assert world.save().whole and not world.runs(web)


@pytest.mark.parametrize("step", [*STEPS, "held", "commit"])
def test_killed_it_is_gone_on_with(world: World, step: str) -> None:
    containers = [world.engine.start(name) for name in ("web", "db")]
    world.killed(step)
    done = world.save()
    assert done.whole and world.states() == {"fake:web": "saved", "fake:db": "saved"}, world.states()
    assert not any(map(world.runs, containers)) and world.leftovers() == []
    assert len(Hibernation.every(world.root)) == 1
    facts = {line.target: line.facts for line in world.status().lines}
    there = {c.manifest.id: c.manifest for c in Catalog(world.root).all()}
    assert all(there[facts[f"fake:{c.name}"]["checkpoint_id"]].container_id == c.id for c in containers)
    assert len(there) <= 3, "at most the one that was stored and not used"


def test_killed_and_named_again(world: World) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    world.killed("hibernate-one-saved", "web", "db")
    assert [world.runs(web), world.runs(db)].count(True) == 1
    assert world.save("web", "db").whole and not world.runs(web) and not world.runs(db)
    assert len(Catalog(world.root).all()) == 2


def test_what_has_not_come_back_is_taken_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    first = world.save().hibernation
    # As after a boot: the journal is of another one.
    path = world.root / "hibernate" / first / "journal.jsonl"
    lines = path.read_text().splitlines()
    plan_line = {**json.loads(lines[0]), "boot_id": "another"}
    path.write_text("\n".join([json.dumps(plan_line), *lines[1:]]) + "\n")
    world.engine.start("db")
    second = world.save()
    assert second.hibernation != first and world.states() == {"fake:web": "saved", "fake:db": "saved"} and not world.runs(web)
    assert Hibernation(path.parent).state == "abandoned"
    newest = Hibernation.newest(world.root)
    assert newest is not None and newest.states()["fake:web"].facts["ref"] == "web@1"


def test_what_an_earlier_save_had_ended_waits_on_when_the_next_one_fails(world: World) -> None:
    web = world.engine.start("web")
    world.save()
    db = world.engine.start("db", broken="dump")
    with pytest.raises(DumpFailed):
        world.save()
    assert world.runs(db) and not world.runs(web)
    assert world.status().state == "saved" and world.states() == {"fake:web": "saved", "fake:db": "save-failed"}


def test_another_hosts_journal_is_left_alone(world: World) -> None:
    world.engine.start("web")
    made = Hibernation.create(world.root, "manual", [], machine_id="another")
    made.release()
    assert world.save().whole and made.state == "planned"


def test_two_at_a_time_is_one_too_many(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    web = world.engine.start("web")
    (world.root / "hibernate").mkdir(parents=True)
    with open(world.root / "hibernate" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            world.save()
    assert world.runs(web)


def test_at_a_shutdown_one_that_was_started_anew_after_ckpt_reboot_is_not_saved_over(world: World) -> None:
    web = world.engine.start("web")
    world.save(kind="reboot")
    world.engine.start(web)
    log = world.engine.start("log")
    done = world.save(kind="shutdown")
    assert [o.target for o in done.outcomes] == ["fake:log"] and not world.runs(log) and world.runs(web)
    assert world.states() == {"fake:web": "saved", "fake:log": "saved"} and len(Catalog(world.root).all()) == 2
    # After a save by hand what runs is what somebody brought back: it is saved anew.
    assert {o.target for o in world.save().outcomes} == {"fake:web"}


def test_time_is_up(world: World) -> None:
    web = world.engine.start("web")
    with pytest.raises(DumpFailed, match="time was up"):
        world.save(timeout_s=1e-6)
    assert world.runs(web) and world.states() == {"fake:web": "dropped"}


def test_old_checkpoints_of_hibernations_go(world: World) -> None:
    web = world.engine.start("web")
    for _ in range(3):
        world.save(settings=replace(SETTINGS, keep_last=2))
        world.engine.start(web)
    assert [c.ref for c in Catalog(world.root).all()] == ["web@2", "web@3"], world.events


def test_raw_memory_is_kept_once_and_packed_memory_always(world: World) -> None:
    web = world.engine.start("web")
    for memory, kept in (("packed", ["web@1"]), ("packed", ["web@1", "web@2"]), ("raw", ["web@3"])):
        world.save(settings=replace(SETTINGS, memory=memory))
        world.engine.start(web)
        assert [c.ref for c in Catalog(world.root).all()] == kept, world.events


def test_what_is_of_the_past_makes_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    world.save(settings=replace(SETTINGS, keep_last=5))
    world.engine.start(web)
    monkeypatch.setattr(host_facts, "free_bytes", lambda root: 1 if Catalog(world.root).all() else 1 << 40)
    world.save(settings=replace(SETTINGS, keep_last=5))
    assert [c.ref for c in Catalog(world.root).all()] == ["web@2"]
    assert any("to make room" in getattr(event, "text", "") for event in world.events)


def test_reading_it_back_finds_a_bad_disk_while_it_still_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    monkeypatch.setattr(Catalog, "check", lambda self, checkpoint: ["pages-1.img is damaged"])
    with pytest.raises(DumpFailed, match="not stored as it was made"):
        world.save(verify=True)
    assert world.runs(web) and Catalog(world.root).all() == []


def test_status_by_id(world: World) -> None:
    assert status(store_root=world.root) is None
    world.engine.start("web")
    made = world.save().hibernation
    for ref in (made, made[:12], made.partition("-")[2][:4]):
        assert status(ref, store_root=world.root) == world.status()
    with pytest.raises(TargetNotFound):
        status("nothing", store_root=world.root)


def test_an_engine_that_cannot_stop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web", labels={"ckpt.reboot": "stop"})
    monkeypatch.setattr(fake.FakeEngine, "stop", lambda self, container, timeout_s: (_ for _ in ()).throw(CkptError("it is stuck")))
    with pytest.raises(DumpFailed, match="it is stuck"):
        world.save()
    assert world.runs(web)


# -- groups ----------------------------------------------------------------------------------------------------------------

SHOP = {"ckpt.group": "shop"}


def test_a_group_is_saved_as_one_set(world: World) -> None:
    world.engine.start("db", labels=SHOP)
    world.engine.start("web", labels={**SHOP, "ckpt.after": "db,cache"})
    world.engine.start("cache")
    world.engine.start("log", labels={**SHOP, "ckpt.reboot": "stop"})
    world.engine.start("single", labels={"ckpt.group": "other"})
    assert world.save().whole and world.leftovers() == []
    assert world.states() == {**{f"fake:{name}": "saved" for name in ("db", "web", "cache", "single")}, "fake:log": "stopped"}
    found = {c.manifest.name: c for c in Catalog(world.root).all()}
    assert {name: c.entry.group for name, c in found.items()} == {"db": "shop@1", "web": "shop@1", "cache": "", "single": ""}
    assert all("hibernate" in c.entry.tags for c in found.values())
    facts = {line.target: line.facts for line in world.status().lines}
    assert all(facts[f"fake:{name}"]["checkpoint_id"] == c.manifest.id for name, c in found.items())
    assert {one.checkpoint_id for one in groups.every(world.root)[0].members} == {found["db"].manifest.id, found["web"].manifest.id}


def test_of_a_group_one_that_cannot_be_saved_keeps_all_of_it(world: World) -> None:
    web, db = world.engine.start("web", labels=SHOP), world.engine.start("db", labels=SHOP, broken="dump")
    world.engine.start("cache")
    with pytest.raises(DumpFailed, match="it is broken"):
        world.save()
    assert world.runs(web) and world.runs(db)
    done = world.save(best_effort=True)
    assert {o.target: o.ok for o in done.outcomes} == {"fake:web": False, "fake:db": False, "fake:cache": True}
    assert world.states() == {"fake:web": "save-failed", "fake:db": "save-failed", "fake:cache": "saved"}
    assert world.runs(web) and world.runs(db) and groups.every(world.root) == [] and world.leftovers() == []


def test_of_a_group_one_that_is_known_to_fail_keeps_all_of_it(world: World) -> None:
    web = world.engine.start("web", labels=SHOP)
    world.engine.start("db", labels=SHOP, broken="preflight")
    done = world.save(best_effort=True)
    assert not any(o.ok for o in done.outcomes) and world.runs(web)
    assert "fake:db, of its group shop" in world.status().lines[0].facts["error"]["message"] + world.status().lines[1].facts["error"]["message"]


def test_a_group_that_had_ended_comes_back_together_when_another_one_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [world.engine.start(name, labels={**SHOP, "ckpt.after": "late"}) for name in ("web", "db")]
    world.engine.start("late", broken="dump")
    passed: list[str] = []
    real = faults.point
    monkeypatch.setattr(faults, "point", lambda name: (passed.append(name), real(name))[1])
    with pytest.raises(DumpFailed, match="it is broken"):
        world.save()
    assert all(map(world.runs, both)) and world.leftovers() == [] and "group-restored" in passed
    assert world.states() == {"fake:web": "restored", "fake:db": "restored", "fake:late": "save-failed"}


def test_a_group_is_read_back_while_it_still_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [world.engine.start(name, labels=SHOP) for name in ("web", "db")]
    monkeypatch.setattr(Catalog, "check", lambda self, checkpoint: ["it is damaged"] if checkpoint.manifest.name == "db" else [])
    with pytest.raises(DumpFailed, match="not stored as it was made"):
        world.save(verify=True)
    assert all(map(world.runs, both)) and Catalog(world.root).all() == [] and groups.every(world.root) == []


@pytest.mark.parametrize("step", ["hibernate-one", "group-held", "group-stored", "group-commit", "hibernate-ended", "hibernate-one-saved"])
def test_killed_a_group_is_gone_on_with(world: World, step: str) -> None:
    both = [world.engine.start(name, labels=SHOP) for name in ("web", "db")]
    world.killed(step)
    assert world.save().whole and world.states() == {"fake:web": "saved", "fake:db": "saved"}
    assert not any(map(world.runs, both))
    assert fake.wait(lambda: not world.leftovers()), "the guard of the killed group's job puts it away"
    (group,) = groups.every(world.root)
    facts = {line.target: line.facts for line in world.status().lines}
    assert {one.checkpoint_id for one in group.members} == {facts[f"fake:{c.name}"]["checkpoint_id"] for c in both}
    assert len(Catalog(world.root).all()) == 2


def test_a_pod_is_a_group(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fake.FakeEngine._container
    monkeypatch.setattr(fake.FakeEngine, "_container", lambda self, identity: replace(real(self, identity), pod="a" * 64))
    world.engine.start("web")
    world.engine.start("db")
    assert world.save().whole
    assert {c.entry.group for c in Catalog(world.root).all()} == {"pod-aaaaaaaaaaaa@1"}
