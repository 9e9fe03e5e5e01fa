"""Let go of what no rule keeps, and give back what belongs to nobody."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ckpt.errors import BusyError, CkptError, TargetNotFound, UsageError
from ckpt.events import Emit, Notice
from ckpt.model import Checkpoint
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT
from ckpt.store.retention import Rules, Verdict, decide


class Pruned:
    """What `prune` did, or would do: a verdict for each checkpoint, bytes given back, and what could not be removed."""

    def __init__(self, verdicts: list[Verdict], freed_bytes: int, failed: list[tuple[Checkpoint, CkptError]], orphans: int) -> None:
        self.verdicts = verdicts
        self.freed_bytes = freed_bytes
        self.failed = failed
        self.orphans = orphans


def prune(names: Sequence[str], rules: Rules, *, orphans: bool = False, dry_run: bool = False, store_root: Path = DEFAULT_ROOT, emit: Emit) -> Pruned:
    """Judge the checkpoints of `names` (none: of all), remove those that no rule keeps.

    One that is being restored or exported stays, with a notice; the next run takes it.

    Args:
        orphans: also what belongs to no checkpoint: what dead processes left half written, data that nobody refers to.
        dry_run: remove nothing, only say what would become of each.

    Raises:
        UsageError: no rule was given: nothing says what to keep.
        TargetNotFound: there is no checkpoint of a name.
    """
    if not rules.selects and rules.max_size_bytes is None and not orphans:
        raise UsageError("say what to keep", hint="--keep-last 3, --keep-daily 7, --keep-within 2d, --max-size 50G …, or --orphans")
    catalog = Catalog(store_root)
    known = catalog.all()
    for name in names:
        if all(c.manifest.name != name for c in known):
            raise TargetNotFound(f"there is no checkpoint of {name!r} in the store", hint="ckpt list shows what is there")
    footprint = catalog.footprint()
    verdicts: list[Verdict] = []
    if rules.selects or rules.max_size_bytes is not None:
        verdicts = decide(known, rules, now_s=time.time(), footprint=footprint, judged=lambda c: not names or c.manifest.name in names)
        verdicts = [v for v in verdicts if not names or v.checkpoint.manifest.name in names]
    doomed = [v.checkpoint for v in verdicts if not v.keep]
    failed: list[tuple[Checkpoint, CkptError]] = []
    swept = freed = 0
    if dry_run and orphans:
        freed += catalog.collect(dry_run=True).freed_bytes
    for checkpoint in doomed if not dry_run else ():
        try:
            catalog.remove(checkpoint)
        except TargetNotFound:
            continue  # somebody else was sooner
        except BusyError as error:
            failed.append((checkpoint, error))
            emit(Notice(checkpoint.ref, f"stays for now: {error.message}", warning=True))
    if orphans and not dry_run:
        swept = len(catalog.sweep())
        freed += catalog.collect().freed_bytes
    gone = {c.manifest.id for c in doomed} - {c.manifest.id for c, _ in failed}
    freed += footprint(known) - footprint([c for c in known if c.manifest.id not in gone])
    return Pruned(verdicts, freed, failed, swept)
