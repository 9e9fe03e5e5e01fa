"""A workload, or a group, comes from another host with nothing but this host's own ssh to it.

`ckpt migrate` is started there and a `ckpt peer` here, and the two are put together (peer/inherited.py): so the other host needs no way to
this one, no key and no port. A single workload's link is the standard input and output of the migration. A group has a link for each member:
its migration tells of a socket, and for each member an ssh of its own starts a `ckpt peer --join` there that hands its ends over.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ckpt.errors import CannotConnect, StateUnknown
from ckpt.events import Emit, Figures
from ckpt.host.run import DEVNULL, CommandFailed, Process, spawn
from ckpt.host.run import PIPE as FROM_HERE
from ckpt.ops import children
from ckpt.transports import ssh

_LEAVE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Fetch:
    """How to fetch. `allow`: what may be here beyond this host's policy."""

    ssh_options: tuple[str, ...]
    allow: tuple[str, ...]
    root: Path

    def single(self, destination: str, words: Sequence[str], name: str, *, emit: Emit) -> children.Ended:
        """Run `ckpt migrate --stdio` there with these words.

        Raises:
            CannotConnect: a program could not be started here.
        """
        ends = _Ends()
        try:
            process, peer = self._put_together(destination, ["ckpt", "migrate", "--stdio", "--format", "jsonl", *words], stderr=FROM_HERE)
            ends.peers.append(peer)
            ended = _followed(process, emit)
        finally:
            ends.leave()
        return _judged(ended, destination, name)

    def group(self, destination: str, words: Sequence[str], targets: Sequence[str], *, emit: Emit) -> children.Ended:
        """Run `ckpt migrate --group` there with these words, for these targets; a result for each.

        Raises:
            CannotConnect: a program could not be started here.
        """
        ends = _Ends()

        def bring(path: str) -> None:
            for _ in targets:
                with suppress(CannotConnect):  # the migration there waits for it in vain, and says so
                    link, peer = self._put_together(destination, ["ckpt", "peer", "--join", path, "--both"], stderr=DEVNULL)
                    ends.links.append(link)
                    ends.peers.append(peer)

        def hear(event: Any) -> None:
            path = event.values.get("links") if isinstance(event, Figures) else None
            if isinstance(path, str) and not ends.links:
                bring(path)
                return
            emit(event)

        argv = ["ckpt", "migrate", "--format", "jsonl", *words, "--links", str(len(targets)), "--", *targets]
        try:
            process = self._spawn(destination, argv, stdin=DEVNULL, stdout=FROM_HERE, stderr=FROM_HERE)
            ended = _followed(process, hear)
        finally:
            ends.leave()
        return _judged(ended, destination, "the group")

    def _put_together(self, destination: str, argv: Sequence[str], *, stderr: int) -> tuple[Process, Process]:
        """A program there whose standard input and output are those of a `ckpt peer` here."""
        from_there, to_here = os.pipe()
        from_here, to_there = os.pipe()
        words = ["peer", "--guest", *(word for one in self.allow for word in ("--allow", one)), "--store", str(self.root)]
        try:
            with os.fdopen(from_there, "rb") as inp, os.fdopen(to_there, "wb") as out, open(os.devnull, "wb") as null:
                # Whoever is root there need not be root here: what comes is judged by this host's policy.
                peer = children.start(words, stdin=inp, stdout=out, stderr=null)
        except CommandFailed as error:
            os.close(to_here)
            os.close(from_here)
            raise CannotConnect(f"cannot fetch from {destination}: {error.reason}") from error
        try:
            with os.fdopen(from_here, "rb") as inp, os.fdopen(to_here, "wb") as out:
                return self._spawn(destination, argv, stdin=inp, stdout=out, stderr=stderr), peer
        except CannotConnect:
            peer.wait()  # it has no other end
            raise

    def _spawn(self, destination: str, argv: Sequence[str], **streams: Any) -> Process:
        try:
            return spawn(ssh.argv(destination, argv, self.ssh_options, batch=True), new_session=True, **streams)
        except CommandFailed as error:
            raise CannotConnect(f"cannot fetch from {destination}: {error.reason}") from error


@dataclass(slots=True)
class _Ends:
    """The processes beside the migration, which end with it."""

    links: list[Process] = field(default_factory=list)
    peers: list[Process] = field(default_factory=list)

    def leave(self) -> None:
        """See them gone: the links first, since a peer ends when its link has."""
        threads = [threading.Thread(target=_see_off, args=(one,), daemon=True) for one in (*self.links, *self.peers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _followed(process: Process, emit: Emit) -> children.Ended:
    try:
        return children.follow(process, emit=emit, stopped=lambda: False)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _see_off(process: Process) -> None:
    until_s = time.monotonic() + _LEAVE_S
    while process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.02)
    if process.poll() is None:
        process.terminate()
    process.wait()


def _judged(ended: children.Ended, destination: str, name: str) -> children.Ended:
    if ended.row:
        return ended
    if ended.job:
        lost = f"the ckpt on {destination} ended before it said what became of {name}"
        return replace(ended, error=StateUnknown(lost, hint="ckpt undrain, once more"))
    if ended.returncode in (255, 127):
        return replace(ended, error=ssh.explain(destination, ended.returncode, ended.said))
    return ended
