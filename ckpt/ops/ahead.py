"""The files go over while the workload runs: root file system and named volumes, in rounds; in the pause only what changed since.

On the destination a volume is filled at its final place (made by this migration, journalled, removed when it is undone); what belongs to
the root file system is kept beside the checkpoint until there is a container to bring it to.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from ckpt.archive import layout, rootfs
from ckpt.archive.tree_send import PieceStream, TreeSource
from ckpt.events import BytesMoved, Emit, StepDone
from ckpt.model import Container
from ckpt.ops import faults
from ckpt.peer.client import Peer

VERB: Final = "tree"
MEMBER: Final = "tree"
MAX_ROUNDS: Final = 4
ENOUGH_BYTES: Final = 4 << 20
"""A round that sent no more than this is the last one for now."""
GAIN: Final = 0.5
"""So is one that sent more than this part of what the one before did: the workload writes as fast as the link carries."""


@dataclass(slots=True)
class _Part:
    """One tree: how people and the protocol call it."""

    label: str
    args: dict[str, Any]
    source: TreeSource


class FilesAhead:
    """The files of one migration.

    Args:
        typed: what events name as their target.
    """

    def __init__(self, peer: Peer, container: Container, *, ignore_volumes: bool, typed: str, emit: Emit) -> None:
        self._peer = peer
        self._typed = typed
        self._emit = emit
        self._parts: list[_Part] = []
        self._rootfs: TreeSource | None = None
        if container.rootfs.upper_dir is not None or container.rootfs.merged_dir is not None:
            self._rootfs = TreeSource(lambda live: rootfs.survey(container.rootfs, live=live))
            self._parts.append(_Part("root file system", {}, self._rootfs))
        for volume in () if ignore_volumes else container.volumes:
            self._parts.append(_Part(f"volume {volume.name}", {"volume": volume.name}, TreeSource(partial(_look, volume.source_dir))))
        self.rounds = 0
        self.ahead_bytes = 0
        """Sent while the workload ran."""
        self.paused_bytes = 0
        """Sent while it was frozen."""

    def ahead(self) -> None:
        """Rounds, until there is little left or nothing is gained. Call it again when much time has passed since.

        Raises:
            CkptError: the files cannot be read; what the destination raised.
        """
        before = 0
        for _ in range(MAX_ROUNDS if self._parts else 0):
            sent = self._round()
            if sent <= ENOUGH_BYTES or (before and sent > GAIN * before):
                return
            before = sent

    def _round(self) -> int:
        faults.point(f"migrate-files-round-{self.rounds}")
        began = self.ahead_bytes
        for part in self._parts:
            self.ahead_bytes += self._send(part, final=False, step="files")
        self.rounds += 1
        return self.ahead_bytes - began

    def finish(self, stage: Path) -> None:
        """What changed since the last round, with the workload frozen; `deleted.files` is written to the stage.

        Raises:
            CkptError, NoSpace: something could not be read, or written over there.
        """
        for part in self._parts:
            began = time.monotonic()
            sent = self._send(part, final=True, step="capture")
            self.paused_bytes += sent
            self._emit(StepDone(self._typed, part.label, f"{sent / (1 << 20):.1f} MiB in the pause", time.monotonic() - began))
        if self._rootfs is not None:
            rootfs.write_deleted(self._rootfs.deleted, stage / layout.DELETED_FILES)

    def _send(self, part: _Part, *, final: bool, step: str) -> int:
        above = self.ahead_bytes if step == "files" else self.paused_bytes
        with self._peer.upload(VERB, {**part.args, "final": final}) as upload:
            upload.send_stream(
                MEMBER,
                PieceStream(part.source.round(live=not final)),
                on_bytes=lambda done: self._emit(BytesMoved(self._typed, step, above + done)),
                digest=False,
            )
        return upload.done_bytes


def _look(directory: Path, live: bool) -> rootfs.Survey:
    return rootfs.survey_tree(directory, live=live)
