"""`ckpt migrate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from ckpt.cli import completion
from ckpt.cli.carriage import access, server_options
from ckpt.cli.common import CompressionChoice, Duration, Rate, Session, hooks_option, override_option, ssh_option, timeout_option, verb
from ckpt.cli.render.rows import OUTCOME_FIELDS, PLAN_FIELDS, Row
from ckpt.cli.render.tables import migrated_line
from ckpt.cli.render.units import clean
from ckpt.errors import UsageError
from ckpt.model import Carriage, Compression, PrecopyLimits, Target

if TYPE_CHECKING:
    from ckpt.ops.migrate import MigrateOptions

AUTO_CONVERGE_ROUNDS = 16
"""Each step of slowing takes at least one."""


@verb(
    "migrate",
    fields=(*OUTCOME_FIELDS, *(field for field in PLAN_FIELDS if field not in OUTCOME_FIELDS)),
    examples=(
        ("ckpt migrate web root@b", "move web to host b"),
        ("ckpt migrate --precopy web root@b", "the same with little downtime, for much memory"),
        ("ckpt migrate --precopy --bwlimit 50M web root@b", "leave the link to others, too"),
        ("ckpt migrate --token-file token web https://b:7443", "to the ckpt serve of a host without ssh"),
        ("ckpt migrate --dry-run web root@b", "say what would be done"),
        ("ckpt migrate --continue 20261121T120311-1a2b3c4d", "finish one that was cut after its point of no return"),
    ),
)
@click.argument("target", required=False, metavar="TARGET", shell_complete=completion.containers)
@click.argument("destination", required=False, metavar="[USER@]HOST[:PORT]|https://HOST:PORT")
@click.option("--continue", "job_id", metavar="ID", help="Finish a migration that was cut; the error that it ended with names the ID.")
@click.option("--dry-run", is_flag=True, help="Print the steps, do nothing.")
@click.option("-n", "--name", metavar="NAME", help="Name on the destination (default: the same).")
@click.option("--keep-source", is_flag=True, help="Keep the ended container (and its volumes) on the source.")
@click.option("--tcp-established/--no-tcp-established", default=None, help="Keep established TCP connections (default: found out by looking).")
@click.option("--file-locks/--no-file-locks", default=None, help="Keep file locks (default: found out by looking).")
@click.option("--ignore-volumes", is_flag=True, help="Leave the content of named volumes behind.")
@click.option("-p", "--publish", multiple=True, metavar="PORT", help="Publish other ports on the destination.")
@click.option("--precopy", is_flag=True, help="Send the memory while it runs, in rounds, and freeze it only for what is left.")
@click.option("--max-downtime", "max_downtime_s", type=Duration(), metavar="TIME", help="With --precopy: stop when so much is left (default 300ms).")
@click.option("--max-rounds", type=click.IntRange(1, 100), metavar="N", help="With --precopy: at most so many rounds (default 8, or 16 if slowed).")
@click.option("--on-exceed", type=click.Choice(["continue", "abort"]), help="With --precopy: what to do when more is to be expected in the end.")
@click.option("--auto-converge", is_flag=True, help="With --precopy: slow it by its cgroup when it writes faster than the link carries.")
@click.option("--postcopy", is_flag=True, help="Switch over at once, the memory follows. If the link breaks meanwhile the container may be lost.")
@click.option("--lazy/--no-lazy", default=None, help="Let it run there before its memory is in place (default: when it is large and both hosts can).")
@click.option("--bwlimit", "bwlimit_bytes_s", type=Rate(), metavar="RATE", help="Send at most so much a second: 50M, 100MB (default: no limit).")
@click.option(
    "--compress",
    type=CompressionChoice(),
    default=Compression(),
    metavar="auto|zstd[:N]|none",
    help="Compress on the way (default auto: where it carries more, measured while it runs).",
)
@click.option("--streams", type=click.IntRange(1, 16), default=1, metavar="N", help="Carry content over so many connections (default 1).")
@click.option("--direct", is_flag=True, help="Carry content by TLS straight to the other host (ports 49152 to 49215), not through ssh.")
@hooks_option
@override_option
@ssh_option
@server_options
@timeout_option
def command(
    session: Session,
    target: str | None,
    destination: str | None,
    job_id: str | None,
    dry_run: bool,
    timeout_s: float | None,
    ssh_options: tuple[str, ...],
    precopy: bool,
    max_downtime_s: float | None,
    max_rounds: int | None,
    on_exceed: Literal["continue", "abort"] | None,
    auto_converge: bool,
    bwlimit_bytes_s: int | None,
    compress: Compression,
    streams: int,
    direct: bool,
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
    """
    reached = access(session, destination, given)
    if job_id is not None:
        if target or destination or dry_run:
            raise UsageError("--continue ID needs no target and no destination")
        session.need_root()
        from ckpt.ops import migrate as use_case

        outcome = use_case.continue_(job_id, store_root=session.store_root, emit=session.emit)
        return session.finish([outcome], table=lambda rows: _closing(rows, str(outcome.stats.get("destination", ""))))
    if not target or not destination:
        raise UsageError("what is to go where?", hint="ckpt migrate web root@b")
    session.need_root()
    from ckpt.ops import migrate as use_case

    limits = {"max_downtime_s": max_downtime_s, "max_rounds": max_rounds, "on_exceed": on_exceed, "auto_converge": auto_converge or None}
    limits = {key: value for key, value in limits.items() if value is not None}
    if precopy and given["postcopy"]:
        raise UsageError("--precopy and --postcopy exclude each other")
    if given["postcopy"] and given["lazy"] is False:
        raise UsageError("--postcopy brings the memory later: it does not go with --no-lazy")
    if limits and not precopy:
        raise UsageError("--max-downtime, --max-rounds, --on-exceed and --auto-converge need --precopy")
    if auto_converge and max_rounds is None:
        limits["max_rounds"] = AUTO_CONVERGE_ROUNDS
    ahead = PrecopyLimits(**limits) if precopy else None  # type: ignore[arg-type]
    carriage = Carriage(bwlimit_bytes_s or None, compress, streams, direct)
    given |= {"ssh_options": (*session.settings.ssh_options, *ssh_options), "access": reached}
    options = use_case.MigrateOptions(precopy=ahead, carriage=carriage, **given)
    if timeout_s is not None:
        from dataclasses import replace

        options = replace(options, timeout_s=timeout_s)
    if dry_run:
        return _plan(session, target, destination, options)
    outcome = use_case.migrate(Target.parse(target), destination, options=options, store_root=session.store_root, emit=session.emit)
    return session.finish([outcome], table=lambda rows: _closing(rows, destination))


def _plan(session: Session, target: str, destination: str, options: MigrateOptions) -> int:
    from ckpt.ops import migrate as use_case

    steps = use_case.plan(Target.parse(target), destination, options=options)
    row: Row = {"name": target, "plan": [{"step": name, "detail": detail} for name, detail in steps]}
    session.reporter.show([row], table=lambda rows: [f"  {clean(name):<16} {clean(detail)}".rstrip() for name, detail in steps])
    return 0


def _closing(rows: Sequence[Row], destination: str) -> list[str]:
    """The greppable closing line; of a continued migration that ended with the source running on, the name alone."""
    return [migrated_line(row["name"], destination, row["stats"]) if destination else row["name"] for row in rows]
