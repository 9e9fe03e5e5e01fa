"""Shell completion: words from the command tree, container names from the engines, checkpoints from the store.

Whatever goes wrong while completing is nobody's business: no answer, no message.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem, FishComplete, ShellComplete, ZshComplete, split_arg_string

_LIMIT_S = 3.0
_PROGRAM = "ckpt"

_BASH = r"""# bash completion for %(prog_name)s                                -*- shell-script -*-
# Made from the command tree by `python -m ckpt.cli.generate`. Do not edit.

%(complete_func)s() {
    local IFS=$'\n' response completion type value
    response=$(env COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" COMP_BREAKS="$COMP_WORDBREAKS" \
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r type value <<<"$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class BashComplete(ShellComplete):
    """Bash splits words at `:`, `@` and `=`, which are part of our names; so the whole line is looked at, not bash's words."""

    name = "bash"
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode(errors="replace")
        words = split_arg_string(line)
        incomplete = words.pop() if len(words) > 1 and not line[-1:].isspace() else ""
        # Bash replaces only what follows the last of its breaks.
        value = incomplete.partition("=")[2] if incomplete.startswith("-") else incomplete  # click answers --option=VALUE with values
        breaks = [value.rfind(c) for c in os.environ.get("COMP_BREAKS", "") if c in ":@="]
        self._prefix = max([0, *(position + 1 for position in breaks)])
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{str(item.value)[self._prefix :] if item.type == 'plain' else item.value}"


_SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


def complete(instruction: str, variable: str) -> int:
    """Answer a shell. The instruction is `SHELL_complete`; returns the exit code."""
    shell, _, what = instruction.partition("_")
    kind = _SHELLS.get(shell)
    if kind is None or what != "complete":
        return 1
    try:
        # Engines' complaints would land in the middle of the command line being typed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        from ckpt.cli.app import app

        text = kind(app, {}, _PROGRAM, variable).complete()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except Exception:
        return 1
    return 0


def script(shell: str) -> str:
    """The completion script to install for a shell."""
    from ckpt.cli.app import app

    kind = _SHELLS[shell](app, {}, _PROGRAM, "_CKPT_COMPLETE")
    text = (kind.source_template % kind.source_vars()).strip() + "\n"
    if shell == "fish":
        # click's own splits a description at its commas and drops the rest.
        text = text.replace('string split "," ', 'string split --max 1 "," ')
    if shell != "bash":
        mark = "# Made from the command tree by `python -m ckpt.cli.generate`. Do not edit.\n"
        head, _, rest = text.partition("\n")
        text = f"{head}\n{mark}{rest}" if head.startswith("#compdef") else mark + text
    return text


class _TooLate(BaseException):
    """Completing took too long. Not an Exception, so that nothing below takes it for a failure of its own."""


def _in_time(find: Callable[[], Iterable[str]]) -> list[str]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TooLate

    found: list[str] = []
    try:
        before = signal.signal(signal.SIGALRM, stop)
    except ValueError:
        return found
    try:
        signal.setitimer(signal.ITIMER_REAL, _LIMIT_S)
        for name in find():
            found.append(name)
    except (Exception, _TooLate):
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return found


def _items(found: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in dict.fromkeys(found) if name.startswith(incomplete) and not any(c.isspace() for c in name)]


def _container_names(incomplete: str) -> Iterable[str]:
    from ckpt.engines import registry

    for engine in registry.engines():
        try:
            known = engine.containers()
        except Exception:
            continue  # the others may still answer
        for container in known:
            name = container.name or container.id[:12]
            yield f"{engine.prefixes[0]}:{name}" if ":" in incomplete else name


def _store(ctx: click.Context) -> Path:
    for context in (ctx, ctx.parent):
        if context is not None and context.params.get("store"):
            return Path(context.params["store"])
    from ckpt import config

    return config.load().store


def _checkpoint_refs(ctx: click.Context, incomplete: str) -> Iterable[str]:
    from ckpt.store.catalog import Catalog

    known = Catalog(_store(ctx)).all()
    yield from (checkpoint.manifest.name for checkpoint in known)
    if "@" in incomplete or len(known) < 20:
        yield from (checkpoint.ref for checkpoint in known)


def _job_ids(ctx: click.Context) -> Iterable[str]:
    from ckpt.ops import jobs as use_case

    yield from (record.id for record in use_case.jobs(store_root=_store(ctx)))


def containers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of containers."""
    return _items(_in_time(lambda: _container_names(incomplete)), incomplete)


def checkpoints(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Checkpoints in the store."""
    return _items(_in_time(lambda: _checkpoint_refs(ctx, incomplete)), incomplete)


def jobs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`show`, then ids of jobs."""
    if not ctx.params.get(param.name or ""):
        return _items(["show"], incomplete)
    return _items(_in_time(lambda: _job_ids(ctx)), incomplete)


def both(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What `export` takes: a checkpoint, or a container."""
    return checkpoints(ctx, param, incomplete) + containers(ctx, param, incomplete)


def checkpoints_or_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What `inspect` takes: a checkpoint, or an archive."""
    found: list[Any] = checkpoints(ctx, param, incomplete)
    return found or [CompletionItem(incomplete, type="file")]
