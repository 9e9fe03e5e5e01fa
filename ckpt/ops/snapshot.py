"""Evidence: snapshots of a running workload that name each other, signed, and whether a chain of them is whole.

Nothing runs inside of the workload for it (no hooks), which goes on as soon as its memory is read: digests, signature and the disk come later.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from ckpt.archive import layout, trust
from ckpt.errors import CkptError, DigestMismatch, NoSpace, TargetNotFound, UsageError
from ckpt.events import Emit, Notice
from ckpt.model import Checkpoint, DumpOptions, Evidence, Manifest, Target
from ckpt.ops import checkpoint as saving
from ckpt.ops import faults, recover, resolve, warm
from ckpt.ops.result import Outcome, failure
from ckpt.store import chain
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.chain import Link
from ckpt.store.job import DEFAULT_ROOT

MAX_REASON: Final = 1000
MAX_COMMAND: Final = 2000
_CASE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)


def snapshot(
    targets: Sequence[Target],
    *,
    reason: str,
    case: str | None = None,
    command: str = "",
    options: DumpOptions,
    outgoing: trust.Outgoing = trust.OPEN,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> list[Outcome]:
    """Take a snapshot of each target; it runs on.

    Args:
        reason: why, in words.
        case: the chain that it continues; without it, one for each container's name.
        command: how it was asked for.
        outgoing: its key signs.

    Returns:
        An outcome each; `stats` have `case`, `number`, `digest` (of the link: worth writing down elsewhere) and `freeze_s`.

    Raises:
        UsageError: reason or case cannot be that; nothing was touched. CkptError: nothing could be begun at all.
    """
    reason = reason.strip()
    if not reason or len(reason) > MAX_REASON or not reason.isprintable():
        raise UsageError(f"a reason is 1 to {MAX_REASON} printable characters", hint="--reason INC-123")
    if case is not None and not _CASE.fullmatch(case):
        raise UsageError(f"{case[:64]!r} cannot be the name of a case", hint="letters, digits and _ . - , at most 100")
    if not targets:
        raise UsageError("name what to take a snapshot of")
    warm.imports(*warm.INTO_CHUNKS)
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    outgoing.try_key()
    if outgoing.sign_key is None:
        emit(Notice("", "it is not signed: whoever can write to the store can forge it (--sign KEY, or sign_key in the configuration)", warning=True))
    found = [(str(target), *resolve.resolve(target)) for target in targets]  # all of them, before the first one is frozen
    catalog = Catalog(store_root)
    chosen = replace(options, leave_running=True, hooks=False)
    outcomes: list[Outcome] = []
    for label, engine, container in found:
        evidence = Evidence(
            case or _case_of(container.name or container.id), 0, reason, 0.0, operator=_operator(), uid=_login_uid(), machine_id=_machine_id(),
            command=_clean(command)[:MAX_COMMAND],
        )  # fmt: skip
        link = _Linked(catalog, evidence, outgoing)
        try:
            outcome = saving.save(engine, container, label, chosen, catalog, emit, link.keep)
        except CkptError as error:
            outcome = failure(label, error)
        outcomes.append(outcome)
    return outcomes


class _Linked:
    """What makes a draft the next link of its chain."""

    def __init__(self, catalog: Catalog, evidence: Evidence, outgoing: trust.Outgoing) -> None:
        self.catalog = catalog
        self.evidence = evidence
        self.outgoing = outgoing

    def keep(self, draft: Draft, manifest: Manifest) -> tuple[Checkpoint | None, dict[str, float | int | str]]:
        case, root = self.evidence.case, self.catalog.root
        try:
            with chain.locked(root, case):
                last = _last(self.catalog, case)
                evidence = replace(
                    self.evidence, number=last.number + 1, previous=last.digest, previous_id=last.id, taken_s=manifest.created_s or time.time()
                )
                draft.pinned = True
                made = draft.commit(replace(manifest, evidence=evidence), sign=self.outgoing.signer())
                faults.point("snapshot-stored")
                link = Link(evidence.number, made.manifest.id, made.entry.manifest_digest, evidence.taken_s)
                chain.add(root, case, link)
        except OSError as error:
            raise NoSpace(f"the list of the case {case} cannot be written: {error.strerror}") from error
        signed = int(self.outgoing.sign_key is not None)
        return made, {"case": case, "number": link.number, "digest": link.digest, "signed": signed}


def _last(catalog: Catalog, case: str) -> Link:
    """The newest link: of the list, or of the store (ckpt died between the two)."""
    stored = [
        _link(one, one.manifest.evidence)
        for one in catalog.all()
        if one.manifest.evidence and one.manifest.evidence.case == case and not one.entry.foreign
    ]
    return max([*stored, *chain.read(catalog.root, case)], key=lambda link: link.number, default=Link(0, "", ""))


def _link(checkpoint: Checkpoint, evidence: Evidence) -> Link:
    return Link(evidence.number, checkpoint.manifest.id, digest(checkpoint), evidence.taken_s)


def digest(checkpoint: Checkpoint) -> str:
    """ "sha256:HEX" of a stored checkpoint's manifest, of its bytes as they are."""
    return layout.DIGEST_PREFIX + hashlib.sha256((checkpoint.directory / layout.MANIFEST).read_bytes()).hexdigest()


def verify_chain(case: str, *, incoming: trust.Incoming = trust.ANYBODY, store_root: Path = DEFAULT_ROOT, emit: Emit) -> Outcome:
    """Whether all snapshots of a case are there, whole, in their order, and follow each other.

    Args:
        incoming: whose signatures they must have; without a demand signatures are not looked at.

    Returns:
        The outcome; its error is a DigestMismatch that names the first that is not, `stats["problems"]` has all.

    Raises:
        TargetNotFound: there is no such case.
    """
    catalog = Catalog(store_root)
    began = time.monotonic()
    listing = catalog.listing()
    listed = {link.number: link for link in chain.read(store_root, case)} if _CASE.fullmatch(case) else {}
    there: dict[int, list[Checkpoint]] = {}
    for one in listing.checkpoints:
        if one.manifest.evidence is not None and one.manifest.evidence.case == case:
            there.setdefault(one.manifest.evidence.number, []).append(one)
    if not there and not listed:
        raise TargetNotFound(f"there is no chain of snapshots {case!r}", hint=_known(listing.checkpoints))
    unreadable = {broken.directory.name: broken.reason for broken in listing.broken}
    problems: list[str] = []
    signers: set[str] = set()
    before: Link | None = None
    last: Checkpoint | None = None
    for number in range(1, max([*there, *listed]) + 1):
        expected, here = listed.get(number), there.get(number, [])
        name = f"number {number}"
        if expected is not None and expected.id in unreadable:
            problems.append(f"{name} ({expected.id}) cannot be read: {unreadable[expected.id]}")
        elif not here:
            problems.append(f"{name}{f' ({expected.id}, {_clock(expected.taken_s)})' if expected else ''} is missing")
        fitting = [one for one in here if expected is None or digest(one) == expected.digest]
        if here and not fitting:
            problems.append(f"{name} ({here[0].ref}) is not the one that was taken: it was exchanged or changed")
        chosen = (fitting or here)[0] if here else None
        if chosen is None or chosen.manifest.evidence is None:
            before = expected
            continue
        now = _link(chosen, chosen.manifest.evidence)
        if number == 1 and chosen.manifest.evidence.previous:
            problems.append(f"{name} ({chosen.ref}) names one before it: it is not the first")
        elif number > 1 and (before is None or chosen.manifest.evidence.previous != before.digest):
            problems.append(f"{name} ({chosen.ref}) does not follow number {number - 1}: the one it names is another")
        if fitting and expected is not None and not chosen.entry.foreign and chosen.manifest.id != expected.id:
            problems.append(f"{name} ({chosen.ref}) was exchanged: it is in the place of {chosen.manifest.id}, and was taken as {expected.id}")
        if last is not None and last.manifest.name == chosen.manifest.name and last.manifest.generation >= chosen.manifest.generation:
            problems.append(f"{name} ({chosen.ref}) and number {number - 1} ({last.ref}) were exchanged, or are out of order")
        last = chosen
        if before is not None and now.taken_s < before.taken_s:
            problems.append(f"{name} ({chosen.ref}) was taken before number {number - 1}")
        try:
            if who := _judge(chosen, incoming):
                signers.add(who)
            problems += [f"{name} ({chosen.ref}): {text}" for text in catalog.check(chosen)[:3]]
        except CkptError as error:
            problems.append(f"{name} ({chosen.ref}): {error.message}")
        before = now
    count = max([*there, *listed])
    head = before.digest if before is not None else ""
    stats: dict[str, float | int | str] = {
        "case": case, "number": count, "digest": head, "signature": ", ".join(sorted(signers)), "problems": "; ".join(problems),
        "total_s": round(time.monotonic() - began, 3),
    }  # fmt: skip
    broken: CkptError | None = None
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        broken = DigestMismatch(f"the chain {case} is broken: {problems[0]}{more}", hint="--format json names all of it")
    return Outcome(case, not problems, error=broken, stats=stats)


def _judge(checkpoint: Checkpoint, incoming: trust.Incoming) -> str | None:
    if incoming.demand is None:
        return None
    demanded = replace(incoming, demand=replace(incoming.demand, local=True, required=True))
    return demanded.judge_stage(checkpoint.directory)


def _known(checkpoints: Sequence[Checkpoint]) -> str | None:
    cases = sorted({one.manifest.evidence.case for one in checkpoints if one.manifest.evidence is not None})
    return f"there are: {', '.join(cases[:8])}" if cases else "ckpt snapshot NAME --reason WHY begins one"


def _case_of(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("_.-")[:100] or "case"


def _login_uid() -> int:
    """Who logged in, whatever he became since (proc(5), loginuid); the real user where nobody logged in."""
    with suppress(OSError, ValueError):
        uid = int(Path("/proc/self/loginuid").read_text())
        if 0 <= uid < 0xFFFFFFFF:
            return uid
    return os.getuid()


def _operator() -> str:
    caller = os.environ.get("SUDO_USER", "")
    if caller:
        return _clean(caller)[:100]
    with suppress(KeyError):
        return pwd.getpwuid(_login_uid()).pw_name
    return str(_login_uid())


def _machine_id() -> str:
    with suppress(OSError):
        return _clean(Path("/etc/machine-id").read_text())[:64]
    return ""


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "at an unknown time"
