"""What `migrate` and `drain` share: how a running workload is moved, as options, as MigrateOptions, and as words of a command line again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ckpt.cli.carriage import access, server_options
from ckpt.cli.common import CompressionChoice, Duration, F, Rate, Session, hooks_option, override_option, ssh_option, timeout_option
from ckpt.errors import UsageError
from ckpt.model import Carriage, Compression, PrecopyLimits

if TYPE_CHECKING:
    from ckpt.ops.migrate import MigrateOptions
    from ckpt.transports.https_peer import Access

AUTO_CONVERGE_ROUNDS: Final = 16
"""Each step of slowing takes at least one."""
_SERVER: Final = ("token_file", "token_command", "ca_file", "fingerprint", "client_cert", "client_key")
_PRECOPY: Final = ("max_downtime_s", "max_rounds", "on_exceed", "auto_converge")
_CARRIAGE: Final = ("bwlimit_bytes_s", "compress", "streams", "direct")
_PLAIN: Final = ("keep_source", "tcp_established", "file_locks", "ignore_volumes", "postcopy", "lazy", "hooks", "override_label")
NAMES: Final = ("precopy", *_PRECOPY, *_CARRIAGE, *_PLAIN, "ssh_options", "timeout_s", *_SERVER)
"""The parameters that `options` gives to a command."""

_option = click.option
_OPTIONS: Final = (
    _option("--keep-source", is_flag=True, help="Keep the ended container (and its volumes) on the source."),
    _option("--tcp-established/--no-tcp-established", default=None, help="Keep established TCP connections (default: found out by looking)."),
    _option("--file-locks/--no-file-locks", default=None, help="Keep file locks (default: found out by looking)."),
    _option("--ignore-volumes", is_flag=True, help="Leave the content of named volumes behind."),
    _option("--precopy", is_flag=True, help="Send the memory while it runs, in rounds, and freeze it only for what is left."),
    _option("--max-downtime", "max_downtime_s", type=Duration(), metavar="TIME", help="With --precopy: stop when so much is left (default 300ms)."),
    _option("--max-rounds", type=click.IntRange(1, 100), metavar="N", help="With --precopy: at most so many rounds (default 8, or 16 if slowed)."),
    _option("--on-exceed", type=click.Choice(["continue", "abort"]), help="With --precopy: what to do when more is to be expected in the end."),
    _option("--auto-converge", is_flag=True, help="With --precopy: slow it by its cgroup when it writes faster than the link carries."),
    _option("--postcopy", is_flag=True, help="Switch over at once, the memory follows. If the link breaks meanwhile the container may be lost."),
    _option("--lazy/--no-lazy", default=None, help="Let it run there before its memory is in place (default: when it is large and both hosts can)."),
    _option("--bwlimit", "bwlimit_bytes_s", type=Rate(), metavar="RATE", help="Send at most so much a second: 50M, 100MB (default: no limit)."),
    _option(
        "--compress",
        type=CompressionChoice(),
        default=Compression(),
        metavar="auto|zstd[:N]|none",
        help="Compress on the way (default auto: where it carries more, measured while it runs).",
    ),
    _option("--streams", type=click.IntRange(1, 16), default=1, metavar="N", help="Carry content over so many connections (default 1)."),
    _option("--direct", is_flag=True, help="Carry content by TLS straight to the other host (ports 49152 to 49215), not through ssh."),
    hooks_option,
    override_option,
    ssh_option,
    server_options,
    timeout_option,
)  # fmt: skip


def options(function: F) -> F:
    """How to move; every value goes to the command by its name in NAMES."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def take(given: dict[str, Any]) -> dict[str, Any]:
    """Takes what `options` gives out of the parameters of a command."""
    return {name: given.pop(name) for name in NAMES}


def for_group(taken: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what is for single containers only: a group's memory is not sent ahead, and does not come behind it."""
    none = {"precopy": False, "max_downtime_s": None, "max_rounds": None, "on_exceed": None, "auto_converge": False, "postcopy": False}
    return {**taken, **none, "lazy": False if taken["lazy"] is False else None}


def reached(session: Session, destination: str | None, taken: Mapping[str, Any]) -> Access | None:
    """How a destination behind `https://` is reached. Raises UsageError when the options do not go with the destination."""
    return access(session, destination, {name: taken[name] for name in _SERVER})


def migrate_options(session: Session, taken: Mapping[str, Any], *, access: Access | None = None, shared_limit: Path | None = None) -> MigrateOptions:
    """What the options say. Raises UsageError where they do not go together."""
    from ckpt.ops.migrate import MigrateOptions

    limits = {key: taken[key] for key in _PRECOPY if taken[key] not in (None, False)}
    if taken["precopy"] and taken["postcopy"]:
        raise UsageError("--precopy and --postcopy exclude each other")
    if taken["postcopy"] and taken["lazy"] is False:
        raise UsageError("--postcopy brings the memory later: it does not go with --no-lazy")
    if limits and not taken["precopy"]:
        raise UsageError("--max-downtime, --max-rounds, --on-exceed and --auto-converge need --precopy")
    if taken["auto_converge"] and taken["max_rounds"] is None:
        limits["max_rounds"] = AUTO_CONVERGE_ROUNDS
    found: dict[str, Any] = {name: taken[name] for name in _PLAIN}
    if taken["timeout_s"] is not None:
        found["timeout_s"] = taken["timeout_s"]
    return MigrateOptions(
        precopy=PrecopyLimits(**limits) if taken["precopy"] else None,
        carriage=Carriage(taken["bwlimit_bytes_s"] or None, taken["compress"], taken["streams"], taken["direct"], shared_limit),
        ssh_options=(*session.settings.ssh_options, *taken["ssh_options"]),
        access=access,
        **found,
    )


def words(command: click.Command, taken: Mapping[str, Any], *, server: bool) -> list[str]:
    """The options again as they would be typed, but for what says nothing new.

    Args:
        command: one with these options.
        server: with those for a destination behind `https://`.
    """
    skipped = () if server else _SERVER
    return [word for param in command.params if param.name in NAMES and param.name not in skipped for word in _typed(param, taken[str(param.name)])]


def _typed(param: click.Parameter, value: Any) -> Iterator[str]:
    assert isinstance(param, click.Option)
    if param.flag_value is False:  # --no-hooks
        yield from [] if value else [param.opts[-1]]
        return
    if value in (None, False) and not (value is False and param.secondary_opts):
        return
    if isinstance(value, bool):
        yield (param.opts if value else param.secondary_opts)[-1]
    elif isinstance(value, tuple):
        for one in value:
            yield from (param.opts[-1], str(one))
    elif isinstance(value, Compression):
        if value != Compression():
            yield from (param.opts[-1], f"zstd:{value.level}" if value.mode == "zstd" else value.mode)
    elif value != param.default:
        yield from (param.opts[-1], str(value.absolute()) if isinstance(value, Path) else f"{value!r}" if isinstance(value, float) else str(value))
