"""`ckpt checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli import protection
from ckpt.cli.carriage import carrier, destination
from ckpt.cli.common import Session, all_and_latest, dump_options, hooks_option, one_way, override_option, state_options, targets_argument, verb
from ckpt.cli.export import compress_options
from ckpt.cli.render.rows import Row
from ckpt.errors import CkptError, UsageError
from ckpt.model import DumpOptions, Target

if TYPE_CHECKING:
    from ckpt.archive.trust import Outgoing
    from ckpt.ops.result import Outcome

_SUFFIXES = {"zstd": ".tar.zst", "gzip": ".tar.gz", "none": ".tar"}
_CRIU_STATS = ("freezing_time_us", "frozen_time_us", "memdump_time_us", "memwrite_time_us", "pages_scanned", "pages_written")


@verb(
    "checkpoint",
    examples=(
        ("ckpt checkpoint web", "save web to the store and end it"),
        ("ckpt checkpoint -R web", "save it, let it run on"),
        ("ckpt checkpoint -a", "save all running containers"),
        ("ckpt checkpoint -e web.tar.zst web", "save to an archive instead of the store"),
        ("ckpt checkpoint pid:1234", "save a process tree"),
        ("ckpt checkpoint --group shop web db", "save both at one instant, all or none"),
    ),
)
@targets_argument()
@all_and_latest("running container")
@click.option("-R", "--leave-running", is_flag=True, help="Let it run on after the dump.")
@click.option(
    "-e", "--export", "export_to", metavar="DEST", type=click.Path(), help="Write an archive (a directory, or as for ckpt export), not to the store."
)
@compress_options
@protection.outgoing_options
@state_options()
@hooks_option
@override_option
@click.option(
    "--group", metavar="NAME", help="Save all at one instant, as one set, all or none. Without targets: those of that label, compose project or pod."
)
@click.option("--pod", metavar="POD", help="Save the containers of a pod, as a group of its name.")
@click.option("-k", "--keep", is_flag=True, help="Accepted for podman's sake: the store always keeps CRIU's logs.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag for the checkpoint: NAME@TAG. Repeatable.")
@click.option("--note", default="", metavar="TEXT", help="A note for the checkpoint.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first container that fails.")
@click.option("--print-stats", is_flag=True, help="Print podman's JSON of times (microseconds) and pages instead of names.")
def command(
    session: Session,
    targets: tuple[str, ...],
    every: bool,
    latest: bool,
    leave_running: bool,
    export_to: str | None,
    compress: str | None,
    level: int | None,
    group: str | None,
    pod: str | None,
    keep: bool,
    tags: tuple[str, ...],
    note: str,
    fail_fast: bool,
    print_stats: bool,
    **state: Any,
) -> int:
    """Save running containers or process trees.

    The checkpoint goes to the store, and the container ends (unless -R). When saving fails, the container runs on. What its restore
    needs (TCP connections, file locks, a terminal) is found out by looking; options override that.

    With --group all are frozen at one instant, and their checkpoints are one set: "ckpt restore --group NAME" brings them back together,
    with the connections among them. When one of them cannot be saved, none is, and all run on.
    """
    if pod is not None and (group is not None or targets):
        raise UsageError("--pod says what to save: leave --group and targets away")
    if (group is None and pod is None) or targets or every or latest:
        one_way(targets, every=every, latest=latest, what="target")
    if (name := group or pod) is not None:
        state["pod"] = pod is not None
        return _group(session, name, targets, every or latest, export_to, tags, note, print_stats, state | {"leave_running": leave_running})
    if export_to is None and (compress or level is not None):
        raise UsageError("--compress and --level go with --export")
    if export_to is not None and (tags or note):
        raise UsageError("--tag and --note are for the store, not for --export")
    if tags or note:
        from ckpt.ops import mark

        mark.check(tags, note)  # before anything is frozen
    given = protection.take(state, protection.OUTGOING)
    if export_to is None and any(given[name] for name in protection.OUTGOING if name != "sign"):
        raise UsageError("--encrypt and the passphrase's options go with --export")
    options = dump_options(session, leave_running=leave_running, **state)
    outgoing = protection.outgoing(session, given, archive=export_to is not None)
    session_targets = [Target.parse(target) for target in targets]
    if export_to is not None:
        output = _place(export_to, several=every or len(targets) > 1)
        session.need_root()
        if every or latest:
            targets = _chosen(every)
        outcomes = _export(session, targets, output, compress or session.settings.compress, level, options, outgoing, fail_fast)
    else:
        session.need_root()
        from ckpt.ops import checkpoint as use_case

        outcomes = use_case.checkpoint(
            session_targets, all=every, latest=latest, options=options, store_root=session.store_root, emit=session.emit, keep_going=not fail_fast,
            outgoing=outgoing,
        )  # fmt: skip
        if tags or note:
            outcomes = mark.made(outcomes, tags, note, store_root=session.store_root)
    return session.finish(outcomes, id_of="checkpoint", stats=_stats if print_stats else None)


def _group(
    session: Session,
    name: str,
    targets: Sequence[str],
    other_way: bool,
    export_to: str | None,
    tags: Sequence[str],
    note: str,
    print_stats: bool,
    state: dict[str, Any],
) -> int:
    if export_to is not None or other_way:
        raise UsageError("--group and --pod save to the store: leave --export, --all and --latest away")
    from ckpt.ops import group, mark
    from ckpt.store import groups

    mark.check(tags, note)
    given = protection.take(state, protection.OUTGOING)
    if any(given[key] for key in protection.OUTGOING if key != "sign"):
        raise UsageError("--encrypt and the passphrase's options go with --export")
    groups.check_name(name)
    session.need_root()
    pod = state.pop("pod")
    outcomes = group.checkpoint_group(
        name, [Target.parse(target) for target in targets], pod=pod, options=dump_options(session, **state), store_root=session.store_root,
        emit=session.emit, tags=tags, note=note, outgoing=protection.outgoing(session, given, archive=False),
    )  # fmt: skip
    return session.finish(outcomes, id_of="checkpoint", stats=_stats if print_stats else None)


def _place(export_to: str, *, several: bool) -> str:
    """Where to export to. Several archives do not fit into one file (podman lets the last one win)."""
    if several and not os.path.isdir(export_to):
        hint = "name a directory that exists: each gets a file of its own there"
        raise UsageError(f"several containers cannot go into one archive {export_to}", hint=hint)
    return export_to


def _chosen(every: bool) -> tuple[str, ...]:
    from ckpt.ops import resolve

    found = resolve.all_running() if every else [resolve.latest()]
    return tuple(resolve.qualified(engine, container, among=found) for engine, container in found)


def _export(
    session: Session,
    targets: Sequence[str],
    output: str,
    compress: str,
    level: int | None,
    options: DumpOptions,
    outgoing: Outgoing,
    fail_fast: bool,
) -> list[Outcome]:
    from ckpt.ops import export as use_case
    from ckpt.ops.result import failure

    outcomes: list[Outcome] = []
    for target in targets:
        name = Target.parse(target).name.replace("/", "_") + _SUFFIXES[compress] + (".age" if outgoing.recipients else "")
        file = os.path.join(output, name) if output != "-" and os.path.isdir(output) else output
        # Qualified: this is about what runs, not about a checkpoint of that name in the store.
        ref = target if Target.parse(target).engine else _qualified(target)
        try:
            place = destination(session, file)
            outcome = use_case.export(
                ref, place, compress=compress, level=level, leave_running=options.leave_running, options=options,
                carrier=carrier(session, place), outgoing=outgoing, store_root=session.store_root, emit=session.emit,
            )  # fmt: skip
        except CkptError as error:
            outcome = failure(target, error)
        outcomes.append(_retarget(outcome, target))
        if fail_fast and not outcome.ok:
            break
    return outcomes


def _qualified(target: str) -> str:
    from ckpt.ops import resolve

    engine, container = resolve.resolve(Target.parse(target))
    return resolve.qualified(engine, container)


def _retarget(outcome: Outcome, target: str) -> Outcome:
    from dataclasses import replace

    return replace(outcome, target=target)


def _stats(rows: Sequence[Row], took_s: float) -> object:
    """Podman's `container checkpoint --print-stats` (pkg/domain/entities/types: CheckpointReport), times in microseconds."""
    return {
        "podman_checkpoint_duration": microseconds(took_s),
        "container_statistics": [
            {
                "Id": row["container_id"],
                "runtime_checkpoint_duration": microseconds(row["stats"].get("dump_s", row["freeze_s"])),
                "criu_statistics": {key.removesuffix("_us"): row["stats"].get(key, 0) for key in _CRIU_STATS},
            }
            for row in rows
        ],
    }


def microseconds(seconds: float | None) -> int:
    return round((seconds or 0.0) * 1e6)
