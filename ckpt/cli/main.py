"""The entry point: runs a verb and turns whatever comes back into an exit code.

Nothing heavy is imported at the top, so that `ckpt --version` and the peer start at once.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from ckpt import __version__
from ckpt.errors import SIGNAL_BASE, CkptError, NoSpace, PermissionDenied, UsageError

if TYPE_CHECKING:
    import click

_COMPLETE_VARIABLE = "_CKPT_COMPLETE"


class Interrupted(KeyboardInterrupt):
    """A signal that asks ckpt to stop. It travels like Ctrl-C, so everything that undoes on Ctrl-C undoes here too."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.strsignal(signum) or f"signal {signum}")
        self.signum = signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run ckpt with `argv` (default: the command line) and return its exit code. Never raises."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args in (["--version"], ["-V"]):
        return _flushed(0, f"ckpt {__version__}\n")
    if instruction := os.environ.get(_COMPLETE_VARIABLE):
        from ckpt.cli.completion import complete

        return complete(instruction, _COMPLETE_VARIABLE)
    _catch_signals()
    try:
        code = _run(args)
    except KeyboardInterrupt as stop:
        signum = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
        sys.stderr.write(f"ckpt: stopped by {signal.Signals(signum).name}\n")
        code = SIGNAL_BASE + signum
    except BaseException as error:
        code = _fail(error, args)
    return _flushed(code)


def _run(args: list[str]) -> int:
    """Parse and invoke. Without click's own `main()`, which would turn Ctrl-C and errors into its own forms."""
    import click

    from ckpt.cli.app import app

    try:
        with app.make_context("ckpt", list(args)) as context:
            if not args:
                sys.stderr.write(context.get_help() + "\n")
                return UsageError.exit_code
            code = app.invoke(context)
            return code if isinstance(code, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as wrong:
        raise _usage(wrong) from wrong


def _usage(wrong: click.ClickException) -> UsageError:
    context: click.Context | None = getattr(wrong, "ctx", None)
    path = context.command_path if context else "ckpt"
    return UsageError(wrong.format_message(), hint=f"{path} --help shows what it takes")


def _fail(error: BaseException, args: list[str]) -> int:
    """Say the error in its four lines; an unexpected one becomes a Bug whose traceback goes to a file only."""
    from ckpt.cli.render.error import show_error

    if _reader_gone(error):
        return SIGNAL_BASE + signal.SIGPIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    shown = _as_ckpt_error(error)
    if shown is None:
        from ckpt.cli.crash import report

        shown = report(error, args)
    show_error(shown)
    return shown.exit_code


def _as_ckpt_error(error: BaseException) -> CkptError | None:
    """The errors that a person can do something about; None for a bug."""
    if isinstance(error, CkptError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left: {error}", hint="free some, or name another place with --store")
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return PermissionDenied(str(error), hint="run it as root")
    return None


def _catch_signals() -> None:
    """SIGTERM and SIGHUP act like Ctrl-C. What the caller ignores (nohup) stays ignored."""
    count = 0

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        # The first one starts the undoing. A second, impatient one must not break it off; from the third on the person insists.
        if count != 2:
            raise Interrupted(signum)
        sys.stderr.write("ckpt: undoing what was begun (once more to give up)\n")

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            try:
                signal.signal(signum, handler)
            except ValueError:
                return  # not the main thread (a test, an embedding program): its owner has the signals


def _flushed(code: int, text: str = "") -> int:
    """Bring stdout to its reader. One that has gone (`| head`) is no failure of the work; a full disk behind it is."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_stdout()
        return code
    except OSError as error:
        _drop_stdout()
        return code or _fail(error, [])
    except ValueError:  # closed by somebody
        return code


def _drop_stdout() -> None:
    """Keep the interpreter from trying the rest once more at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _reader_gone(error: BaseException) -> bool:
    """True when a BrokenPipeError is about our stdout, and not about a pipe of the work."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
