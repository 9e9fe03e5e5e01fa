"""What a hibernation would do, found out before anything is touched: who, in which order, what stands in the way, and the space for all."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial

from ckpt.engines.base import Startable
from ckpt.errors import CkptError, DumpFailed, FeatureMissing, NoSpace
from ckpt.events import Emit, Notice, StepDone, StepStarted
from ckpt.host import facts as host_facts
from ckpt.model import DumpOptions, Target
from ckpt.ops import check as checks
from ckpt.ops import consent, filling
from ckpt.ops.compat import size_text
from ckpt.ops.hibernate import guards, order
from ckpt.ops.hibernate.selection import Chosen, Selection, select
from ckpt.ops.hibernate.settings import HibernateSettings
from ckpt.ops.parallel import run_all
from ckpt.store.catalog import Catalog
from ckpt.store.hibernation import Item, Kind

LOOKS: int = 4
"""How many workloads are looked at at a time."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for."""

    targets: tuple[Target, ...] = ()
    """() for all that there is."""
    filters: tuple[str, ...] = ()
    kind: Kind = "manual"
    best_effort: bool = False
    """What can be saved is saved, whatever becomes of the others."""
    parallel: int | None = None
    timeout_s: float | None = None
    """For all together. None of these two: as the file says."""
    verify: bool = False
    """Read back all that was stored before the workload ends."""

    @property
    def at_shutdown(self) -> bool:
        """The host goes down in any case: nobody can be asked, and nothing be mended."""
        return self.kind == "shutdown"

    @property
    def lenient(self) -> bool:
        return self.best_effort or self.at_shutdown


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done."""

    selection: Selection
    after: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layers: tuple[tuple[str, ...], ...] = ()
    """Targets; what others come after is in an earlier layer."""
    looks: dict[str, checks.Looked] = field(default_factory=dict)
    problems: dict[str, CkptError] = field(default_factory=dict)
    """Why it cannot be done, by target."""
    needed_bytes: int = 0

    @property
    def chosen(self) -> dict[str, Chosen]:
        return {one.target: one for one in self.selection.chosen}

    def items(self) -> tuple[Item, ...]:
        """As the journal keeps them, in the order in which they come back."""
        chosen = self.chosen
        names = [target for layer in self.layers for target in layer]
        return tuple(chosen[target].item(self.after[target], guards.owned(chosen[target].container)) for target in names)


def plan(wish: Wish, settings: HibernateSettings, catalog: Catalog, emit: Emit, *, leave: Collection[str] = ()) -> Plan:
    """Find out what would be done. Touches nothing.

    Args:
        leave: ids of containers that are not meant, whatever else says so (they are saved already).

    Raises:
        UsageError, TargetNotFound, EngineUnavailable: the wish makes no sense.
    """
    default = settings.on_shutdown if wish.at_shutdown else "save"
    selection = select(wish.targets, filters=wish.filters, settings=settings, default=default, lenient=wish.at_shutdown)
    for text in selection.notices:
        emit(Notice("", text, warning=True))
    selection = replace(selection, chosen=tuple(one for one in selection.chosen if one.container.id not in leave))
    after = order.edges(selection, lenient=wish.at_shutdown)
    layers = tuple(tuple(layer) for layer in order.layers(after))
    made = Plan(selection, after, layers)
    return look(made, settings, catalog, emit)


def look(made: Plan, settings: HibernateSettings, catalog: Catalog, emit: Emit) -> Plan:
    """The same, with each workload looked at."""
    options = DumpOptions(timeout_s=settings.save_timeout_s)
    save = [one for one in made.selection.chosen if one.action == "save"]
    emit(StepStarted("", "check", f"{len(save)} workloads"))
    found = run_all({one.target: partial(checks.look_over, one.engine, one.container, options) for one in save}, width=LOOKS)
    looks: dict[str, checks.Looked] = {}
    problems: dict[str, CkptError] = {}
    for target, looked in found.items():
        if isinstance(looked, CkptError):
            problems[target] = looked
        elif isinstance(looked, BaseException):
            raise looked
        else:
            looks[target] = looked
            try:
                brought = filling.wanting(catalog.root, made.chosen[target].container.pid or 0) is not None  # before it is saved
                checks.raise_on_error(target, [one for one in looked.findings if not (brought and one.check == checks.ARRIVING)])
            except CkptError as error:
                if not prepares(made.chosen[target]):
                    problems[target] = error
    for one in made.selection.chosen:
        if one.action == "stop" and not isinstance(one.engine, Startable):
            hint = "label it ckpt.reboot=ignore, and stop it yourself"
            problems[one.target] = FeatureMissing(f"{one.target} cannot be stopped: {one.engine.name} does not do that", hint=hint)
    _space(looks, problems, catalog)
    emit(StepDone("", "check", f"{len(problems)} cannot be saved" if problems else ""))
    return replace(made, looks=looks, problems=problems, needed_bytes=sum(one.needed_bytes for one in looks.values()))


def prepares(one: Chosen) -> bool:
    """Whether it has a command that makes it ready for a dump: what stands in the way now may be gone then."""
    try:
        return "pre-checkpoint" in consent.labels(one.container).hooks
    except CkptError:
        return False


def _space(looks: dict[str, checks.Looked], problems: dict[str, CkptError], catalog: Catalog) -> None:
    """What does not fit any more beside those before it is a problem."""
    free = host_facts.free_bytes(catalog.root)
    needed = sum(looked.needed_bytes for target, looked in looks.items() if target not in problems)
    if not free or needed <= free:
        return
    left = free
    for target in sorted(looks, key=lambda target: looks[target].needed_bytes):
        if target in problems:
            continue
        if looks[target].needed_bytes > left:
            said = f"up to {size_text(needed)} needed in {catalog.root} for all together, {size_text(free)} free"
            problems[target] = NoSpace(f"{target} cannot be saved: {said}", hint="ckpt prune, or another --store")
        else:
            left -= looks[target].needed_bytes


def refusal(made: Plan) -> DumpFailed | None:
    """All problems in one message."""
    if not made.problems:
        return None
    count, errors = len(made.looks) or len(made.selection.chosen), list(made.problems.values())
    listed = "\n  ".join(f"{error.message}{f' ({error.hint})' if error.hint else ''}" for error in errors)
    return DumpFailed(
        f"{len(errors)} of {max(count, len(errors))} workloads cannot be saved:\n  {listed}",
        where="nothing was touched, all of them run on",
        hint="mend that, leave them out (label ckpt.reboot=stop or ignore, or in hibernate.toml), or give --best-effort",
    )
