"""Hooks of the host and of containers, over the fake engine, in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import ConfigError, DumpFailed, PolicyRefused, RestoreFailed, UsageError
from ckpt.events import Event, Notice
from ckpt.host import marked
from ckpt.host.run import CommandFailed
from ckpt.model import Container, DumpOptions, RestoreOptions, Target
from ckpt.ops import hooks
from ckpt.ops.checkpoint import checkpoint
from ckpt.ops.restore import restore
from ckpt.ops.result import Outcome
from tests.contract import fake

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="hooks must be root's"), pytest.mark.timeout(60)]
LOG = 'echo "{phase}" >> "$INSIDE/../inside.log"'
FOREVER = "sleep 1000 & sleep 1000"


def inside(phase: str, script: str = "") -> dict[str, str]:
    return {f"ckpt.hook.{phase}": json.dumps(["sh", "-c", script or LOG.format(phase=phase)])}


ALL = {key: value for phase in ("pre-checkpoint", "post-checkpoint", "checkpoint-failed", "post-restore") for key, value in inside(phase).items()}


class World:
    def __init__(self, directory: Path, engine: fake.FakeEngine) -> None:
        self.engine, self.root, self.hooks = engine, directory / "store", directory / "hooks.d"
        self.host_log = directory / "host.log"
        self.events: list[Event] = []

    def save(self, *, leave_running: bool = False, **options: Any) -> Outcome:
        chosen = DumpOptions(tcp_established=False, file_locks=False, shell_job=False, leave_running=leave_running, **options)
        (outcome,) = checkpoint([Target.parse("web")], options=chosen, store_root=self.root, emit=self.events.append)
        return outcome

    def back(self, **options: Any) -> Outcome:
        (outcome,) = restore(["web"], options=RestoreOptions(**options), store_root=self.root, emit=self.events.append)
        return outcome

    def host_hook(self, name: str = "10-log", script: str = "") -> Path:
        self.hooks.mkdir(mode=0o755, exist_ok=True)
        path = self.hooks / name
        said = f'echo "$1 $CKPT_HOOK_PHASE $CKPT_NAME $CKPT_ENGINE [$CKPT_CHECKPOINT] [$CKPT_ERROR]" >> {self.host_log}; cat >> {self.host_log}.json'
        path.write_text(f"#!/bin/sh\n{script or said}\n")
        path.chmod(0o755)
        return path

    def inside_log(self) -> list[str]:
        path = self.engine.world / "inside.log"
        return path.read_text().split() if path.exists() else []

    def phases(self) -> list[str]:
        return [line.split()[0] for line in self.host_log.read_text().splitlines()] if self.host_log.exists() else []

    def runs(self, container: Container) -> bool:
        return self.engine.describe(container).state == "running"

    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "world").mkdir()
    made = World(tmp_path, fake.install(tmp_path / "world", monkeypatch.setattr))
    monkeypatch.setattr(hooks, "HOOKS_DIR", made.hooks)
    yield made
    made.engine.end_all()


def test_around_a_checkpoint_and_a_restore(world: World) -> None:
    world.engine.start("web", labels=ALL)
    world.host_hook()
    saved = world.save()
    assert saved.ok and saved.warnings == ()
    assert world.inside_log() == ["pre-checkpoint"]  # it is gone then: nothing runs inside of it
    assert world.back().ok
    assert world.inside_log() == ["pre-checkpoint", "post-restore"]
    assert world.phases() == ["pre-checkpoint", "post-checkpoint", "pre-restore", "post-restore"]
    lines = world.host_log.read_text().splitlines()
    assert lines[0] == "pre-checkpoint pre-checkpoint web fake [] []"
    assert lines[1] == "post-checkpoint post-checkpoint web fake [web@1] []"
    documents = [json.loads(line) for line in Path(f"{world.host_log}.json").read_text().splitlines()]
    assert documents[0]["schema"] == 1 and documents[2]["hook_phase"] == "pre-restore" and documents[2]["checkpoint"] == "web@1"


def test_left_running_it_is_told_at_once(world: World) -> None:
    world.engine.start("web", labels=ALL)
    assert world.save(leave_running=True).ok
    assert world.inside_log() == ["pre-checkpoint", "post-checkpoint"]


def test_a_dump_that_fails_has_the_counterpart(world: World) -> None:
    web = world.engine.start("web", labels=ALL, broken="dump")
    world.host_hook()
    assert isinstance(world.save().error, DumpFailed)
    assert world.inside_log() == ["pre-checkpoint", "checkpoint-failed"]
    assert world.phases() == ["pre-checkpoint", "checkpoint-failed"]
    assert "it is broken]" in world.host_log.read_text()
    assert world.runs(web)


def test_a_failing_hook_aborts_with_the_container_running(world: World) -> None:
    web = world.engine.start("web", labels={**ALL, **inside("pre-checkpoint", "echo no licence; exit 3")})
    world.host_hook()
    outcome = world.save()
    assert isinstance(outcome.error, DumpFailed) and "exit status 3 (no licence)" in outcome.error.message
    assert world.runs(web) and not list((world.root / "jobs").iterdir())
    assert world.inside_log() == ["checkpoint-failed"]  # it may have done half of its work
    assert world.phases() == ["pre-checkpoint", "checkpoint-failed"]
    assert "hook inside (pre-checkpoint): no licence" in world.notices()
    world.events.clear()
    assert world.save(hooks=False).ok
    assert "hooks are left out (--no-hooks)" in world.notices()


def test_a_failure_may_be_ignored(world: World) -> None:
    world.engine.start("web", labels={**inside("pre-checkpoint", "exit 1"), "ckpt.hook.pre-checkpoint.on-failure": "ignore"})
    outcome = world.save()
    assert outcome.ok and "ckpt.hook.pre-checkpoint failed: exit status 1" in outcome.warnings[0]


def test_a_hook_that_hangs_is_ended_with_what_it_started(world: World) -> None:
    web = world.engine.start(
        "web", labels={**ALL, **inside("pre-checkpoint", f"echo $$ > $INSIDE/pid; {FOREVER}"), "ckpt.hook.pre-checkpoint.timeout": "2s"}
    )
    outcome = world.save()
    assert outcome.error is not None and "not over in 2 s" in outcome.error.message
    assert world.runs(web)
    pid = int((world.engine.world / web.id / "pid").read_text())
    assert not fake.process_state(pid)
    assert not [
        name
        for name in os.listdir("/proc")
        if name.isdigit() and _environ(name).get(marked.VARIABLE) and _environ(name).get("INSIDE", "").startswith(str(world.engine.world))
    ]


def _environ(pid: str) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.partition("=")[::2] for item in text.split("\0"))


def test_nothing_that_a_hook_started_is_in_the_dump(world: World) -> None:
    """It is waited for, and when it does not end that is the hook's failure."""
    web = world.engine.start(
        "web", labels={**inside("pre-checkpoint", "sleep 0.3 >/dev/null 2>&1 & echo $! > $INSIDE/pid"), "ckpt.hook.pre-checkpoint.timeout": "20s"}
    )
    assert world.save(leave_running=True).ok
    assert not fake.process_state(int((world.engine.world / web.id / "pid").read_text()))
    world.engine.end_all()
    other = world.engine.start(
        "other", labels={**inside("pre-checkpoint", FOREVER[:12] + " >/dev/null &"), "ckpt.hook.pre-checkpoint.timeout": "200ms"}
    )
    (outcome,) = checkpoint(
        [Target.parse("other")],
        options=DumpOptions(tcp_established=False, file_locks=False, shell_job=False),
        store_root=world.root,
        emit=world.events.append,
    )
    assert outcome.error is not None and "what it started was not over" in outcome.error.message
    assert world.runs(other)


def test_the_host_may_refuse_a_restore(world: World) -> None:
    web = world.engine.start("web")
    assert world.save().ok
    world.host_hook("10-no", '[ "$1" != pre-restore ]')
    world.host_hook("20-log")
    outcome = world.back()
    assert isinstance(outcome.error, RestoreFailed) and "10-no" in outcome.error.message
    assert not world.runs(web)
    assert world.phases() == ["restore-failed"]
    assert world.back(hooks=False).ok


def test_after_a_restore_failures_are_warnings(world: World) -> None:
    world.engine.start("web", labels=inside("post-restore", "yes | head -c 1000000; exit 9"))
    world.save()
    outcome = world.back()
    assert outcome.ok and "exit status 9" in outcome.warnings[0]
    told = [text for text in world.notices() if text.startswith("hook inside")]
    assert len(told) == hooks.OUTPUT_LINES + 1 and "lines more" in told[-1]


@pytest.mark.parametrize("wrong", ["writable", "directory", "owner", "link"])
def test_a_hook_that_others_can_change_is_refused(world: World, wrong: str) -> None:
    web = world.engine.start("web", labels=ALL)
    path = world.host_hook()
    if wrong == "writable":
        path.chmod(0o775)
    elif wrong == "directory":
        world.hooks.chmod(0o777)
    elif wrong == "owner":
        os.chown(path, 12345, 0)
    else:
        target = path.rename(world.hooks.parent / "elsewhere")
        target.chmod(0o757)
        path.symlink_to(target)
    with pytest.raises(ConfigError, match="not safe to run"):
        hooks.of_host()
    outcome = world.save()
    assert isinstance(outcome.error, ConfigError) and world.runs(web) and world.inside_log() == [] and world.phases() == []


def test_which_files_are_hooks(world: World) -> None:
    for name in ("10-a", "05-b", "README", "10-a~", "20-c.bak", "notes", "7-x"):
        world.host_hook(name)
    world.host_hook("30-off").chmod(0o644)
    assert [path.name for path in hooks.of_host()] == ["05-b", "10-a"]
    said = hooks.described(hooks.Labels())
    assert said[0][0] == "ok" and said[1][0] == "warning" and "README" in said[1][1]


def test_labels_forbid_and_wrong_ones_stop(world: World) -> None:
    web = world.engine.start("web", labels={**ALL, "ckpt.checkpoint": "deny"})
    outcome = world.save()
    assert isinstance(outcome.error, PolicyRefused) and world.runs(web) and world.inside_log() == []
    assert world.save(override_label=True, leave_running=True).ok
    assert any("overridden" in text for text in world.notices())
    (record,) = [json.loads(path.read_text()) for path in (world.root / "history").iterdir()]
    assert record["statistics"]["overridden"] == "ckpt.checkpoint=deny"
    world.engine.end_all()
    world.engine.start("bad", labels={"ckpt.reboot": "sometimes"})
    (outcome,) = checkpoint([Target.parse("bad")], options=DumpOptions(), store_root=world.root, emit=world.events.append)
    assert isinstance(outcome.error, UsageError)


@pytest.mark.parametrize(("step", "expected"), [
    ("hooked-pre-checkpoint", ["pre-checkpoint", "checkpoint-failed"]),
    ("held", ["pre-checkpoint", "checkpoint-failed"]),
    ("stored", ["pre-checkpoint", "checkpoint-failed"]),
    ("commit", ["pre-checkpoint", "post-checkpoint"]),
])  # fmt: skip
def test_killed_after_the_hook_the_guard_runs_the_counterpart(world: World, step: str, expected: list[str]) -> None:
    web = world.engine.start("web", labels=ALL)
    world.host_hook()
    assert _driven(world, "checkpoint", step) == -9
    assert fake.wait(lambda: not list((world.root / "jobs").iterdir()))
    assert world.phases() == expected
    assert world.inside_log() == [phase for phase in expected if phase != "post-checkpoint"]
    assert fake.wait(lambda: world.runs(web) == (step != "commit"))


@pytest.mark.parametrize("step", ["restore-commit", "resumed"])
def test_killed_after_a_restore_the_guard_greets_it(world: World, step: str) -> None:
    web = world.engine.start("web", labels=ALL)
    world.save()
    assert _driven(world, "restore", step) == -9
    assert fake.wait(lambda: not list((world.root / "jobs").iterdir()))
    assert world.inside_log() == ["pre-checkpoint", "post-restore"]
    assert world.runs(web)


def _driven(world: World, verb: str, step: str) -> int:
    """Run a verb in a process of its own that dies at a step; its guard has our hooks."""
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from tests.contract import fake; from ckpt.ops import hooks, recover\n"
        "world, store, hooks_d = map(pathlib.Path, sys.argv[2:5])\n"
        "fake.install(world); hooks.HOOKS_DIR = hooks_d\n"
        "recover.guard_argv = lambda d: [sys.executable, '-c', sys.argv[6], *sys.argv[1:5], str(d)]\n"
        "from ckpt.events import ignore; from ckpt.model import *\n"
        "from ckpt.ops.checkpoint import checkpoint; from ckpt.ops.restore import restore\n"
        "if sys.argv[5] == 'checkpoint':\n"
        "    options = DumpOptions(tcp_established=False, file_locks=False, shell_job=False)\n"
        "    checkpoint([Target('web')], options=options, store_root=store, emit=ignore)\n"
        "else:\n"
        "    restore(['web'], options=RestoreOptions(), store_root=store, emit=ignore)\n"
    )
    guard = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from tests.contract import fake; from ckpt.ops import hooks\n"
        "fake.install(pathlib.Path(sys.argv[2])); hooks.HOOKS_DIR = pathlib.Path(sys.argv[4])\n"
        "from ckpt.ops.guard import guard_main; sys.exit(guard_main(sys.argv[5]))\n"
    )
    argv = [sys.executable, "-c", script, fake.CHECKOUT, world.engine.world, world.root, world.hooks, verb, guard]
    return subprocess.run(argv, env={**os.environ, "CKPT_FAULT": f"{step}:kill"}, timeout=30, check=False).returncode


def test_marked_programs_have_an_end() -> None:
    began = time.monotonic()
    with pytest.raises(CommandFailed, match="not over"):
        marked.run(["sh", "-c", "setsid sleep 1000 & echo started; setsid sleep 1001"], mark=(mark := marked.new_mark()), timeout_s=0.3)
    assert marked.marked(mark) == [] and time.monotonic() - began < 8
    done = marked.run(["sh", "-c", "head -c 1000000 /dev/zero; exit 4"], mark=marked.new_mark(), timeout_s=20)
    assert done.returncode == 4 and len(done.stdout) == marked.OUTPUT_CAP_BYTES
    with pytest.raises(CommandFailed):
        marked.run(["/no/such/program"], mark=marked.new_mark(), timeout_s=1)
