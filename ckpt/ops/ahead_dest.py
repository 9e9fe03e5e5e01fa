"""The destination's side of `ahead`: trees that are kept as the source's are, until the workload is restored on them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from ckpt.archive import layout, tree_receive
from ckpt.archive.tree_receive import TreeWriter
from ckpt.engines.base import CarriesVolumes, Engine
from ckpt.errors import FeatureMissing, TransferFailed, UsageError
from ckpt.model import Manifest
from ckpt.ops import faults
from ckpt.ops.ahead import MEMBER
from ckpt.peer.server import Session
from ckpt.store.job import Job

ROOTFS: Final = "rootfs"
"""The directory beside the checkpoint's members that holds what becomes part of the root file system."""
_VOLUME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")
_MAX_TREES: Final = 1000


class Trees:
    """The trees of one migration. Close it before anything that it writes to is removed, or used."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine = engine
        self._job = job
        self._writers: dict[str, TreeWriter] = {}
        self._places: dict[str, tuple[Path, os.stat_result]] = {}
        self._whole: set[str] = set()
        self._settled = False
        """The root file system is followed in the container's own root."""

    def receive(self, session: Session, stage: Path, args: dict[str, Any]) -> None:
        """One round of one tree: `volume` names it, without one it is the root file system; `final`: after it the tree is whole.

        Raises:
            UsageError, FeatureMissing: there is no such tree here.
            BusyError: the volume exists here.
            ArchiveInvalid, NoSpace, RestoreFailed, TransferFailed: it did not all come to where it belongs.
        """
        name = "" if args.get("volume") is None else str(args["volume"])
        writer = self._writers.get(name) or self._begin(name, stage)
        self._whole.discard(name)
        try:
            session.receive_files(stage, allow=lambda path: path == MEMBER, sinks={MEMBER: writer.sink})
        except BrokenPipeError:
            writer.finish()  # it takes no more, and tells why
            raise
        writer.finish()
        faults.point("destination-tree")
        if args.get("final"):
            self._whole.add(name)

    def _begin(self, name: str, stage: Path) -> TreeWriter:
        if name:
            if not _VOLUME.fullmatch(name) or len(self._writers) >= _MAX_TREES:
                raise UsageError(f"{name!r} cannot be the name of a volume")
            if not hasattr(self._engine, "make_volume"):
                raise FeatureMissing(f"{self._engine.name} has no volumes here")
            directory = cast(CarriesVolumes, self._engine).make_volume(self._job, name)
        else:
            directory = stage / ROOTFS
            directory.mkdir(mode=0o700)
        self._places[name] = directory, directory.stat()
        writer = self._writers[name] = TreeWriter(directory)
        return writer

    def settle(self, stage: Path, root: Path) -> None:
        """The container's root is mounted: bring what came so far, and follow what changes in it from now on.

        Raises:
            ArchiveInvalid, NoSpace, RestoreFailed: as `tree_receive.copy`.
        """
        if "" in self._writers:
            tree_receive.copy(stage / ROOTFS, Path(os.devnull), root)
            self._follow(root)
            self._settled = True

    def unsettle(self, stage: Path) -> None:
        """That root goes. What came before it did is still in the stage, the rest has not been sent yet."""
        if self._settled:
            if "" in self._whole:
                raise UsageError("the root file system is whole already")
            self._follow(stage / ROOTFS)
            self._settled = False

    def fill(self, stage: Path) -> Callable[[Path], None]:
        """What brings the root file system that arrived to a mounted root."""

        def fill(root: Path) -> None:
            if "" in self._places and not self._settled:
                tree_receive.copy(stage / ROOTFS, stage / layout.DELETED_FILES, root)

        return fill

    def _follow(self, directory: Path) -> None:
        self._writers[""].close()
        self._writers[""] = TreeWriter(directory)
        self._places[""] = directory, directory.stat()

    def check(self, manifest: Manifest, *, ignore_volumes: bool) -> None:
        """Raise TransferFailed unless every tree that was begun, and every volume, is whole and still there."""
        wanted = {*self._writers, *(() if ignore_volumes else (name for name, _ in manifest.volumes))}
        if missing := sorted(wanted - self._whole):
            raise TransferFailed(f"{_said(missing[0])} did not all arrive")
        for name, (directory, facts) in self._places.items():
            if not directory.is_dir() or not os.path.samestat(directory.stat(), facts):
                raise TransferFailed(f"{_said(name)} arrived, and was removed since")

    def close(self) -> None:
        """End what writes. Idempotent."""
        for writer in self._writers.values():
            writer.close()


def _said(name: str) -> str:
    return f"volume {name}" if name else "the root file system"
