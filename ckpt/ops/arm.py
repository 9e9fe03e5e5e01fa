"""Periodic checkpoints: a timer of systemd's for each target, and what each of its runs does.

`armed.json` in this host's own place of the store, 0600: {target: {every_s, keep_last, engine, container_id, name}}. It is what a resume after
a crash looks at; the timer's times are in its drop-in.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from ckpt.errors import BusyError, CkptError, TargetNotFound, UsageError
from ckpt.events import Emit, Notice
from ckpt.host import systemd
from ckpt.model import Checkpoint, DumpOptions, Target
from ckpt.ops import checkpoint as saving
from ckpt.ops import consent, install_units, resolve, units
from ckpt.ops.result import Outcome
from ckpt.store import durable, locks, place, retention
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT, Job

TAG: Final = "armed"
LEAST_S: Final = 10.0
MOST_S: Final = 366 * 86400.0
_NAME_CAP: Final = 180
"""Of an instance: a unit's name has 255 characters (systemd.unit(5))."""
_FILE_CAP_BYTES: Final = 4 << 20
PACKAGED: Final = Path("/usr/lib/systemd/system")


@dataclass(frozen=True, slots=True)
class Armed:
    """What is checkpointed periodically."""

    target: str
    """In full, `podman:web`."""
    every_s: float
    keep_last: int
    engine: str
    container_id: str
    name: str


def path(root: Path) -> Path:
    """The file that tells what is armed on this host."""
    return place.own(root) / "armed.json"


def load(root: Path = DEFAULT_ROOT) -> dict[str, Armed]:
    """What is armed, by target; nothing when the file cannot be read."""
    try:
        fd = os.open(path(root), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            document = json.loads(file.read(_FILE_CAP_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    armed = {}
    for target, row in document.items() if isinstance(document, dict) else ():
        with suppress(TypeError, ValueError, KeyError):
            texts = {key: str(row[key]) for key in ("engine", "container_id", "name")}
            armed[target] = Armed(target, float(row["every_s"]), int(row["keep_last"]), **texts)
    return armed


def _store(root: Path, armed: dict[str, Armed]) -> None:
    rows = {target: {key: value for key, value in asdict(one).items() if key != "target"} for target, one in sorted(armed.items())}
    durable.write_file(path(root), json.dumps(rows, indent=1).encode() + b"\n")


@contextmanager
def _changing(root: Path) -> Iterator[dict[str, Armed]]:
    """The file, locked; what the block made of it is written at its end, unless it raised."""
    path(root).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = locks.take(path(root).with_name("armed.lock"), fcntl.LOCK_EX)
    try:
        armed = load(root)
        before = dict(armed)
        yield armed
        if armed != before:
            _store(root, armed)
    finally:
        os.close(fd)


def instance(target: str) -> str:
    """The instance of a target's units. Raises UsageError when its name is too long for one."""
    escaped = systemd.escape(target)
    if len(escaped) > _NAME_CAP:
        raise UsageError(f"the name of {target[:64]} is too long for a unit of systemd")
    return escaped


def timer(target: str) -> str:
    """The name of its timer."""
    return f"ckpt-arm@{instance(target)}.timer"


def arm(targets: Sequence[str], *, every_s: float, keep_last: int, store_root: Path = DEFAULT_ROOT, emit: Emit) -> list[Armed]:
    """Checkpoint each of `targets` now and every `every_s` seconds, keep the last ones. An armed one gets the new times.

    Raises:
        FeatureMissing: there is no systemd; nothing was changed.
        TargetNotFound, UsageError: of a target; nothing was changed.
        PolicyRefused: a label of it forbids checkpoints; nothing was changed.
        BusyError: a file of the units' names is not ours; nothing was changed.
        EngineUnavailable: systemd refused; what had been changed for that target was taken back.
    """
    systemd.need()
    if not LEAST_S <= every_s <= MOST_S:
        raise UsageError(f"every {every_s:g} s is {'too often' if every_s < LEAST_S else 'too seldom'}: from 10 s to a year")
    wanted = []
    for text in targets:
        engine, container = resolve.resolve(Target.parse(text))
        consent.require(container, "arm")
        target = resolve.qualified(engine, container)
        instance(target)
        wanted.append(Armed(target, every_s, keep_last, engine.name, container.id, container.name or container.id))
    where = install_units.Place()
    files = {where.directory / f"{timer(one.target)}.d" / units.DROP_IN: units.arm_times(every_s) for one in wanted}
    files |= _missing_templates(where, store_root)
    old = {file: file.read_text() if file.exists() else None for file in files}
    install_units.write(files)
    try:
        systemd.control("daemon-reload")
        for one in wanted:
            with _changing(store_root) as armed:
                before = armed.get(one.target)
                armed[one.target] = one
            try:
                systemd.control("enable", timer(one.target))
                systemd.control("restart", timer(one.target))  # the times of one that runs already count from its start
            except CkptError:
                with _changing(store_root) as armed:
                    armed.pop(one.target)
                    if before is not None:
                        armed[one.target] = before
                raise
    except CkptError:
        for file, before_text in old.items():
            with suppress(OSError):
                install_units.remove_file(file) if before_text is None else file.write_text(before_text)
        with suppress(CkptError):
            systemd.control("daemon-reload")
        raise
    for one in wanted:
        emit(Notice(one.target, f"checkpoints every {one.every_s:g} s, the last {one.keep_last} are kept"))
    return wanted


def _missing_templates(where: install_units.Place, store_root: Path) -> dict[Path, str]:
    """The units themselves, where no package and no `install-units` brought them; also those that are there and not ours, to be refused."""
    found = {}
    for file, text in install_units.arm_files(where, store_root).items():
        packaged = PACKAGED / file.name
        if not packaged.exists() and not (file.exists() and install_units.ours(file.read_text(errors="replace"))):
            found[file] = text
    return found


def disarm(targets: Sequence[str], *, store_root: Path = DEFAULT_ROOT) -> list[Armed]:
    """No more periodic checkpoints of `targets`; those that were made stay.

    Raises:
        TargetNotFound: one is not armed; nothing was changed.
        EngineUnavailable: systemd refused.
    """
    armed = load(store_root)
    chosen = []
    for text in targets:
        named = [one for one in armed.values() if text == one.target] or [one for one in armed.values() if text in (one.name, one.container_id)]
        if len(named) != 1:
            what = "is armed more than once" if named else "is not armed"
            listed = ", ".join(one.target for one in named or armed.values())
            raise TargetNotFound(f"{text!r} {what}", where="nothing was changed", hint=f"armed are: {listed}" if listed else "nothing is armed")
        chosen += named
    for one in chosen:
        if systemd.running():
            with suppress(CkptError):  # a timer whose files somebody removed
                systemd.control("disable", "--now", timer(one.target))
        drop_in = install_units.Place().directory / f"{timer(one.target)}.d" / units.DROP_IN
        with suppress(OSError):
            if drop_in.exists() and install_units.ours(drop_in.read_text()):
                install_units.remove_file(drop_in)
        with _changing(store_root) as now:
            now.pop(one.target, None)
    if chosen and systemd.running():
        systemd.control("daemon-reload")
    return chosen


def newest(one: Armed, store_root: Path) -> Checkpoint | None:
    """The last of its periodic checkpoints."""
    mine = _mine(Catalog(store_root), one)
    return mine[-1] if mine else None


def run(target: str, *, options: DumpOptions, store_root: Path = DEFAULT_ROOT, emit: Emit) -> Outcome | None:
    """One run of a target's timer: a checkpoint that lets it run on, then the oldest of its periodic ones go.

    Returns:
        None when there was nothing to do: it is not armed any more, does not run, or another ckpt is at work on it.
    """
    one = load(store_root).get(target)
    if one is None:
        return _skip(target, "is not armed", emit)
    try:
        engine, container = resolve.resolve(Target.parse(target))
    except TargetNotFound:
        return _skip(target, "is not there", emit)
    if container.state != "running":
        return _skip(target, f"is {container.state}", emit)
    if "pid" in engine.prefixes and container.name != one.name:
        return _skip(target, "is another process now", emit)
    if _at_work(container.id, store_root):
        return _skip(target, "is just being worked on by another ckpt", emit)
    systemd.notify(f"saving {target}")
    done = saving.checkpoint([Target.parse(target)], options=replace(options, leave_running=True), store_root=store_root, emit=emit, tags=(TAG,))[0]
    if isinstance(done.error, BusyError | TargetNotFound):
        return _skip(target, f"was left alone: {done.error.message}", emit)
    if done.error is not None or done.checkpoint is None:
        raise done.error or CkptError(f"{target} could not be saved")
    with _changing(store_root) as armed:
        if target in armed:  # a container that was made anew under its name
            armed[target] = replace(armed[target], container_id=container.id)
    gone = thin(one, store_root=store_root, emit=emit)
    systemd.notify(f"{done.checkpoint.ref} saved" + (f", {gone} older removed" if gone else ""))
    return done


def thin(one: Armed, *, store_root: Path, emit: Emit) -> int:
    """Remove the oldest periodic checkpoints of a target but for the last `keep_last`; how many went.

    Those that somebody pinned, tagged or wrote a note on are somebody's; they neither go nor count.
    """
    catalog = Catalog(store_root)
    gone = 0
    for checkpoint in _mine(catalog, one)[: -max(1, one.keep_last)]:
        try:
            catalog.remove(checkpoint)
            gone += 1
        except TargetNotFound:
            continue
        except BusyError as error:
            emit(Notice(one.target, f"{checkpoint.ref} stays for now: {error.message}"))
    return gone


def _mine(catalog: Catalog, one: Armed) -> list[Checkpoint]:
    found = [
        c
        for c in catalog.all()
        if c.manifest.name == one.name and c.manifest.engine == one.engine and c.entry.tags == (TAG,) and not c.entry.pinned and not c.entry.note
    ]
    return sorted(found, key=lambda c: (retention.when_s(c), c.manifest.generation))


def _at_work(container_id: str, root: Path) -> bool:
    """Whether a living ckpt has a job about it."""
    try:
        found = [Job(directory) for directory in place.jobs(root).iterdir()]
    except OSError:
        return False
    return any(job.owned and job.facts.get("container_id") == container_id for job in found)


def _skip(target: str, why: str, emit: Emit) -> Outcome | None:
    emit(Notice(target, f"{why}: no checkpoint this time"))
    systemd.notify(f"skipped: {target} {why}")
    return None


_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}


def seconds(text: str) -> float:
    """`30s`, `15m`, `2h`, `1d`, `1h30m`; a bare number is seconds. Raises UsageError."""
    words = text.strip()
    if not re.fullmatch(r"\d{1,9}|(\d{1,9}[smhd])+", words, re.ASCII):
        raise UsageError(f"--every: {text[:64]!r} is no time", hint="30s, 15m, 2h, 1d")
    every_s = float(sum(int(number) * _UNITS_S[unit] for number, unit in re.findall(r"(\d+)([smhd]?)", words)))
    if not LEAST_S <= every_s <= MOST_S:
        raise UsageError(f"--every: {text[:64]!r} is {'too often' if every_s < LEAST_S else 'too seldom'}", hint="from 10s to 366d")
    return every_s
