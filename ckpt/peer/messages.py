"""What control messages say: hello, errors and events as JSON, and back."""

from __future__ import annotations

import dataclasses
import errno
import socket
from typing import Any, Final, get_args

from ckpt import __version__
from ckpt.errors import Bug, CkptError, NoSpace, PeerVersion, PermissionDenied, PolicyRefused
from ckpt.events import Event
from ckpt.peer.frames import have_zstd

PROTOCOL: Final = 2
_EVENTS: Final = {cls.__name__: cls for cls in get_args(Event)}


def hello() -> dict[str, Any]:
    """What each side says first."""
    return {"protocol": PROTOCOL, "ckpt": __version__, "host": socket.gethostname(), "zstd": have_zstd()}


def check_hello(theirs: dict[str, Any]) -> None:
    """Raises PeerVersion when the other side speaks another protocol."""
    if theirs.get("protocol") != PROTOCOL:
        raise PeerVersion(
            f"ckpt {theirs.get('ckpt', '?')} on {theirs.get('host', 'the other host')} speaks protocol {theirs.get('protocol', '?')}, "
            f"ckpt {__version__} on {socket.gethostname()} speaks {PROTOCOL}",
            hint="install the same version of ckpt on both hosts",
        )


def _by_slug(slug: str) -> type[CkptError]:
    found: list[type[CkptError]] = [CkptError]
    for cls in found:
        if cls.slug == slug:
            return cls
        found += cls.__subclasses__()
    return CkptError


def error_to_json(error: BaseException) -> dict[str, Any]:
    """The form in which an exception of a handler travels; one that is not a CkptError is given the fitting class."""
    host = socket.gethostname()
    if isinstance(error, OSError) and not isinstance(error, CkptError):
        path = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = NoSpace(f"no space left on {host}{path}", hint=f"make room on {host}, then try again")
        elif error.errno in (errno.EACCES, errno.EPERM):
            error = PermissionDenied(f"not permitted on {host}: {error.strerror}{path}", hint="most commands need root there, too")
        else:
            error = CkptError(f"{error.strerror or error} on {host}{path}")
    elif not isinstance(error, CkptError):
        error = Bug(f"a bug in ckpt on {host}: {type(error).__name__}: {error}")
    return {**error.to_json(), "host": host}


def error_from_json(value: dict[str, Any]) -> CkptError:
    """The same error again; paths of logs get the host in front."""
    host, log = value.get("host"), value.get("log")

    def text(key: str) -> str | None:
        return str(value[key]) if value.get(key) is not None else None

    error = _by_slug(str(value.get("code")))(
        text("message") or "failed on the other host", where=text("where"), hint=text("hint"), log=f"{host}:{log}" if log and host else text("log")
    )
    rows = value.get("wants")
    if isinstance(error, PolicyRefused) and isinstance(rows, list):
        keys = ("what", "asks", "default", "allow")
        error.wants = tuple({key: str(row.get(key, "")) for key in keys} for row in rows[:1000] if isinstance(row, dict))
    if host:
        error.add_note(f"reported by {host}")
    return error


def again(error: CkptError) -> CkptError:
    """A fresh copy, so that one failure can be raised in several threads."""
    copy = type(error)(error.message, where=error.where, hint=error.hint, log=error.log)
    if isinstance(copy, PolicyRefused) and isinstance(error, PolicyRefused):
        copy.wants = error.wants
    copy.__cause__ = error
    return copy


def event_to_json(event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def event_from_json(value: dict[str, Any]) -> Event | None:
    """None for an event that this version does not know."""
    cls = _EVENTS.get(str(value.pop("event", "")))
    if cls is None:
        return None
    names = {field.name for field in dataclasses.fields(cls)}
    try:
        event: Event = cls(**{key: item for key, item in value.items() if key in names})
    except TypeError:
        return None
    return event
