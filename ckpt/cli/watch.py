"""`ckpt watch`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any, Final

import click

from ckpt.cli import moving
from ckpt.cli.common import Duration, Session, verb
from ckpt.cli.drain import DRAIN_FIELDS, make_request, show, split
from ckpt.cli.prune import size_bytes
from ckpt.errors import UsageError

DEADLINE_S: Final = 110.0
"""AWS gives two minutes; Azure and Google give less, and say so in docs/drain.md."""


@verb(
    "watch",
    fields=DRAIN_FIELDS,
    examples=(
        ("ckpt watch --on 'test -e /run/leave' --to root@b", "drain to b when that file appears"),
        ("ckpt watch --on 'curl ...' --do 'hibernate save'", "save all when the cloud says so"),
    ),
)
@click.option("--on", "command_", required=True, metavar="CMD", help="The notice: a command for sh; exit status 0 means that it is there.")
@click.option("--every", "every_s", type=Duration(), default="5s", metavar="TIME", help="Ask so often (default 5s).")
@click.option("--notice-timeout", "limit_s", type=Duration(), default="10s", metavar="TIME", help="One try may take so long (default 10s).")
@click.option("--to", "to", multiple=True, metavar="HOST[,HOST]", help="Then drain this host to these. Repeatable.")
@click.option("--do", "do", metavar="ARGS", help="Or run ckpt with these arguments: 'hibernate save', 'checkpoint -a'.")
@click.option("--deadline", "deadline_s", type=Duration(), default="110s", metavar="TIME", help="There is so much time then (default 110s).")
@click.option("--else-checkpoint", default="", metavar="store|LOCATION", help="Save what there is no time to move, to the store or there.")
@click.option("--once", is_flag=True, help="End after the first notice, with the exit code of what was done.")
@click.option("--parallel", type=click.IntRange(1, 64), default=4, metavar="N", help="Drain: so many at a time (default 4).")
@click.option("--exclude", multiple=True, metavar="NAME", help="Drain: leave this one here. Repeatable.")
@click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help="Drain: only those with this (as ckpt drain has it).")
@click.option("--also", multiple=True, metavar="TARGET", help="Drain: also this one, a process tree: pid:1234. Repeatable.")
@click.option("--reserve", metavar="SIZE", help="Drain: memory to leave free on each host.")
@moving.options
def command(
    session: Session,
    command_: str,
    every_s: float,
    limit_s: float,
    to: tuple[str, ...],
    do: str | None,
    once: bool,
    reserve: str | None,
    **given: Any,
) -> int:
    """Wait for a notice, then move or save all containers in the time that is left.

    The notice command is run periodically with a time limit of its own; one that fails or hangs is no notice. On a notice this host is
    drained (--to) within the deadline: the smallest containers first, so that most get away. What cannot be away in time is saved instead
    (--else-checkpoint) or, as the last resort, left running, and told. Nothing is begun that cannot be finished.

    Without --once it waits until the notice is gone, then for the next one. As a service of systemd it says when it is ready
    (Type=notify).
    """
    destinations = split(to)
    if bool(destinations) == (do is not None):
        raise UsageError("what is to be done? give --to HOST or --do 'VERB ...', one of them", hint="ckpt watch --on CMD --to root@b")
    if not command_.strip():
        raise UsageError("--on is an empty command")
    for name, value in (("--every", every_s), ("--notice-timeout", limit_s), ("--deadline", given["deadline_s"])):
        if not value > 0:
            raise UsageError(f"{name} must be more than nothing")
    words = _words(do) if do is not None else []
    given["reserve_bytes"] = None if reserve is None else size_bytes(reserve)
    drain_request = make_request(session, click.get_current_context().command, destinations, {**given, "best_effort": True})
    session.need_root()
    from ckpt.ops import children
    from ckpt.ops import drain as draining
    from ckpt.ops import watch as use_case

    def act() -> int:
        if not words:
            report = draining.drain(replace(drain_request), store_root=session.store_root, emit=session.emit)
            return show(session, report)
        ended = children.run(["--store", str(session.store_root), "--format", "jsonl", *words], emit=session.emit)
        if ended.error is not None and ended.returncode not in (0, 100):
            session.reporter.error(ended.error)
        return ended.returncode

    return use_case.watch(use_case.WatchRequest(command_, every_s, limit_s, once), act, emit=session.emit)


def _words(do: str) -> list[str]:
    """The arguments for ckpt. Raises UsageError, so that a wrong one is not found out when it is too late."""
    from ckpt.cli.app import HIDDEN, VERBS

    try:
        words = shlex.split(do)
    except ValueError:
        raise UsageError("--do has a quote that does not end") from None
    words = words[1:] if words[:1] == ["ckpt"] else words
    if not words or words[0] not in VERBS or words[0] in (*HIDDEN, "watch"):
        raise UsageError(f"--do {do[:64]!r} is no verb of ckpt", hint="--do 'hibernate save', --do 'checkpoint -a'")
    return words
