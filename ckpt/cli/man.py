"""Man pages from the command tree: ckpt(1), and ckpt-VERB(1) for every verb that is not hidden.

There is no date in them: they must not go stale by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

from ckpt import __version__, config
from ckpt.cli.app import VERBS, app
from ckpt.cli.common import Verb
from ckpt.errors import SIGNAL_BASE, exit_code_table

_COMMON = {"fmt", "quiet", "store", "log_level"}


def pages() -> dict[str, str]:
    """File name -> content."""
    context = click.Context(app, info_name="ckpt", help_option_names=["-h", "--help"])
    known = [(name, app.get_command(context, name)) for name in VERBS]
    verbs = [(name, command) for name, command in known if command is not None and not command.hidden]
    made = {"ckpt.1": "\n".join(_top(context, verbs)) + "\n"}
    for name, command in verbs:
        _pages_of(made, name, command)
    return made


def _pages_of(made: dict[str, str], name: str, command: click.Command) -> None:
    """The page of a verb, and of those below it (`ckpt hibernate save`: ckpt-hibernate-save)."""
    inner = click.Context(command, info_name=f"ckpt {name}", help_option_names=["-h", "--help"])
    made[f"ckpt-{name.replace(' ', '-')}.1"] = "\n".join(_verb(inner, name, command)) + "\n"
    for word, below in _below(inner, command):
        _pages_of(made, f"{name} {word}", below)


def _below(context: click.Context, command: click.Command) -> list[tuple[str, click.Command]]:
    """The verbs of a verb."""
    if not isinstance(command, click.Group):
        return []
    return [(word, found) for word in command.list_commands(context) if (found := command.get_command(context, word)) is not None]


def _top(context: click.Context, verbs: Sequence[tuple[str, click.Command]]) -> Iterator[str]:
    yield from _head("ckpt", "save, restore and migrate running containers with CRIU")
    yield from (".SH SYNOPSIS", r".B ckpt", r"[\fIOPTION\fR]... \fIVERB\fR [\fIARGUMENT\fR]...")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(app.help or "")
    yield ".SH VERBS"
    for name, command in verbs:
        yield from (".TP", rf"\fBckpt\-{_escape(name)}\fR(1)", _escape(command.get_short_help_str(200)))
    yield ".SH OPTIONS"
    yield "These stand before or after the verb."
    yield from _options(context, [param for param in app.get_params(context) if isinstance(param, click.Option)])
    yield ".SH OUTPUT"
    yield from _paragraphs(_OUTPUT)
    yield ".SH THE PROMISE"
    yield from _paragraphs(_PROMISE)
    yield ".SH EXIT STATUS"
    yield from _exit_codes()
    yield ".SH ENVIRONMENT"
    for key in config.Settings.__dataclass_fields__:
        yield from (".TP", rf"\fB{config.variable(key)}\fR", rf"Overrides \fB{_escape(key)}\fR of the configuration.")
    yield from (".TP", r"\fBNO_COLOR\fR", "No colours.")
    yield ".SH FILES"
    for path, meaning in _FILES:
        yield from (".TP", rf"\fI{_escape(path)}\fR", _escape(meaning))
    yield ".SH SEE ALSO"
    yield ",\n".join(rf"\fBckpt\-{_escape(name)}\fR(1)" for name, _ in verbs) + ",\n" + r"\fBcriu\fR(8), \fBpodman\-container\-checkpoint\fR(1)"


def _verb(context: click.Context, name: str, command: click.Command) -> Iterator[str]:
    page = f"ckpt-{name.replace(' ', '-')}"
    yield from _head(page, command.get_short_help_str(200).rstrip(".").split(":")[0])
    usage = " ".join(command.collect_usage_pieces(context)).removeprefix("[OPTIONS]").strip()
    yield from (".SH SYNOPSIS", rf".B ckpt {_escape(name)}", rf"[\fIOPTION\fR]... {_escape(usage)}".rstrip())
    yield ".SH DESCRIPTION"
    yield from _paragraphs(command.help or "")
    if verbs := _below(context, command):
        yield ".SH VERBS"
        for word, below in verbs:
            yield from (".TP", rf"\fB{_escape(f'{page}-{word}')}\fR(1)", _escape(below.get_short_help_str(200)))
    options = [param for param in command.get_params(context) if isinstance(param, click.Option)]
    yield ".SH OPTIONS"
    yield from _options(context, [option for option in options if option.name not in _COMMON])
    yield ".PP"
    yield r"The options of \fBckpt\fR(1) (\fB\-\-format\fR, \fB\-\-quiet\fR, \fB\-\-store\fR, \fB\-\-log\-level\fR) work here too."
    if isinstance(command, Verb) and command.examples:
        yield ".SH EXAMPLES"
        for line, meaning in command.examples:
            yield from (".TP", rf"\fB{_escape(line)}\fR", _escape(meaning[:1].upper() + meaning[1:] + ("" if meaning.endswith("?") else ".")))
    yield from (".SH EXIT STATUS", r"As in \fBckpt\fR(1); 0 is success.", ".SH SEE ALSO", r"\fBckpt\fR(1)")


def _head(name: str, purpose: str) -> Iterator[str]:
    yield r".\" Made from the command tree by `python -m ckpt.cli.generate`. Do not edit."
    yield f'.TH "{name.upper()}" "1" "" "ckpt {__version__}" "User Commands"'
    yield from (".nh", ".SH NAME", rf"{_escape(name)} \- {_escape(purpose[:1].lower() + purpose[1:])}")


def _options(context: click.Context, options: Sequence[click.Option]) -> Iterator[str]:
    for option in options:
        record = option.get_help_record(context)
        if record is None:
            continue
        names, meaning = record
        meaning = re.sub(r"\s+\[[^]]*x[^]]*\]$", "", meaning)  # click's own words for a range
        shown = re.sub(r"(--?[\w-]+)", lambda found: rf"\fB{_escape(found[1])}\fR", names.replace("\\", r"\e"))
        yield from (".TP", shown, _escape(meaning))


def _exit_codes() -> Iterator[str]:
    for code, slug, meaning in exit_code_table():
        yield from (".TP", rf"\fB{code}\fR", rf"{_escape(meaning)} (\fI{_escape(slug)}\fR)")
    yield from (".TP", rf"\fB{SIGNAL_BASE}+N\fR", "ended by signal N, what was begun is undone")
    yield from (".PP", "Any other code means failure too. Of several targets that fail, the gravest decides, else the first.")


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(text.strip().split("\n\n")):
        if number:
            yield ".PP"
        yield _escape(" ".join(line.strip() for line in paragraph.splitlines()))


def _escape(text: str) -> str:
    """For roff(7): backslashes and hyphens, and no control characters at the beginning of a line."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return r"\&" + text if text.startswith((".", "'")) else text


_OUTPUT = """
Results go to stdout, the name that was typed, one a line; progress, warnings and errors go to stderr: a live display on a terminal, plain
lines elsewhere. An error says what failed, where the workload is now, what to do next, and which log tells more.

--format json gives one document with "schema": 1, jsonl each event and each result as a line; both only ever gain fields. A template like
'{{.Name}} {{.ID}}' gives one line for each result; {{json .}} all of it.
"""
_PROMISE = """
There is never more than one running copy of a workload, and never none. A dump is held, frozen, until the checkpoint is safe; a migration's
source is held until the destination has the workload ready. What fails or is interrupted before that is undone, and the source runs on. When
the connection breaks at the one moment in which nobody can know, the source stays frozen, ckpt exits with 51 or 22, and ckpt migrate
--continue ID finishes either way.
"""
_FILES = (
    ("/var/lib/ckpt", "the store"),
    ("/var/lib/ckpt/history", "what became of jobs, for ckpt jobs"),
    ("/var/lib/ckpt/serve", "the certificate of ckpt serve, and the hashes of its tokens"),
    ("$XDG_CONFIG_HOME/ckpt/known_servers", "certificates of the servers behind https:// that are known by their fingerprint"),
    ("/etc/ckpt/ckpt.toml", "configuration of the host: store, stores, log_dir, log_level, compress, timeout_s, link_timeout_s, "
     "hook_timeout_s, ssh_options, http, allow, encrypt, identity, sign_key, allowed_signers, require_signature"),
    ("/etc/ckpt/hooks.d/NN-name", "commands that run before and after checkpoint, restore and migrate (docs/hooks.md)"),
    ("/etc/ckpt/ckpt.toml.d/*.toml", "more of it, in the order of their names"),
    ("$XDG_CONFIG_HOME/ckpt/ckpt.toml", "configuration of the user; it wins over the host's, the environment over both, options over all"),
    ("/var/log/ckpt", "logs of failures"),
)
