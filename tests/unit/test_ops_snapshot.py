"""Chains of snapshots, over the fake engine: what is missing, exchanged, changed or out of order is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt.archive import layout, signature, trust
from ckpt.archive import manifest as manifest_file
from ckpt.errors import BusyError, DigestMismatch, PolicyRefused, TargetNotFound, UsageError
from ckpt.events import ignore
from ckpt.model import DumpOptions, Target
from ckpt.ops.prune import prune
from ckpt.ops.result import Outcome
from ckpt.ops.rm import rm
from ckpt.ops.snapshot import snapshot, verify_chain
from ckpt.store import chain
from ckpt.store.catalog import Catalog
from ckpt.store.retention import Rules
from tests.contract import fake

OPTIONS = DumpOptions(tcp_established=False, file_locks=False, shell_job=False)


class World:
    def __init__(self, directory: Path, engine: fake.FakeEngine) -> None:
        self.engine, self.root = engine, directory / "store"
        self.outgoing, self.incoming = trust.OPEN, trust.ANYBODY

    def snap(self, case: str | None = None, reason: str = "INC-123", **options: object) -> Outcome:
        chosen = replace(OPTIONS, **options)  # type: ignore[arg-type]
        (outcome,) = snapshot(
            [Target("web")], reason=reason, case=case, command="ckpt snapshot web", options=chosen, outgoing=self.outgoing,
            store_root=self.root, emit=ignore,
        )  # fmt: skip
        return outcome

    def problems(self, case: str = "web") -> str:
        outcome = verify_chain(case, incoming=self.incoming, store_root=self.root, emit=ignore)
        assert outcome.ok == (not outcome.stats["problems"])
        assert outcome.ok or (isinstance(outcome.error, DigestMismatch) and outcome.error.exit_code == 31)
        return str(outcome.stats["problems"])

    def directory(self, ref: str) -> Path:
        return Catalog(self.root).find(ref).directory


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "world").mkdir()
    made = World(tmp_path, fake.install(tmp_path / "world", monkeypatch.setattr))
    made.engine.start("web", labels={"ckpt.hook.pre-checkpoint": "false"})
    yield made
    made.engine.end_all()


@pytest.fixture
def signed(world: World, tmp_path: Path) -> World:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True, timeout=30)
    (tmp_path / "signers").write_text("examiner " + (tmp_path / "key.pub").read_text())
    world.outgoing = trust.Outgoing(sign_key=tmp_path / "key")
    world.incoming = trust.Incoming(demand=signature.Demand(tmp_path / "signers"))
    return world


def test_who_when_and_why_are_in_the_manifest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    first, second = world.snap(), world.snap()
    assert first.checkpoint and second.checkpoint
    found = second.checkpoint.manifest.evidence
    assert found and (found.case, found.number, found.reason, found.operator) == ("web", 2, "INC-123", "alice")
    assert found.previous == first.stats["digest"] and found.previous_id == first.checkpoint.manifest.id
    assert found.command == "ckpt snapshot web" and found.taken_s > 0
    assert second.checkpoint.entry.pinned and world.engine.describe(world.engine.containers()[0]).state == "running"
    data = (second.checkpoint.directory / layout.MANIFEST).read_bytes()
    assert manifest_file.loads(data).evidence == found
    assert world.problems() == ""


def test_neither_prune_nor_rm_takes_it(world: World) -> None:
    for _ in range(3):
        world.snap()
    (refused,) = rm(["web@1"], store_root=world.root, emit=ignore)
    assert isinstance(refused.error, BusyError)
    prune([], Rules(keep_last=1), store_root=world.root, emit=ignore)
    assert world.problems() == ""


def test_signed_by_whom(signed: World) -> None:
    signed.snap()
    signed.snap()
    outcome = verify_chain("web", incoming=signed.incoming, store_root=signed.root, emit=ignore)
    assert outcome.ok and outcome.stats["signature"] == "examiner" and outcome.stats["number"] == 2
    (signed.directory("web@1") / layout.SIGNATURE).unlink()
    assert "number 1 (web@1): the checkpoint is not signed" in signed.problems()


@pytest.mark.parametrize("which", [1, 2, 3])
def test_one_is_missing(world: World, which: int) -> None:
    """Also the last one, which nobody follows."""
    for _ in range(3):
        world.snap()
    identity = world.directory(f"web@{which}").name
    shutil.rmtree(world.directory(f"web@{which}"))
    found = world.problems()
    assert f"number {which} ({identity}" in found and "is missing" in found
    assert found.count(";") == 0


@pytest.mark.parametrize("what", ["places", "names"])
def test_two_are_exchanged(world: World, what: str) -> None:
    for _ in range(3):
        world.snap()
    one, two = world.directory("web@1"), world.directory("web@2")
    if what == "places":
        one.rename(spare := one.with_name("spare"))
        two.rename(one)
        spare.rename(two)
    else:
        for directory, generation in ((one, 2), (two, 1)):
            entry = json.loads((directory / "entry.json").read_text())
            (directory / "entry.json").write_text(json.dumps(entry | {"generation": generation}))
    assert "exchanged" in world.problems()


def test_one_is_replaced_by_another_of_the_same_number(world: World) -> None:
    """Whoever can write to the store makes a fitting manifest and entry: the one that follows names another digest."""
    for _ in range(2):
        world.snap()
    directory = world.directory("web@1")
    manifest = Catalog(world.root).find("web@1").manifest
    assert manifest.evidence
    _rewrite(directory, manifest_file.dumps(replace(manifest, evidence=replace(manifest.evidence, reason="nothing to see"))))
    found = world.problems()
    assert "number 1 (web@1) is not the one that was taken" in found and "number 2 (web@2) does not follow number 1" in found
    (world.root / "evidence" / "web.jsonl").unlink()
    assert "number 2 (web@2) does not follow number 1" in world.problems()


def test_a_changed_manifest_and_changed_content(world: World) -> None:
    for _ in range(2):
        world.snap()
    path = world.directory("web@1") / layout.MANIFEST
    path.write_bytes(path.read_bytes().replace(b"INC-123", b"INC-124"))
    assert "number 1" in world.problems() and "cannot be read" in world.problems()
    path = world.directory("web@2") / layout.CONFIG
    path.write_bytes(path.read_bytes() + b" ")
    assert "number 2 (web@2): config.dump" in world.problems()


def test_renumbered(world: World) -> None:
    for _ in range(2):
        world.snap()
    (world.root / "evidence" / "web.jsonl").unlink()
    directory, manifest = world.directory("web@1"), Catalog(world.root).find("web@1").manifest
    assert manifest.evidence
    _rewrite(directory, manifest_file.dumps(replace(manifest, evidence=replace(manifest.evidence, number=3))))
    found = world.problems()
    assert "number 1 is missing" in found and "number 3 (web@1) does not follow number 2" in found


def _rewrite(directory: Path, data: bytes) -> None:
    (directory / layout.MANIFEST).write_bytes(data)
    entry = json.loads((directory / "entry.json").read_text())
    entry["manifest_digest"] = layout.digest_file(directory / layout.MANIFEST)
    (directory / "entry.json").write_text(json.dumps(entry))


def test_killed_between_the_store_and_the_list(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.snap()
    monkeypatch.setattr(chain, "add", lambda *args: None)
    world.snap()
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        fake.install(world.engine.world, patch.setattr)
        third = world.snap()
    assert third.stats["number"] == 3
    assert world.problems() == ""
    with (world.root / "evidence" / "web.jsonl").open("a") as out:
        out.write('{"number": 4, "id"')  # the power went
    assert world.problems() == ""


def test_cases_are_chains_of_their_own(world: World) -> None:
    world.snap()
    other = world.snap(case="INC-7")
    assert other.stats["number"] == 1
    assert world.problems("INC-7") == world.problems("web") == ""
    with pytest.raises(TargetNotFound) as caught:
        world.problems("INC-8")
    assert "INC-7" in (caught.value.hint or "")


@pytest.mark.parametrize(("case", "reason"), [("a/b", "x"), ("..", "x"), ("", "x"), (None, " "), (None, "a\nb"), (None, "x" * 1001)])
def test_what_cannot_be_a_case_or_a_reason(world: World, case: str | None, reason: str) -> None:
    with pytest.raises(UsageError):
        world.snap(case=case, reason=reason)
    assert Catalog(world.root).all() == []


def test_a_label_forbids_it_and_may_be_overridden(world: World) -> None:
    world.engine.end_all()
    shutil.rmtree(world.engine.world)
    os.mkdir(world.engine.world)
    world.engine.start("web", labels={"ckpt.checkpoint": "deny"})
    assert isinstance(world.snap().error, PolicyRefused)
    assert world.snap(override_label=True).ok
