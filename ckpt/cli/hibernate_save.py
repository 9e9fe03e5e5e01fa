"""`ckpt hibernate save`, and what it shares with `ckpt reboot`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, exit_code, verb
from ckpt.cli.render.rows import OUTCOME_FIELDS, Row, outcome_row
from ckpt.cli.render.tables import columns
from ckpt.cli.render.units import size
from ckpt.errors import DoneWithWarnings, UsageError
from ckpt.model import Target

if TYPE_CHECKING:
    from ckpt.ops.hibernate.plan import Plan, Wish
    from ckpt.ops.hibernate.save import Saved
    from ckpt.ops.hibernate.settings import HibernateSettings
    from ckpt.store.hibernation import Kind

F = TypeVar("F", bound=Callable[..., Any])
PLAN_FIELDS = ("name", "id", "ok", "action", "layer", "after", "units", "group", "needed_bytes", "error")


def save_options(function: F, *, verify: bool = False) -> F:
    """What says whom to save, and how.

    Args:
        verify: read each checkpoint back unless told otherwise.
    """
    for option in reversed((
        click.argument("targets", nargs=-1, metavar="[TARGET]...", shell_complete=completion.containers),
        click.option("-a", "--all", "every", is_flag=True, help="Every running container, and the process trees of hibernate.toml (the default)."),
        click.option(
            "-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help="Only those with this label, name, engine, id or pod. Repeatable."
        ),
        click.option("--best-effort", is_flag=True, help="Save what can be saved, and go on; 100 is the exit status when something could not."),
        click.option("--dry-run", is_flag=True, help="Look at everything, tell what would be done, touch nothing."),
        click.option("--parallel", type=click.IntRange(min=1), metavar="N", help="How many at a time (default: as configured)."),
        click.option(
            "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
            help="For all together (default: as configured, 300).",
        ),
        click.option(
            "--verify/--no-verify", default=verify,
            help=f"Read back each checkpoint before its workload ends (its restore does so anyway). Default: {'yes' if verify else 'no'}.",
        ),
    )):  # fmt: skip
        function = option(function)
    return function


@verb(
    "save",
    fields=(*OUTCOME_FIELDS, *(field for field in PLAN_FIELDS if field not in OUTCOME_FIELDS)),
    examples=(
        ("ckpt hibernate save", "save all, several at a time; after a boot ckpt hibernate resume brings them back"),
        ("ckpt hibernate save --dry-run", "what would be saved, stopped and left, in which order, and what stands in the way"),
        ("ckpt hibernate save web db", "these two, whatever their labels say"),
        ("ckpt hibernate save --filter label=tier=back", "all that have this label"),
    ),
)
@save_options
@click.option("--at-shutdown", is_flag=True, help="The host goes down in any case (the unit says that): save what can be saved, ask nobody.")
def command(session: Session, at_shutdown: bool, **given: Any) -> int:
    """Save the workloads of this host and end them, so that they come back after its next boot.

    All of them are looked at first: what cannot be saved stops the whole before anything is touched (unless --best-effort), and so does too
    little space for all together. Then they are saved side by side, what others depend on last. What breaks in the middle, or Ctrl-C, brings
    back those that had ended.

    A container's label ckpt.reboot=save, stop or ignore says what becomes of it; else /etc/ckpt/hibernate.toml does. What is named here is
    saved. A save that was killed is gone on with by the next one.
    """
    if at_shutdown and (given["targets"] or given["filters"] or given["dry_run"]):
        raise UsageError("--at-shutdown is about all that there is")
    wish, settings = make_wish(session, "shutdown" if at_shutdown else "manual", given)
    if given["dry_run"]:
        return show_plan(session, wish, settings)
    from ckpt.ops.hibernate import save as use_case

    return show_saved(session, use_case.save(wish, settings=settings, store_root=session.store_root, emit=session.emit), wish)


def make_wish(session: Session, kind: Kind, given: dict[str, Any]) -> tuple[Wish, HibernateSettings]:
    """What the options say. Raises UsageError, ConfigError, PermissionDenied."""
    targets: tuple[str, ...] = given["targets"]
    if targets and (given["every"] or given["filters"]):
        raise UsageError("name targets, or give --all or --filter, not both")
    if any(not name.strip() for name in targets):
        raise UsageError("an empty name is no target")
    session.need_root()
    from ckpt.ops.hibernate.plan import Wish
    from ckpt.ops.hibernate.settings import load

    wish = Wish(
        tuple(Target.parse(target) for target in targets), given["filters"], kind, given["best_effort"], given["parallel"], given["timeout_s"],
        given["verify"],
    )  # fmt: skip
    return wish, load()


def show_plan(session: Session, wish: Wish, settings: HibernateSettings) -> int:
    """`--dry-run`: the plan as a table, and the exit status that the save would begin with."""
    from ckpt.ops.hibernate.plan import plan, refusal
    from ckpt.store.catalog import Catalog

    made = plan(wish, settings, Catalog(session.store_root), session.emit)
    said = refusal(made)
    code = 0 if said is None else DoneWithWarnings.exit_code if wish.lenient else said.exit_code
    session.reporter.show(plan_rows(made), table=plan_lines, exit_code=code)
    if said is not None:
        session.reporter.error(said)
    return code


def plan_rows(made: Plan) -> list[Row]:
    """Each workload, in the order in which they are saved."""
    rows: list[Row] = []
    items = {item.target: item for item in made.items()}
    for number, layer in enumerate(reversed(made.layers), 1):
        for target in layer:
            item, error, looked = items[target], made.problems.get(target), made.looks.get(target)
            rows.append({
                "name": target, "id": item.container_id, "ok": error is None, "action": item.action, "layer": number, "after": list(item.after),
                "units": list(item.units), "group": item.group, "needed_bytes": looked.needed_bytes if looked else 0,
                "error": error.to_json() if error else None,
            })  # fmt: skip
    return rows


def plan_lines(rows: Sequence[Row]) -> Iterable[str]:
    body = [
        (
            str(row["layer"]), row["name"], row["action"], size(row["needed_bytes"]) if row["needed_bytes"] else "", ", ".join(row["after"]),
            ", ".join(row["units"]), row["error"]["message"] if row["error"] else "",
        )
        for row in rows
    ]  # fmt: skip
    return columns(("STEP", "TARGET", "ACTION", "UP TO", "COMES BACK AFTER", "UNITS", "WHAT IS IN THE WAY"), body)


def show_saved(session: Session, saved: Saved, wish: Wish) -> int:
    """The outcomes, one name a line; what failed is told on stderr."""
    rows = [outcome_row(outcome, id_of="checkpoint") for outcome in saved.outcomes]
    code = exit_code(saved.outcomes)
    if code and wish.lenient:
        code = DoneWithWarnings.exit_code
    machine = session.reporter.kind in ("json", "jsonl")
    session.reporter.show(rows if machine else [row for row in rows if row["ok"]], table=lambda shown: [row["name"] for row in shown], exit_code=code)
    for outcome in saved.outcomes:
        if outcome.error is not None:
            session.reporter.error(outcome.error)
    return code
