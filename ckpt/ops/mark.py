"""What people write down about checkpoints: tags, notes, pins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt.errors import CkptError, UsageError
from ckpt.model import Entry
from ckpt.ops.result import Outcome, failure
from ckpt.store import entry as entries
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT


def tag(refs: Sequence[str], add: Sequence[str], remove: Sequence[str], *, store_root: Path = DEFAULT_ROOT) -> list[Outcome]:
    """Add and remove tags. A tag may be on several checkpoints; NAME@TAG is the newest that has it.

    Raises:
        UsageError: nothing to do, or a text that cannot be a tag.
    """
    if not add and not remove:
        raise UsageError("which tags?", hint="--add TAG, --remove TAG")
    check(add)

    def change(entry: Entry) -> Entry:
        tags = [text for text in dict.fromkeys([*entry.tags, *add]) if text not in remove]
        if len(tags) > entries.MAX_TAGS:
            raise UsageError(f"a checkpoint has at most {entries.MAX_TAGS} tags")
        return replace(entry, tags=tuple(tags))

    return _change(refs, change, store_root)


def check(tags: Sequence[str], note: str = "") -> None:
    """Raise UsageError for a text that cannot be a tag, or a note."""
    for text in tags:
        entries.check_tag(text)
        if text == "latest" or text.isdigit():
            raise UsageError(f"{text!r} cannot be a tag: NAME@{text} means something already")
    entries.check_note(note)


def made(outcomes: Sequence[Outcome], tags: Sequence[str], note: str, *, store_root: Path = DEFAULT_ROOT) -> list[Outcome]:
    """Mark the checkpoints that were just made. One that cannot be marked is a warning: it is safe in the store."""
    catalog, marked = Catalog(store_root), []
    for outcome in outcomes:
        if outcome.checkpoint is not None:
            try:
                found = catalog.amend(outcome.checkpoint, lambda entry: replace(entry, tags=tuple(dict.fromkeys(tags)), note=note))
                outcome = replace(outcome, checkpoint=found)
            except CkptError as error:
                outcome = replace(outcome, warnings=(*outcome.warnings, f"not marked: {error.message}"))
        marked.append(outcome)
    return marked


def note(refs: Sequence[str], text: str, *, store_root: Path = DEFAULT_ROOT) -> list[Outcome]:
    """Write a note down, in place of the one that was there; "" removes it. Raises UsageError for a text that cannot be one."""
    entries.check_note(text)
    return _change(refs, lambda entry: replace(entry, note=text), store_root)


def pin(refs: Sequence[str], pinned: bool, *, store_root: Path = DEFAULT_ROOT) -> list[Outcome]:
    """Keep checkpoints from being removed, or no longer."""
    return _change(refs, lambda entry: replace(entry, pinned=pinned), store_root)


def _change(refs: Sequence[str], change: Callable[[Entry], Entry], store_root: Path) -> list[Outcome]:
    catalog = Catalog(store_root)
    found, outcomes = [], []
    for ref in refs:
        try:
            found.append((ref, catalog.find(ref)))
        except CkptError as error:
            outcomes.append(failure(ref, error))
    if outcomes:
        return outcomes  # a mistyped name: nothing is changed
    for ref, checkpoint in found:
        try:
            outcomes.append(Outcome(ref, True, catalog.amend(checkpoint, change)))
        except CkptError as error:
            outcomes.append(failure(ref, error))
    return outcomes
