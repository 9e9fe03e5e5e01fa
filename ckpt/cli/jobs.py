"""`ckpt jobs`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, verb
from ckpt.cli.render.job import JOB_FIELDS, job_lines, job_row, jobs_lines
from ckpt.cli.render.rows import Row
from ckpt.errors import UsageError


@verb(
    "jobs",
    fields=JOB_FIELDS,
    examples=(
        ("ckpt jobs", "what is under way or waits for you, and what ended within a day"),
        ("ckpt jobs --all --filter kind=migrate", "all migrations from here that are remembered"),
        ("ckpt jobs show 1a2b3c4d", "one of them: its figures, or why it failed"),
        ("ckpt jobs --running -q", "ids of those that are not over"),
        ("ckpt jobs -l --format '{{.Name}} {{.DowntimeS}}'", "the downtime of the newest"),
    ),
)
@click.argument("words", nargs=-1, metavar="[show ID...]", shell_complete=completion.jobs)
@click.option("-a", "--all", "every", is_flag=True, help="Also those that ended longer than a day ago.")
@click.option("--running", is_flag=True, help="Only those that are not over.")
@click.option("-l", "--latest", is_flag=True, help="Only the newest.")
@click.option("-n", "--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option(
    "-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help="Only those with this name, state, kind, engine or destination. Repeatable."
)
def command(session: Session, words: tuple[str, ...], every: bool, running: bool, latest: bool, last: int | None, filters: tuple[str, ...]) -> int:
    """List the jobs of this host: migrations, checkpoints and restores, newest last.

    Those under way, those that wait for a command (NEXT says which), restores whose memory still arrives, and what became of the
    others. A migration is a job of both hosts: "migrate" on its source, "receive" on its destination.

    jobs show ID tells all of one: how long it was frozen, what was sent, each step, or why it failed. The beginning of the ID is
    enough, or of its part after the hyphen. Records are kept for 90 days, a thousand at most, in the store.
    """
    if sum((every, running, latest, last is not None)) > 1:
        raise UsageError("give one of --all, --running, --latest and --last")
    from ckpt.ops import jobs as use_case

    if words:
        if words[0] != "show" or len(words) == 1:
            raise UsageError("jobs takes nothing, or: show ID", hint="ckpt jobs lists the ids")
        if every or running or latest or last or filters:
            raise UsageError("jobs show takes ids and no filters")
        found = use_case.jobs(store_root=session.store_root)
        session.reporter.show([job_row(use_case.find(ref, found)) for ref in words[1:]], table=_lines)
        return 0
    shown = use_case.selected(use_case.jobs(store_root=session.store_root), every=every, running=running, last=1 if latest else last, filters=filters)
    session.reporter.show([job_row(record) for record in shown], table=jobs_lines)
    return 0


def _lines(rows: Sequence[Row]) -> chain[str]:
    return chain.from_iterable(job_lines(row) for row in rows)
