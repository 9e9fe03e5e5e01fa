"""When a service that was just started is ready: a port, a line of its log, an answer over HTTP, a command or a file inside."""

from __future__ import annotations

import http.client
import os
import re
import select
import socket
import time
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

from ckpt.engines import _hold
from ckpt.engines.base import Engine, ExecsInside, RunsNew
from ckpt.errors import CkptError, TargetNotFound, UsageError
from ckpt.host import beneath, netns, run
from ckpt.model import Container

Kind = Literal["port", "log", "http", "cmd", "file"]
EVERY_S: Final = 0.1
TRY_LIMIT_S: Final = 2.0
"""For one try of a connection."""
COMMAND_LIMIT_S: Final = 10.0
STATE_EVERY_S: Final = 1.0
LINE_CAP: Final = 64 << 10
WORDS: Final = 5
WORDS_CAP: Final = 800


class NotReady(CkptError):
    """A service did not become ready."""

    slug, exit_code, summary = "failed", 1, "not ready"


@dataclass(frozen=True, slots=True)
class Probe:
    """What tells that it is ready."""

    kind: Kind
    value: str
    status: int = 0
    """Of an HTTP answer; 0: any below 400."""

    @classmethod
    def parse(cls, kind: Kind, text: str) -> Probe:
        """Of the text of an option --ready-KIND. Raises UsageError."""
        if kind == "port":
            if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
                raise UsageError(f"--ready-port {text[:64]!r} is no port")
            return cls(kind, str(int(text)))
        if kind == "http":
            return cls._http(text)
        if kind == "log":
            try:
                re.compile(text)
            except re.error as error:
                raise UsageError(f"--ready-log: {error}") from error
        if kind == "file" and not text.startswith("/"):
            raise UsageError(f"--ready-file {text[:64]!r} is no absolute path")
        if not text or "\0" in text:
            raise UsageError(f"--ready-{kind} says nothing")
        return cls(kind, text)

    @classmethod
    def _http(cls, text: str) -> Probe:
        url, status = text, 0
        if found := re.fullmatch(r"(.*)=([1-5]\d\d)", text):
            url, status = found[1], int(found[2])
        try:
            parts = urlsplit(url)
            good = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0 and parts.username is None
        except ValueError:
            good = False
        if not good or re.search(r"[\x00-\x20\x7f]", url):
            hint = "http://localhost:8080/health, as seen from inside; =204 behind it asks for that status"
            raise UsageError(f"--ready-http {text[:64]!r} is no URL that can be asked", hint=hint)
        return cls("http", url, status)

    def __str__(self) -> str:
        return f"{self.kind} {self.value}" + (f" = {self.status}" if self.status else "")


def wait(engine: Engine, container: Container, probe: Probe, limit_s: float) -> float:
    """Wait until it is ready. Returns how long that took, in seconds.

    Raises:
        NotReady: it was not in time, or has ended; its last words are in the message.
    """
    began = time.monotonic()
    end = began + limit_s
    watched = _Log(engine, container, probe.value) if probe.kind == "log" else None
    looked_s = began
    try:
        while True:
            if watched.found() if watched else _tried(engine, container, probe, end):
                return time.monotonic() - began
            now = time.monotonic()
            if not _hold.alive(container.pid or 0) or (now - looked_s > STATE_EVERY_S and _ended(engine, container)):
                if watched and watched.found():
                    return time.monotonic() - began
                raise NotReady(f"{container.name} ended before it was ready ({probe}){_said(engine, container)}")
            looked_s = now if now - looked_s > STATE_EVERY_S else looked_s
            if now > end:
                raise NotReady(f"{container.name} was not ready within {limit_s:g} s ({probe}){_said(engine, container)}", hint="--ready-timeout")
            time.sleep(EVERY_S)
    finally:
        if watched:
            watched.close()


def _tried(engine: Engine, container: Container, probe: Probe, end: float) -> bool:
    pid = container.pid or 0
    if probe.kind == "cmd":
        limit_s = max(0.5, min(COMMAND_LIMIT_S, end - time.monotonic()))
        try:
            return isinstance(engine, ExecsInside) and engine.exec_in(container, ["/bin/sh", "-c", probe.value], limit_s).ok
        except (CkptError, run.CommandFailed):
            return False
    try:
        if probe.kind == "file":
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return beneath.exists_in(root, probe.value)
            finally:
                os.close(root)
        if probe.kind == "port":
            return netns.call(pid, lambda: _connects(int(probe.value)), 8 * TRY_LIMIT_S)
        return netns.call(pid, lambda: _answers(probe), 4 * TRY_LIMIT_S)
    except OSError:
        return False


def _connects(port: int) -> bool:
    """In the container's network: on the loopback, or on any address that it has."""
    own = (one.address for one in netns.addresses())
    for address in ("127.0.0.1", "::1", *(str(one) for one in own if not one.is_loopback and not one.is_link_local)):
        try:
            with socket.create_connection((address, port), TRY_LIMIT_S):
                return True
        except OSError:
            continue
    return False


def _answers(probe: Probe) -> bool:
    parts = urlsplit(probe.value)
    connection = http.client.HTTPConnection(parts.hostname or "localhost", parts.port or 80, timeout=TRY_LIMIT_S)
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers={"User-Agent": "ckpt"})
        status = connection.getresponse().status
    except http.client.HTTPException:
        return False
    finally:
        connection.close()
    return status == probe.status if probe.status else status < 400


class _Log:
    """Its log, followed."""

    def __init__(self, engine: Engine, container: Container, pattern: str) -> None:
        assert isinstance(engine, RunsNew)
        self._pattern = re.compile(pattern)
        self._rest = b""
        self._read, theirs = os.pipe()
        try:
            with os.fdopen(theirs, "wb") as out:
                self._process = run.spawn(engine.log_command(container), stdout=out, stderr=out, new_session=True)
        except BaseException:
            os.close(self._read)
            raise
        os.set_blocking(self._read, False)

    def found(self) -> bool:
        """Whether a line that came since the last look is the one. Waits a moment when there is none."""
        select.select([self._read], [], [], EVERY_S)
        while True:
            try:
                data = os.read(self._read, LINE_CAP)
            except BlockingIOError:
                return False
            if not data:
                return bool(self._rest) and self._fits(self._rest)
            *lines, self._rest = (self._rest + data).split(b"\n")
            if any(self._fits(line) for line in lines):
                return True
            self._rest = self._rest[-LINE_CAP:]

    def close(self) -> None:
        _hold.end_process(self._process)
        os.close(self._read)

    def _fits(self, line: bytes) -> bool:
        return self._pattern.search(line[:LINE_CAP].decode(errors="replace")) is not None


def _ended(engine: Engine, container: Container) -> bool:
    try:
        return engine.describe(container).state != "running"
    except TargetNotFound:
        return True


def _said(engine: Engine, container: Container) -> str:
    words = engine.last_words(container, WORDS).strip() if isinstance(engine, RunsNew) else ""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return f"; its log ends: {' | '.join(lines)[-WORDS_CAP:]}" if lines else "; it has said nothing"
