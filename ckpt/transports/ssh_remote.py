"""Plain commands on a host over ssh, for destinations that have no ckpt."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final, cast

from ckpt.errors import TransferFailed
from ckpt.host.run import CommandFailed, Result, run
from ckpt.transports import ssh

RUN_LIMIT_S: Final = 60.0
END_LIMIT_S: Final = 300.0


class Remote:
    """A host that is reached by one ssh a command."""

    def __init__(self, destination: ssh.Destination, options: Sequence[str] = ()) -> None:
        self.destination = destination
        self.options = tuple(options)

    def run(self, argv: Sequence[str], *, check: bool = True, timeout_s: float = RUN_LIMIT_S) -> Result:
        """Run a command there to its end; ssh's own failure is exit status 255.

        Raises:
            CommandFailed: over time, or (with `check`) a non-zero exit.
        """
        return run(ssh.argv(self.destination, argv, self.options), check=check, timeout_s=timeout_s)

    def send(self, argv: Sequence[str], write: Callable[[BinaryIO], int]) -> int:
        """Run a command there with what `write` writes as its standard input; returns what `write` returns.

        Raises:
            TransferFailed: the link broke, or the command failed.
        """
        process = ssh.open(self.destination, argv, self.options)
        assert process.stdin is not None and process.stderr is not None and process.stdout is not None
        try:
            try:
                count = write(cast(BinaryIO, process.stdin))
                process.stdin.close()
            except OSError as error:
                raise TransferFailed(f"lost the link to {self.destination}: {error.strerror}") from error
            process.wait(END_LIMIT_S)
            if process.returncode != 0:
                said = process.stderr.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
                raise TransferFailed(f"{shlex.join(argv)} failed on {self.destination}: {said or process.returncode}")
            return count
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


__all__ = ["CommandFailed", "Remote"]
