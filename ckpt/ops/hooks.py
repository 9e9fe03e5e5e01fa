"""Commands of the administrator (/etc/ckpt/hooks.d) and of the container (labels `ckpt.hook.PHASE`), run around what ckpt does.

Whatever runs before (`pre-…`) can stop the operation, and has its counterpart when that fails later (`…-failed`), so that a database
that was quiesced goes on. When ckpt is killed in between, the job's guard runs the counterpart (see `settle`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

from ckpt import config
from ckpt.engines.base import Engine, ExecsInside
from ckpt.errors import CkptError, ConfigError
from ckpt.events import Emit, Event, Notice, ignore
from ckpt.host import marked
from ckpt.host.run import CommandFailed, Result
from ckpt.model import Container, Severity
from ckpt.ops import consent, faults, journald
from ckpt.ops.consent import InsideHook, Labels
from ckpt.store.job import Job

Phase = Literal[
    "pre-checkpoint", "post-checkpoint", "checkpoint-failed",
    "pre-restore", "post-restore", "restore-failed",
    "pre-migrate", "post-migrate", "migrate-failed",
]  # fmt: skip
HOOKS_DIR = Path("/etc/ckpt/hooks.d")
OUTPUT_LINES: Final = 20
LINE_CAP: Final = 200
_NAMED: Final = re.compile(r"\d\d-[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_LEFT_BEHIND: Final = re.compile(r"~$|\.(bak|orig|rej|swp|dpkg-[a-z]+|rpm[a-z]+)$")
_DEFAULT_TIMEOUT_S: Final = 30.0
HOST_LIMIT_S: Final = 300.0
"""How long a source waits for a destination whose own hooks run, of which it knows nothing."""
_SETTLE_S: Final = 10.0

log = logging.getLogger("ckpt.hooks")


def of_host(directory: Path | None = None) -> tuple[Path, ...]:
    """The host's hooks in the order in which they run.

    Raises:
        ConfigError: one of them could be changed by somebody else than root, who would become root by it.
    """
    directory = directory or HOOKS_DIR
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise ConfigError(f"{directory} cannot be read: {error.strerror}") from error
    found = tuple(path for name in names if is_hook(path := directory / name))
    for path in (directory, *found) if found else ():
        _check_owner(path)
    return found


def is_hook(path: Path) -> bool:
    """Whether a file is one: NN-name, executable. Others (a README, what an editor left, one switched off by chmod -x) are left out."""
    named = _NAMED.fullmatch(path.name) and not _LEFT_BEHIND.search(path.name)
    return bool(named) and path.is_file() and os.access(path, os.X_OK)


def _check_owner(path: Path) -> None:
    real = Path(os.path.realpath(path))
    for one in (real, *real.parents):
        about = one.stat()
        others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if about.st_uid != 0 or (others and not about.st_mode & stat.S_ISVTX):
            whose = "does not belong to root" if about.st_uid != 0 else "can be written by others than root"
            raise ConfigError(
                f"the hook {path} is not safe to run: {one} {whose}",
                where="nothing was touched",
                hint=f"chown root:root {one}; chmod go-w {one}, or leave the hooks out: --no-hooks",
            )


@dataclass(slots=True)
class Hooks:
    """What runs around one operation on one container. Make it by `gather`."""

    label: str
    engine: Engine | None
    labels: Labels
    host: tuple[Path, ...]
    facts: dict[str, str]
    """Of the environment, without the prefix CKPT_, in lower case."""
    emit: Emit
    container: Container | None = None
    job: Job | None = None
    warnings: list[str] = field(default_factory=list)
    begun: bool = False
    """A command before the dump ran inside of the container, and nothing has ended that yet."""

    def inside(self, phase: str) -> InsideHook | None:
        return self.labels.hooks.get(phase)

    def any(self, *phases: Phase) -> bool:
        """Whether something runs in one of these phases."""
        return bool(self.host) or any(phase in self.labels.hooks for phase in phases)

    def before(self, phase: Phase) -> None:
        """Run what comes before: the host's hooks, then the container's.

        Raises:
            CkptError: one of them failed; those after it did not run.
        """
        inside = self.inside(phase)
        if not self.host and inside is None:
            return
        mark = marked.new_mark()
        if self.job is not None:
            # What the guard needs to undo it; on the disk before it runs.
            self.job.write(self.job.state, hooked=phase, hook_mark=mark, hooked_inside=inside is not None, hook_facts=self.facts)
        for path in self.host:
            if problem := self._run_on_host(path, phase, mark):
                raise CkptError(f"{self.label}: the hook {path.name} ({phase}) {problem}", hint=f"look at {path}, or go without hooks: --no-hooks")
        if inside is not None:
            self.begun = True
            if problem := self._run_inside(inside, phase, mark):
                text = f"its hook ckpt.hook.{phase} {problem}"
                if inside.on_failure == "abort":
                    raise CkptError(f"{self.label}: {text}", hint="it runs inside of the container, as its label says; --no-hooks goes without it")
                self.warn(text)
        faults.point(f"hooked-{phase}")

    def after(
        self, phase: Phase, *, container: Container | None = None, error: BaseException | str = "", inside: bool = True, host: bool = True
    ) -> None:
        """Run what comes after: the container's, then the host's. Their failures are warnings.

        Args:
            inside: False: the container does not run, or nothing was begun in it.
            host: False: the host's come later.
        """
        if container is not None:
            self.container = container
            self.facts |= {"container_id": container.id, "name": container.name}
        if error:
            self.facts["error"] = error.message if isinstance(error, CkptError) else str(error) or type(error).__name__
        hook = self.inside(phase) if inside else None
        mark = marked.new_mark()
        if hook is not None and (problem := self._run_inside(hook, phase, mark)):
            self.warn(f"its hook ckpt.hook.{phase} {problem}")
        if inside and self.begun:
            self.begun = False
            if self.job is not None:
                self.job.write(self.job.state, hooked_inside=False)  # the guard need not
        for path in self.host if host else ():
            if problem := self._run_on_host(path, phase, mark):
                self.warn(f"the hook {path.name} ({phase}) {problem}")
        if phase.endswith("-failed"):
            for text in self.warnings:  # there is no outcome but the error
                self.emit(Notice(self.label, text, warning=True))
            self.warnings.clear()

    def succeeded_there(self) -> None:
        """A migration went well: what it runs on the source, where the workload is gone."""
        if self.job is not None and self.job.facts.get("hooked"):
            self.after("post-checkpoint", inside=False)
            self.after("post-migrate", inside=False)
            self.job.write(self.job.state, hooked="")

    def failed_there(self, error: BaseException) -> None:
        """A migration was rolled back: the counterparts of what ran on the source, where the workload goes on."""
        before = self.job.facts.get("hooked") if self.job is not None else None
        if before == "pre-checkpoint":
            self.after("checkpoint-failed", error=error, inside=self.begun)
        if before:
            self.after("migrate-failed", error=error, inside=False)

    def limit_s(self, phase: Phase) -> float:
        """How long all that runs in a phase may take."""
        hook = self.inside(phase)
        return HOST_LIMIT_S + ((hook.timeout_s or _timeout_s()) if hook is not None else 0.0)

    def warn(self, text: str) -> None:
        """Of an operation that goes well its outcome tells it."""
        self.warnings.append(text)

    def _run_on_host(self, path: Path, phase: str, mark: str) -> str:
        env = {f"CKPT_{key.upper()}": value for key, value in self._all(phase).items()}
        document = json.dumps({"schema": 1, **self._all(phase)}).encode() + b"\n"
        log.info("hook %s %s of %s", path, phase, self.label)
        try:
            result = marked.run([path, phase], mark=mark, timeout_s=_timeout_s(), env=env, input=document)
        except CommandFailed as error:
            self._told(f"hook {path.name}", error.result)
            return f"failed: {error.reason}"
        self._told(f"hook {path.name}", result)
        return "" if result.ok else f"failed: {_ended(result)}"

    def _run_inside(self, hook: InsideHook, phase: str, mark: str) -> str:
        if not isinstance(self.engine, ExecsInside) or self.container is None:
            return "cannot run: the engine has no way into it"
        env = {"CKPT_HOOK_PHASE": phase, "CKPT_NAME": self.facts.get("name", "")}
        log.info("hook inside %s: %s", self.label, phase)
        timeout_s = hook.timeout_s or _timeout_s()
        try:
            result = self.engine.exec_in(self.container, hook.argv, timeout_s, env=env, mark=mark, alone=phase == "pre-checkpoint")
        except CommandFailed as error:
            self._told(f"hook inside ({phase})", error.result)
            return f"failed: {error.reason}"
        except CkptError as error:
            return f"failed: {error.message}"
        self._told(f"hook inside ({phase})", result)
        return "" if result.ok else f"failed: {_ended(result)}"

    def _all(self, phase: str) -> dict[str, str]:
        return {"hook_phase": phase, **{key: _printable(value, 4096) for key, value in self.facts.items()}}

    def _told(self, who: str, result: Result) -> None:
        lines = _lines(result)
        for line in lines[:OUTPUT_LINES]:
            self.emit(Notice(self.label, f"{who}: {line}"))
        if len(lines) > OUTPUT_LINES:
            self.emit(Notice(self.label, f"{who}: … and {len(lines) - OUTPUT_LINES} lines more"))


def gather(
    label: str,
    engine: Engine | None,
    labels: Labels,
    *,
    container: Container | None = None,
    enabled: bool = True,
    emit: Emit = ignore,
    job: Job | None = None,
    facts: Mapping[str, str] | None = None,
) -> Hooks:
    """The hooks around one operation, looked at before anything is touched.

    Args:
        enabled: False: `--no-hooks`; that is told when there would have been any.
        facts: more for the environment: `checkpoint` becomes CKPT_CHECKPOINT.

    Raises:
        ConfigError: a hook of the host is not safe to run.
    """
    if not enabled:
        if labels.hooks or (HOOKS_DIR.is_dir() and any(is_hook(path) for path in HOOKS_DIR.iterdir())):
            emit(Notice(label, "hooks are left out (--no-hooks)"))
            journald.tell(f"{label}: hooks were left out (--no-hooks)", phase="hooks", result="skipped", target=label, priority=5)
        return none(label)
    known = {"target": label, "engine": engine.name if engine is not None else "", **(facts or {})}
    if container is not None:
        known |= {"container_id": container.id, "name": container.name}
    return Hooks(label, engine, labels, of_host(), known, emit, container, job)


def none(label: str) -> Hooks:
    """No hooks."""
    return Hooks(label, None, Labels(), (), {}, ignore)


def soft_labels(container: Container, label: str, emit: Emit) -> Labels:
    """The labels of a container that runs already, where a wrong one can stop nothing any more: told, and left out."""
    try:
        return consent.labels(container)
    except CkptError as error:
        emit(Notice(label, error.message, warning=True))
        return Labels()


def settle(job: Job, engine: Engine, *phases: str) -> list[str]:
    """For a job whose owner is dead: end the hook that was running, and run the counterparts of what it had done. Best effort.

    Returns:
        What went wrong.
    """
    facts = job.facts
    if not facts.get("hooked"):
        return []
    if facts.get("hook_mark"):
        marked.end(str(facts["hook_mark"]))
    inside = bool(facts.get("hooked_inside"))
    kept = facts.get("hook_facts")
    known = {str(key): str(value) for key, value in kept.items()} if isinstance(kept, dict) else {}
    identity = str(facts.get("live_container_id") or facts.get("new_container_id") or facts.get("container_id") or "")
    container: Container | None = None
    deadline_s = time.monotonic() + _SETTLE_S
    with suppress(CkptError):
        container = engine.describe(Container(engine.name, identity, str(facts.get("name", "")), "unknown"))
        while inside and container.state in ("paused", "unknown") and time.monotonic() < deadline_s:
            time.sleep(marked.POLL_S)  # it was told to go on, a moment ago
            container = engine.describe(container)
    runs = container is not None and container.state == "running"
    warnings: list[str] = []
    try:
        label = known.get("target") or str(facts.get("name", ""))
        labels = soft_labels(container, label, ignore) if container is not None and inside else Labels()

        def tell(event: Event) -> None:
            if isinstance(event, Notice) and event.warning:
                warnings.append(event.text)

        hooks = Hooks(label, engine, labels, of_host(), known, tell, container)
        for phase in phases:
            if phase == "checkpoint-failed" and facts["hooked"] != "pre-checkpoint":
                continue
            hooks.facts["error"] = "ckpt was interrupted" if phase.endswith("-failed") else ""
            hooks.after(cast(Phase, phase), inside=runs and inside)
        warnings += hooks.warnings
    except CkptError as error:
        warnings.append(error.message)
    job.write(job.state, hooked="")
    return warnings


def described(labels: Labels, directory: Path | None = None) -> list[tuple[Severity, str, str]]:
    """What `check` says of hooks and labels, as (severity, detail, hint)."""
    rows: list[tuple[Severity, str, str]] = []
    try:
        if found := of_host(directory):
            rows.append(("ok", f"on this host: {', '.join(path.name for path in found)}", ""))
        where = directory or HOOKS_DIR
        passed_over = sorted(path.name for path in where.iterdir() if not is_hook(path)) if where.is_dir() else []
        if passed_over:
            rows.append(("warning", f"in {where}, but no hook: {', '.join(passed_over[:5])}", "a hook is executable and called NN-name"))
    except ConfigError as error:
        rows.append(("warning", error.message, error.hint or ""))
    except OSError:
        pass
    for phase, hook in labels.hooks.items():
        limit = f"{hook.timeout_s or _timeout_s():g} s"
        rows.append(("ok", f"inside of it, {phase}: {_printable(' '.join(hook.argv), 100)} (at most {limit}, on failure {hook.on_failure})", ""))
    return rows


def _timeout_s() -> float:
    try:
        return config.load().hook_timeout_s
    except ConfigError:
        return _DEFAULT_TIMEOUT_S


def _ended(result: Result) -> str:
    how = f"signal {-result.returncode}" if result.returncode < 0 else f"exit status {result.returncode}"
    lines = _lines(result)
    return f"{how} ({lines[-1]})" if lines else how


def _lines(result: Result) -> Sequence[str]:
    return [text for line in result.text.splitlines() if (text := _printable(line, LINE_CAP))]


def _printable(text: Any, cap: int) -> str:
    """Without control characters: it comes from a program, possibly inside of a container."""
    return "".join(c if c.isprintable() else " " for c in str(text)).strip()[:cap]
