"""Reaching another host through the system's `ssh`: destinations, the command line, and what its failures mean.

OpenSSH's own program is used so that ~/.ssh/config, agents, ProxyJump and hardware keys work as people set them up.
Option names and exit statuses (255: ssh itself failed, anything else: the remote command's) are those of ssh(1) and ssh_config(5).
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ckpt.errors import CannotConnect, CkptError, PeerVersion, UsageError
from ckpt.host.run import PIPE, CommandFailed, Process, spawn

CONNECT_TIMEOUT_S: Final = 10
_FORBIDDEN = re.compile(r"""[\s\x00-\x20\x7f'"`$\\;&<>|(){},/?#\[\]]""")


class PeerMissing(CannotConnect):
    """The host answers, but has no `ckpt` in the PATH of a non-interactive shell."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A host to reach: `user` None and `port` None leave the choice to ~/.ssh/config."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Read `[user@]host[:port]` or `ssh://[user@]host[:port]`, IPv6 addresses in brackets.

        Raises:
            UsageError: it is none of these, or would be taken for an option of ssh.
        """
        rest = text
        if rest.startswith("ssh://"):
            rest = rest.removeprefix("ssh://").removesuffix("/")
        user: str | None = None
        if "@" in rest:
            user, _, rest = rest.rpartition("@")
            if not user or user.startswith("-") or ":" in user or _FORBIDDEN.search(user):
                raise _bad(text, "the user name is not usable")
        port_text = ""
        if rest.startswith("["):
            host, bracket, after = rest[1:].partition("]")
            if not bracket or (after and not after.startswith(":")) or not _is_ipv6(host):
                raise _bad(text, "brackets are for an IPv6 address: [2001:db8::1] or [2001:db8::1]:22")
            colon, port_text = after[:1], after[1:]
        elif rest.count(":") > 1:
            if not _is_ipv6(rest):
                raise _bad(text, "too many colons")
            host, colon = rest, ""
        else:
            host, colon, port_text = rest.partition(":")
        if not host or host.startswith("-") or _FORBIDDEN.search(host):
            raise _bad(text, "the host name is not usable")
        if colon and not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65536):
            raise _bad(text, "the port must be a number from 1 to 65535")
        return cls(host, user, int(port_text) if colon else None)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host and self.port else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _bad(text: str, why: str) -> UsageError:
    return UsageError(f"not a destination: {text!r} ({why})", hint="write it as [user@]host[:port], for example root@b")


def interactive() -> bool:
    """True when a person sits at a terminal whom ssh may ask for a password or about a host key."""
    return all(stream is not None and not stream.closed and stream.isatty() for stream in (sys.stdin, sys.stderr))


def argv(
    destination: str | Destination,
    remote_command: Sequence[str],
    options: Sequence[str] = (),
    *,
    batch: bool | None = None,
    subsystem: bool = False,
) -> list[str]:
    """The command line that runs `remote_command` on the destination.

    Args:
        options: the user's `-o` options (`Key=Value`); they win, since ssh takes the first value it sees.
        batch: never ask anybody anything; None asks only when there is a terminal.
        subsystem: `remote_command` is the name of a subsystem (`sftp`).

    Raises:
        UsageError: the destination or an option is not usable.
    """
    where = destination if isinstance(destination, Destination) else Destination.parse(destination)
    program = shlex.split(os.environ.get("CKPT_SSH", "")) or ["ssh"]
    words = [*program, "-T", "-a", "-x"]
    for option in options:
        if not re.match(r"[A-Za-z]+\s*[= ]", option) or re.search(r"[\x00-\x1f\x7f]", option):
            raise UsageError(f"not an ssh option: {option!r}", hint="write it as Key=Value, see ssh_config(5)")
        words += ["-o", option]
    # RemoteCommand and forwardings of a user's configuration would get in the way of a pipe.
    defaults = [
        f"BatchMode={'yes' if (not interactive() if batch is None else batch) else 'no'}",
        f"ConnectTimeout={CONNECT_TIMEOUT_S}",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=3",
        "Compression=no",
        "RemoteCommand=none",
        "ClearAllForwardings=yes",
    ]
    for option in defaults:
        words += ["-o", option]
    if where.port is not None:
        words += ["-p", str(where.port)]
    words += ["-s"] * subsystem + ["--", f"{where.user}@{where.host}" if where.user else where.host]
    if remote_command:
        words.append(shlex.join(remote_command))
    return words


def open(  # noqa: A001
    destination: str | Destination,
    remote_command: Sequence[str],
    options: Sequence[str] = (),
    *,
    batch: bool | None = None,
    stdout: int = PIPE,
    subsystem: bool = False,
) -> Process:
    """Start ssh with pipes on its standard input, output and error; returns before it is connected.

    Args:
        stdout: DEVNULL when nothing is to be heard of the other side.
        subsystem: as for `argv`.

    Raises:
        UsageError: the destination or an option is not usable.
        CannotConnect: there is no ssh program.
    """
    quiet = not interactive() if batch is None else batch
    words = argv(destination, remote_command, options, batch=quiet, subsystem=subsystem)
    # Ctrl-C at the terminal goes to the whole foreground group. The link must outlive it, since rolling back needs it: ssh inherits
    # a blocked SIGINT (and keeps it blocked in its poll); without a terminal it gets a session of its own.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return spawn(words, stdin=PIPE, stdout=stdout, stderr=PIPE, new_session=quiet)
    except CommandFailed as error:
        raise CannotConnect(f"cannot start {words[0]}: {error.reason}", hint="install the OpenSSH client") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


_CAUSES: Final[tuple[tuple[str, str, str], ...]] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|[Hh]ost key for .* has changed",
        "its host key has changed",
        "make sure that it is the right host; then remove the old key: ssh-keygen -R {known}",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "its host key is unknown",
        "connect once by hand and compare the key: ssh {ssh}",
    ),
    (
        r"Permission denied \(|Too many authentication failures|No supported authentication methods",
        "permission denied, no key was accepted",
        "try it by hand: ssh {ssh}; install a key with: ssh-copy-id {ssh}",
    ),
    (
        r"Could not resolve hostname|Name or service not known|Temporary failure in name resolution",
        "the host name is not known",
        "check its spelling",
    ),
    (r"Connection refused", "connection refused, nothing listens there", "is sshd running on it, on this port?"),
    (r"No route to host|Network is unreachable", "there is no route to it", "is it up, and on a network that this host reaches?"),
    (r"timed out|Timeout, server .* not responding", "it does not answer (timed out)", "is it up, and does a firewall let ssh through?"),
    (r"Bad owner or permissions|Bad configuration option|terminating, \d+ bad configuration", "ssh rejects its configuration", "ssh {ssh} says more"),
    (r"kex_exchange_identification|Connection closed by|Connection reset by", "it closed the connection before the login", "its sshd log says why"),
)


def explain(destination: str | Destination, returncode: int | None, stderr: str, *, command: str = "ckpt") -> CkptError:
    """The error for an ssh that ended before the other side spoke.

    Args:
        returncode: its exit status; None when it was ended from here because nothing came in time.
        stderr: what it wrote.
        command: the first word of the remote command.

    Returns:
        CannotConnect with its cause; PeerMissing when the command is not there; PeerVersion when the other ckpt does not know it.
    """
    where = destination if isinstance(destination, Destination) else Destination.parse(destination)
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # (ba)sh and zsh say "not found", env says "No such file or directory"; all exit with 127.
    if returncode == 127 or (returncode == 126 and "ermission denied" in stderr):
        return PeerMissing(
            f"cannot use {where}: {command} is not installed there", hint="install ckpt on it, or see that a non-interactive ssh finds it"
        )
    if returncode == 255 or returncode is None:
        ssh = f"-p {where.port} " * (where.port is not None) + (f"{where.user}@" if where.user else "") + where.host
        known = f"'[{where.host}]:{where.port}'" if where.port not in (None, 22) else where.host
        for pattern, cause, hint in _CAUSES:
            if re.search(pattern, stderr):
                return CannotConnect(f"cannot connect to {where}: {cause}", hint=hint.format(ssh=ssh, known=known))
    if returncode is None:
        return CannotConnect(f"cannot connect to {where}: no answer in time", hint="is it up, and does a login there work without questions?")
    if returncode == 2 and "No such command" in stderr:
        return PeerVersion(f"ckpt on {where} is too old for this one", hint="install the same version on both hosts")
    detail = lines[-1] if lines else ("ssh failed" if returncode == 255 else f"the remote command ended with status {returncode}")
    return CannotConnect(f"cannot connect to {where}: {detail}")
