"""`ckpt drain`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from ckpt.cli import completion, moving
from ckpt.cli.common import Duration, Session, verb
from ckpt.cli.prune import size_bytes
from ckpt.cli.render import units
from ckpt.cli.render.rows import Row, plain
from ckpt.cli.render.tables import columns, short_host
from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.ops.drain import Report, Went
    from ckpt.ops.draining import DrainRequest

DRAIN_FIELDS: Final = (
    "name", "id", "ok", "target", "state", "destination", "container_id", "memory_bytes", "downtime_s", "total_s", "sent_bytes", "job", "reason",
    "error", "drain",
)  # fmt: skip


def split(destinations: Sequence[str]) -> tuple[str, ...]:
    """`b,c` and `b` `c` alike. Raises UsageError for an empty one."""
    found = tuple(part.strip() for text in destinations for part in text.split(","))
    if not all(found):
        raise UsageError("--to names an empty destination", hint="--to root@b,root@c")
    return found


def make_request(session: Session, command: click.Command, to: tuple[str, ...], given: dict[str, Any]) -> DrainRequest:
    """What the options say. Raises UsageError where they do not go together."""
    from ckpt.ops.draining import DrainRequest
    from ckpt.transports import https_peer

    taken = moving.take(given)
    moving.migrate_options(session, taken)
    servers = [destination for destination in to if https_peer.is_https(destination)]
    access = {one: found.to_json() for one in servers if (found := moving.reached(session, one, taken)) is not None}
    if to and not servers:
        moving.reached(session, to[0], taken)
    limit = taken["bwlimit_bytes_s"] or None
    passed = {**taken, "bwlimit_bytes_s": None}
    return DrainRequest(
        to=to,
        bwlimit_bytes_s=limit,
        words=tuple(moving.words(command, passed, server=False)),
        server_words=tuple(moving.words(command, passed, server=True)),
        group_words=tuple(moving.words(command, moving.for_group(passed), server=False)),
        group_server_words=tuple(moving.words(command, moving.for_group(passed), server=True)),
        ssh_options=(*session.settings.ssh_options, *taken["ssh_options"]),
        access=access,
        ignore_volumes=taken["ignore_volumes"],
        **given,
    )


@verb(
    "drain",
    fields=DRAIN_FIELDS,
    examples=(
        ("ckpt drain --to root@b,root@c", "move all running containers to b and c"),
        ("ckpt drain --to root@b --dry-run", "say what would go where, and what would not"),
        ("ckpt drain --to root@b --bwlimit 100M --exclude db", "all but db, at most 100 MiB a second together"),
        ("ckpt drain --resume", "go on with one that was broken off"),
    ),
)
@click.option("--to", "to", multiple=True, metavar="HOST[,HOST]", help="Where to: [USER@]HOST[:PORT] or https://HOST:PORT. Repeatable.")
@click.option("--resume", is_flag=True, help="Go on with the drain that was broken off, as it was asked for.")
@click.option("--parallel", type=click.IntRange(1, 64), default=4, metavar="N", help="So many at a time (default 4).")
@click.option("--exclude", multiple=True, metavar="NAME", shell_complete=completion.containers, help="Leave this one here. Repeatable.")
@click.option(
    "-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE",
    help="Only those with this: label=KEY[=VALUE], name=REGEX, engine=NAME, id=BEGINNING, pod=ID. Repeatable.",
)  # fmt: skip
@click.option("--also", multiple=True, metavar="TARGET", help="Also this one: a process tree, pid:1234. Repeatable.")
@click.option("--best-effort", is_flag=True, help="Move those that fit and can go, when others do not.")
@click.option("--reserve", metavar="SIZE", help="Memory to leave free on each host (default: a tenth of what is available there).")
@click.option("--deadline", "deadline_s", type=Duration(), metavar="TIME", help="Begin nothing that cannot be away so soon from now.")
@click.option(
    "--else-checkpoint", default="", metavar="store|LOCATION", help="With --deadline: save what there is no time to move, to the store or there."
)
@click.option("--dry-run", is_flag=True, help="Say what would go where, do nothing.")
@moving.options
def command(session: Session, to: tuple[str, ...], resume: bool, reserve: str | None, dry_run: bool, **given: Any) -> int:
    """Move all running containers of this host to others.

    Each is migrated as by ckpt migrate, several at a time. They are placed by the memory that is free on each host; what belongs together
    (a pod, containers that require each other, a compose project, the label ckpt.group) goes to one, a group or project at one instant, all
    or none, as by ckpt migrate --group. What fits nowhere, or cannot be saved, is an error before anything is touched (unless
    --best-effort). Containers labelled ckpt.migratable=false or ckpt.checkpoint=deny stay. A container whose migration fails runs on here,
    the others go on, and another host is tried.

    --bwlimit holds for all together: what one does not use, the others have.

    On Ctrl-C nothing more is begun, and what is under way is undone. A drain that was broken off, also by a crash, is taken up again with
    --resume, or by the same command. ckpt undrain brings back what was moved.

    Exits with 0 when all are away, with 100 when some were to stay, else with the code of what failed.
    """
    destinations = split(to)
    if resume and destinations:
        raise UsageError("--resume goes where it was going: give it or --to")
    if not resume and not destinations:
        raise UsageError("where to?", hint="ckpt drain --to root@b,root@c")
    if given["else_checkpoint"] and given["deadline_s"] is None:
        raise UsageError("--else-checkpoint needs --deadline")
    given["reserve_bytes"] = None if reserve is None else size_bytes(reserve)
    request = make_request(session, click.get_current_context().command, destinations, given)
    session.need_root()
    from ckpt.ops import drain as use_case

    report = use_case.drain(request, resume=resume, dry_run=dry_run, store_root=session.store_root, emit=session.emit)
    return show(session, report)


def show(session: Session, report: Report) -> int:
    """The table, then what stays and why."""
    rows = [went_row(one, report.id) for one in report.went]
    session.reporter.show(rows, table=drain_lines, exit_code=report.exit_code)
    for one in report.went:
        if one.error is not None:
            session.reporter.error(one.error)
        elif not one.well:
            session.reporter.warning(f"{one.name}: {one.state}{f': {one.reason}' if one.reason else ''}")
    return report.exit_code


def went_row(one: Went, drain: str) -> Row:
    figures = {key: one.facts.get(key) for key in ("downtime_s", "total_s", "sent_bytes", "job")}
    return {
        "name": one.name,
        "id": one.container_id or None,
        "ok": one.well or (one.error is None and one.state in ("moved", "planned")),
        "target": one.target,
        "state": one.state,
        "destination": one.destination,
        "container_id": one.container_id,
        "memory_bytes": one.memory_bytes,
        **figures,
        "reason": one.reason,
        "error": plain(one.error),
        "drain": drain,
    }


def drain_lines(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each, where it is now."""
    if not rows:
        yield "nothing runs here that would have to go"
        return
    body = []
    for row in rows:
        downtime = units.duration(row["downtime_s"]) if isinstance(row["downtime_s"], int | float) else ""
        where = short_host(row["destination"]) if row["destination"] and row["state"] in ("moved", "planned", "waiting") else ""
        body.append([row["target"], row["state"], where, units.size(row["memory_bytes"]) if row["memory_bytes"] else "", downtime])
    yield from columns(["CONTAINER", "STATE", "HOST", "MEMORY", "DOWNTIME"], body)
