"""`ckpt migrate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli import completion, moving
from ckpt.cli.common import Session, verb
from ckpt.cli.render import units
from ckpt.cli.render.rows import OUTCOME_FIELDS, PLAN_FIELDS, Row
from ckpt.cli.render.tables import migrated_line
from ckpt.cli.render.units import clean
from ckpt.errors import UsageError
from ckpt.model import Target
from ckpt.peer import inherited

if TYPE_CHECKING:
    from ckpt.ops.migrate import MigrateOptions


@verb(
    "migrate",
    fields=(*OUTCOME_FIELDS, *(field for field in PLAN_FIELDS if field not in OUTCOME_FIELDS)),
    examples=(
        ("ckpt migrate web root@b", "move web to host b"),
        ("ckpt migrate --precopy web root@b", "the same with little downtime, for much memory"),
        ("ckpt migrate --precopy --bwlimit 50M web root@b", "leave the link to others, too"),
        ("ckpt migrate --token-file token web https://b:7443", "to the ckpt serve of a host without ssh"),
        ("ckpt migrate --group shop root@b", "move all members of shop, or none, with the connections among them"),
        ("ckpt migrate --dry-run web root@b", "say what would be done"),
        ("ckpt migrate --continue 20261121T120311-1a2b3c4d", "finish one that was cut after its point of no return"),
    ),
)
@click.argument("target", required=False, metavar="TARGET", shell_complete=completion.containers)
@click.argument("destination", required=False, metavar="[USER@]HOST[:PORT]|https://HOST:PORT")
@click.argument("more", nargs=-1, metavar="", shell_complete=completion.containers)
@click.option("--group", metavar="NAME", help="Move all members at one instant, all or none: --group NAME DESTINATION [TARGET]...")
@click.option("--continue", "job_id", metavar="ID", help="Finish a migration that was cut; the error that it ended with names the ID.")
@click.option("--dry-run", is_flag=True, help="Print the steps, do nothing.")
@click.option("-n", "--name", metavar="NAME", help="Name on the destination (default: the same).")
@click.option("-p", "--publish", multiple=True, metavar="PORT", help="Publish other ports on the destination.")
@moving.options
@click.option("--bwlimit-shared", "shared_limit", type=click.Path(path_type=Path), hidden=True)
@click.option("--stdio", is_flag=True, hidden=True, help="To the ckpt peer on standard input and output.")
@click.option("--links", type=click.IntRange(1, 1000), hidden=True, help="With --group: to so many ckpt peers that will be brought to us.")
def command(
    session: Session,
    target: str | None,
    destination: str | None,
    more: tuple[str, ...],
    group: str | None,
    job_id: str | None,
    dry_run: bool,
    shared_limit: Path | None,
    stdio: bool,
    links: int | None,
    **given: Any,
) -> int:
    """Move a running container to another host, over ssh or to its ckpt serve.

    The other host runs ckpt too. Both hosts are checked first. The container image, changed files, volumes and memory are copied, the
    copy is restored and held there, and only when it stands ready the switch is made: there is never more than one running copy, and
    never none. When something fails before the switch, the source runs on.

    The memory goes straight from the frozen container to the other host. With --precopy most of it goes while the container runs:
    the downtime then depends on what it writes, not on how large it is. With --auto-converge a container that writes faster than the
    link carries is slowed, step by step, while it is copied; its own limit is set back before it is frozen.

    RATE is in bytes a second, with K, M or G (of 1024) or KB, MB, GB (of 1000); it holds for all content, also while the container is
    frozen. Compression helps where the link is slow: auto compares, while it runs, what is carried with and without.

    One ssh connection encrypts on one processor. With --streams N content goes over N further ones; each logs in by itself, so a key or an
    agent is wanted: who logs in by password is asked once for each. With --direct it goes over N connections by TLS 1.3, with certificates
    made for this migration that both ends know by ssh; the other host listens for them on one port of 49152 to 49215, on the address at
    which ssh reached it, for 20 seconds at most.

    https://HOST:PORT is a ckpt serve on the other host, for hosts without ssh between them. Give the fingerprint that it printed once
    (--fingerprint; it is remembered), or the authority that signed its certificate (--ca), and a token (--token-file) or a certificate of
    this host (--client-cert).

    With --group the destination comes first, and behind it the members; without any, the running containers that belong to the group, as for
    ckpt checkpoint. All are frozen at one instant and restored there, held, before the one switch that is made for all: when one of them
    cannot be moved, none is, and all run on here. --precopy, --postcopy, --lazy, --name and --publish are for single containers.
    """
    if group is not None:
        words = [word for word in (target, destination, *more) if word is not None]
        if stdio or job_id is not None:
            raise UsageError("--stdio is for single containers" if stdio else "--continue ID needs no --group, no target and no destination")
        if links is not None:
            return _fetched(session, group, words, links, given)
        return _group(session, group, words, dry_run, shared_limit, given)
    if links is not None:
        raise UsageError("--links is for --group")
    if more:
        raise UsageError("several targets go together as a group only", hint="ckpt migrate --group NAME root@b web db")
    if stdio:
        with _over_stdio(destination):
            destination = inherited.DESTINATION if job_id is None else None
            return _command(session, target, destination, job_id, dry_run, shared_limit, given)
    return _command(session, target, destination, job_id, dry_run, shared_limit, given)


@contextmanager
def _over_stdio(destination: str | None) -> Iterator[None]:
    from ckpt.peer import client

    if destination:
        raise UsageError("--stdio is the destination")
    inherited.take_over()
    try:
        yield
    finally:
        client.leave_inherited()


def _command(
    session: Session, target: str | None, destination: str | None, job_id: str | None, dry_run: bool, shared_limit: Path | None, given: dict[str, Any]
) -> int:
    taken = moving.take(given)
    reached = moving.reached(session, destination, taken)
    if job_id is not None:
        if target or destination or dry_run:
            raise UsageError("--continue ID needs no target and no destination")
        session.need_root()
        from ckpt.ops import group_migrate
        from ckpt.ops import migrate as use_case

        members = group_migrate.continue_group(job_id, store_root=session.store_root, emit=session.emit)
        if members is not None:
            return session.finish(members)
        outcome = use_case.continue_(job_id, store_root=session.store_root, emit=session.emit)
        return session.finish([outcome], table=lambda rows: _closing(rows, str(outcome.stats.get("destination", ""))))
    if not target or not destination:
        raise UsageError("what is to go where?", hint="ckpt migrate web root@b")
    session.need_root()
    from ckpt.ops import migrate as use_case

    options = replace(moving.migrate_options(session, taken, access=reached, shared_limit=shared_limit), **given)
    if dry_run:
        return _plan(session, target, destination, options)
    outcome = use_case.migrate(Target.parse(target), destination, options=options, store_root=session.store_root, emit=session.emit)
    return session.finish([outcome], table=lambda rows: _closing(rows, destination))


def _group(session: Session, name: str, words: Sequence[str], dry_run: bool, shared_limit: Path | None, given: dict[str, Any]) -> int:
    """`--group NAME DESTINATION [TARGET]...`."""
    taken = moving.take(given)
    if not words:
        raise UsageError("where is the group to go?", hint=f"ckpt migrate --group {name} root@b")
    destination, targets = words[0], [Target.parse(word) for word in words[1:]]
    reached = moving.reached(session, destination, taken)
    options = replace(moving.migrate_options(session, taken, access=reached, shared_limit=shared_limit), **given)
    from ckpt.ops import group_migrate
    from ckpt.store import groups

    groups.check_name(name)
    group_migrate.refuse(options, destination)
    if dry_run:
        session.need_root()
        return _show_plan(session, name, group_migrate.plan(name, destination))
    session.need_root()
    outcomes = group_migrate.migrate_group(name, targets, destination, options=options, store_root=session.store_root, emit=session.emit)

    def table(rows: Sequence[Row]) -> list[str]:
        longest_s = max((row["stats"].get("downtime_s", 0.0) for row in rows), default=0.0)
        said = f"migrated group {name} -> {destination}: {len(rows)} of {len(outcomes)}, downtime at most {units.duration(longest_s)}"
        return [*_closing(rows, destination), *([said] if rows else [])]

    return session.finish(outcomes, table=table)


def _fetched(session: Session, name: str, targets: Sequence[str], count: int, given: dict[str, Any]) -> int:
    """To the host that fetches the group (ops/fetching.py): all words are targets."""
    from ckpt.events import Figures

    with inherited.door(count) as path:
        session.emit(Figures("", {"links": path}))
        return _group(session, name, [inherited.DESTINATION, *targets], False, None, given)


def _plan(session: Session, target: str, destination: str, options: MigrateOptions) -> int:
    from ckpt.ops import migrate as use_case

    steps = use_case.plan(Target.parse(target), destination, options=options)
    return _show_plan(session, target, steps)


def _show_plan(session: Session, target: str, steps: Sequence[tuple[str, str]]) -> int:
    row: Row = {"name": target, "plan": [{"step": name, "detail": detail} for name, detail in steps]}
    session.reporter.show([row], table=lambda rows: [f"  {clean(name):<16} {clean(detail)}".rstrip() for name, detail in steps])
    return 0


def _closing(rows: Sequence[Row], destination: str) -> list[str]:
    """The greppable closing line; of a continued migration that ended with the source running on, the name alone."""
    return [migrated_line(row["name"], destination, row["stats"]) if destination else row["name"] for row in rows]
