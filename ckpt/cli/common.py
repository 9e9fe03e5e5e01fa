"""What all verbs share: the session (settings, output), groups of options, and how outcomes become an exit code."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt import config
from ckpt.cli import completion
from ckpt.cli.render.reporter import Lines, Reporter
from ckpt.cli.render.rows import OUTCOME_FIELDS, Row, outcome_row
from ckpt.errors import Bug, CkptError, DoneWithWarnings, NeedsContinue, PermissionDenied, StateUnknown, UsageError
from ckpt.events import Event
from ckpt.model import Compression, DumpOptions

if TYPE_CHECKING:
    from ckpt.ops.result import Outcome

    _FloatType = click.ParamType[float]
    _IntType = click.ParamType[int]
    _CompressionType = click.ParamType[Compression]
else:
    _FloatType = _IntType = _CompressionType = click.ParamType  # generic since click 8.4 only

F = TypeVar("F", bound=Callable[..., Any])
_GRAVE = (StateUnknown, NeedsContinue, Bug)
"""Of several failures these decide the exit code: what is left to do matters more than what came first."""


@dataclass(frozen=True, slots=True)
class Session:
    """One run of a verb."""

    settings: config.Settings
    reporter: Reporter
    began_s: float = field(default_factory=time.monotonic)

    @property
    def store_root(self) -> Path:
        return self.settings.store

    def emit(self, event: Event) -> None:
        self.reporter.emit(event)

    def need_root(self) -> None:
        """Raises PermissionDenied for anybody else: engines and CRIU are root's."""
        if os.geteuid() != 0:
            what = "this needs root: CRIU and the system's containers are root's"
            raise PermissionDenied(what, where="nothing was touched", hint="run it with sudo")

    def finish(
        self,
        outcomes: Sequence[Outcome],
        *,
        id_of: str = "container",
        table: Lines | None = None,
        stats: Callable[[Sequence[Row], float], object] | None = None,
    ) -> int:
        """Show the outcomes and return the exit code.

        Args:
            id_of: whose id `-q` and `.ID` give, "checkpoint" or "container".
            table: the lines for a person; without it the name that was typed, one a line.
            stats: makes the document of `--print-stats` of the rows and the seconds that all took.
        """
        rows = [outcome_row(outcome, id_of=id_of) for outcome in outcomes]
        code = exit_code(outcomes)
        good = [row for row in rows if row["ok"]]
        if stats is not None:
            self.reporter.document(stats(good, time.monotonic() - self.began_s))
        else:
            machine = self.reporter.kind in ("json", "jsonl")
            self.reporter.show(rows if machine else good, table=table or names, exit_code=code)
        for outcome in outcomes:
            for warning in outcome.warnings:
                self.reporter.warning(f"{outcome.target}: {warning}")
            if outcome.error is not None:
                self.reporter.error(outcome.error)
        return code


def names(rows: Sequence[Row]) -> Iterable[str]:
    """The name the user typed, one a line."""
    return [row["name"] for row in rows]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0, or the gravest failure's code, or the first one's; warnings alone give 100."""
    errors = [outcome.error or CkptError("failed") for outcome in outcomes if not outcome.ok]
    for kind in _GRAVE:
        if any(isinstance(error, kind) for error in errors):
            return kind.exit_code
    if errors:
        return errors[0].exit_code
    return DoneWithWarnings.exit_code if any(outcome.warnings for outcome in outcomes) else 0


class Verb(click.Command):
    """A verb with the examples that its man page and `--help` show."""

    examples: tuple[tuple[str, str], ...] = ()
    """(command line, what it does)"""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                formatter.write_dl(list(self.examples), col_max=44)


class LazyGroup(click.Group):
    """Imports a verb's module only when that verb (or the whole help) is asked for."""

    verbs: Mapping[str, str] = {}
    """Verb -> module; the module's `command` is the verb."""
    hidden_verbs: frozenset[str] = frozenset()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = self.verbs.get(cmd_name)
        if module is None:
            return None
        command = importlib.import_module(module).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.verbs:
            close = difflib.get_close_matches(args[0], [name for name in self.verbs if name not in self.hidden_verbs])
            ctx.fail(f"there is no verb {args[0]!r}" + (f", did you mean {' or '.join(close)}?" if close else ""))
        return super().resolve_command(ctx, args)


def global_options(function: F) -> F:
    """The options that stand before or after the verb."""
    for option in reversed((
        click.option("--format", "fmt", metavar="FORMAT", help="table, json, jsonl, or a template like '{{.Name}} {{.ID}}'."),
        click.option("-q", "--quiet", is_flag=True, default=None, help="Only ids on stdout, no progress."),
        click.option(
            "--store", type=click.Path(file_okay=False), metavar="DIR|NAME", help="The store (default /var/lib/ckpt, or CKPT_STORE).",
        ),
        click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="How much of the log to show on stderr."),
    )):  # fmt: skip
        function = option(function)
    return function


def verb(
    name: str, *, fields: Sequence[str] = OUTCOME_FIELDS, examples: Sequence[tuple[str, str]] = ()
) -> Callable[[Callable[..., int]], click.Command]:
    """Make a click command of a function that takes a `Session` and the options, and returns the exit code."""

    def wrap(function: Callable[..., int]) -> click.Command:
        def callback(fmt: str | None, quiet: bool | None, store: str | None, log_level: str | None, **options: Any) -> int:
            outer = _outer()
            session = _session(
                Reporter(name, fmt or outer.get("fmt") or "table", fields, quiet=bool(quiet or outer.get("quiet"))),
                store or outer.get("store"),
                log_level or outer.get("log_level"),
            )
            with session.reporter:
                try:
                    return function(session, **options)
                except CkptError as error:
                    session.reporter.failed(error)
                    raise

        callback.__doc__ = function.__doc__
        # click keeps the options of the decorators below this one here, until the command is made.
        callback.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        command = click.command(name, cls=Verb)(global_options(callback))
        command.params.sort(key=lambda param: isinstance(param, click.Option) and param.name in ("fmt", "quiet", "store", "log_level"))
        command.examples = tuple(examples)
        return command

    return wrap


def _outer() -> dict[str, Any]:
    """What was said before the verb; the nearer to it, the more it counts."""
    found: dict[str, Any] = {}
    above = click.get_current_context().parent
    while above is not None:
        found = {**above.params, **{key: value for key, value in found.items() if value is not None}}
        above = above.parent
    return found


def _session(reporter: Reporter, store: str | None, log_level: str | None) -> Session:
    settings = config.load()
    if store is not None:
        settings = replace(settings, store=config.store_named(settings, store))
    logging.getLogger("ckpt").setLevel((log_level or settings.log_level).upper())
    return Session(settings, reporter)


def _flag(name: str, help: str) -> Callable[[F], F]:
    """`--name/--no-name`, unset by default: then ckpt finds out."""
    return click.option(f"--{name}/--no-{name}", default=None, help=help)


def state_options(*, restoring: bool = False) -> Callable[[F], F]:
    """What a dump saves, or a restore brings back, beyond memory."""
    found = "as the checkpoint says" if restoring else "found out by looking"

    def add(function: F) -> F:
        for option in reversed((
            _flag("tcp-established", f"Keep established TCP connections (default: {found})."),
            _flag("file-locks", f"Keep file locks (default: {found})."),
            click.option("--ignore-rootfs", is_flag=True, help="Leave out changes to the root file system."),
            click.option("--ignore-volumes", is_flag=True, help="Leave out the content of named volumes."),
            timeout_option,
        )):  # fmt: skip
            function = option(function)
        return function

    return add


hooks_option = click.option("--no-hooks", "hooks", is_flag=True, flag_value=False, default=True, help="Run no hooks, neither the host's nor its own.")
override_option = click.option("--override-label", is_flag=True, help="Do it even if a label of the container forbids it (recorded).")


timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Longest time for a dump or restore (default 200).",
)


class Duration(_FloatType):
    """A time: `300ms`, `1.5s`, `2m`, `1h`, `7d`; a bare number is seconds. Gives seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no time: write 300ms, 1.5s or 2m", param, ctx)
        return float(found[1]) * {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[found[2]]


class Rate(_IntType):
    """Bytes a second, spelled as rsync does: `50M` and `50MiB` (of 1024), `50MB` (of 1000); a bare number is bytes, 0 is no limit. Gives
    bytes a second.
    """

    name = "rate"
    LEAST = 16 << 10

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(B?|iB)(?:/s)?", text, re.ASCII | re.IGNORECASE)
        if found is None or (found[3].lower() == "ib" and not found[2]):
            self.fail(f"{value!r} is no rate: write 50M (MiB a second), 800K or 100MB", param, ctx)
        base = 1000 if found[3].lower() == "b" else 1024
        rate: float = float(found[1]) * base ** " KMGT".index(found[2].upper() or " ")
        if 0 < rate < self.LEAST or rate > 1 << 60:
            self.fail(f"{value!r} is {'less than 16K' if rate < self.LEAST else 'too much'} a second: write 50M (MiB a second)", param, ctx)
        return int(rate)


class CompressionChoice(_CompressionType):
    """`auto`, `none`, `zstd` or `zstd:LEVEL` (1 to 19)."""

    name = "compression"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Compression:
        if isinstance(value, Compression):
            return value
        mode, colon, level = str(value).partition(":")
        if mode in ("auto", "none") and not colon:
            return Compression(mode)  # type: ignore[arg-type]
        if mode == "zstd" and (not colon or (re.fullmatch(r"[1-9]|1\d", level, re.ASCII))):
            return Compression("zstd", int(level or 1))
        self.fail(f"{value!r} is not one of auto, none, zstd, zstd:1 to zstd:19", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in ("auto", "none", "zstd") if word.startswith(incomplete)]


ssh_option = click.option("--ssh-option", "ssh_options", multiple=True, metavar="OPTION", help="An option for ssh -o (Port=2222). Can be repeated.")


def dump_options(session: Session, **given: Any) -> DumpOptions:
    timeout_s = given.pop("timeout_s", None)
    return DumpOptions(timeout_s=timeout_s if timeout_s is not None else session.settings.timeout_s, **given)


def all_and_latest(what: str) -> Callable[[F], F]:
    def add(function: F) -> F:
        function = click.option("-l", "--latest", is_flag=True, help=f"The newest {what}.")(function)
        return click.option("-a", "--all", "every", is_flag=True, help=f"Every {what}.")(function)

    return add


def targets_argument(*, name: str = "targets") -> Callable[[F], F]:
    return click.argument(name, nargs=-1, metavar="[TARGET]...", shell_complete=completion.containers)


def one_way(given: Sequence[str], *, every: bool = False, latest: bool = False, what: str) -> None:
    """Exactly one of names, --all and --latest. Raises UsageError."""
    ways = [bool(given), every, latest]
    if sum(ways) > 1:
        raise UsageError(f"give {what}s, --all or --latest, not several of these")
    if not any(ways):
        raise UsageError(f"which {what}?", hint=f"name one, see {click.get_current_context().command_path} --help")
    empty = [name for name in given if not name.strip()]
    if empty:
        raise UsageError(f"an empty name is no {what}")
