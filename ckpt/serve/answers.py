"""Answers of the server: errors as JSON (RFC 9457, with our own code, message and hint), and what status an error has."""

from __future__ import annotations

import errno
import logging
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from ckpt.errors import (
    ArchiveInvalid,
    BusyError,
    CkptError,
    DigestMismatch,
    FeatureMissing,
    IncompatibleHost,
    KeyProblem,
    NoSpace,
    PolicyRefused,
    RemoteRefused,
    TargetNotFound,
    UsageError,
)
from ckpt.serve.uploads import TooLarge

_log = logging.getLogger("ckpt.serve")
_STATUS: Final[tuple[tuple[type[CkptError], int], ...]] = (
    (TooLarge, 413),
    (NoSpace, 507),
    (BusyError, 503),
    (TargetNotFound, 404),
    (PolicyRefused, 403),
    (RemoteRefused, 403),
    (DigestMismatch, 422),
    (ArchiveInvalid, 422),
    (KeyProblem, 422),
    (IncompatibleHost, 422),
    (FeatureMissing, 422),
    (UsageError, 400),
)
RETRY_S: Final = "2"


def problem(status: int, code: str, message: str, hint: str | None = None, headers: dict[str, str] | None = None) -> web.Response:
    """An error as JSON."""
    value = {"status": status, "title": HTTPStatus(status).phrase, "detail": message, "code": code, "message": message, "hint": hint}
    made = web.json_response(value, status=status, content_type="application/problem+json", headers=headers)
    if status in (423, 429, 503) and "Retry-After" not in made.headers:
        made.headers["Retry-After"] = RETRY_S
    return made


def described(error: BaseException) -> tuple[int, str, str, str | None]:
    """Status, code, message and hint of an error. Of a bug the client learns nothing but that there is one."""
    if isinstance(error, CkptError):
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        return status, error.slug, error.message, error.hint
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 507, NoSpace.slug, "no space left on the server", None
    _log.error("a request failed", exc_info=error)
    return 500, "failed", "the server failed", "its log says more"


def of_error(error: BaseException) -> web.Response:
    """The answer for what a handler raised."""
    return problem(*described(error))


def of_http(error: web.HTTPException) -> web.Response:
    """aiohttp's own answers (no such path, wrong method) in our form."""
    headers = {name: error.headers[name] for name in ("Allow", "Retry-After") if name in error.headers}
    return problem(error.status, "http", error.reason, None, headers)


def result(value: dict[str, Any], *, status: int = 201, headers: dict[str, str] | None = None) -> web.Response:
    """What an upload became."""
    return web.json_response({"schema": 1, **value}, status=status, headers=headers)
