"""`ckpt guard`: settles a job whose owner died, by hand; ckpt starts its guards itself. Not for people."""

from __future__ import annotations

import click

from ckpt.cli.common import Session, verb


@verb("guard")
@click.argument("job_dir", type=click.Path(exists=True, file_okay=False))
def command(session: Session, job_dir: str) -> int:
    """Wait for the end of a job's owner and settle what it left."""
    session.need_root()
    session.reporter.results = False
    from ckpt.ops import guard

    return guard.guard_main(job_dir)


command.hidden = True
