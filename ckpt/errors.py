"""The error tree. Each class carries its slug and its exit code, each instance says where the workload is and what to do next.

The table of exit codes in the man page is generated from this module (`exit_code_table`).
"""

from __future__ import annotations

from typing import ClassVar, Final


class CkptError(Exception):
    """Base of everything that ckpt reports to a person.

    Args:
        message: what failed, one clear sentence.
        where: where the workload is now ("web is running, untouched").
        hint: what to do next.
        log: path (or path:line) of the log that tells more.
    """

    slug: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1
    summary: ClassVar[str] = "failed"

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None, log: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.log = log

    def to_json(self) -> dict[str, object]:
        """The stable JSON form of the error (schema 1)."""
        return {
            "code": self.slug,
            "exit_code": self.exit_code,
            "message": self.message,
            "where": self.where,
            "hint": self.hint,
            "log": self.log,
        }


class UsageError(CkptError):
    slug, exit_code, summary = "usage", 2, "wrong usage"


class ConfigError(CkptError):
    slug, exit_code, summary = "config", 3, "the configuration is wrong"


class TargetNotFound(CkptError):
    slug, exit_code, summary = "no-such-target", 10, "no such target, or its name is ambiguous"


class BusyError(CkptError):
    slug, exit_code, summary = "busy", 11, "busy, locked or in the wrong state"


class EngineUnavailable(CkptError):
    slug, exit_code, summary = "engine-unavailable", 12, "the engine is not available"


class FeatureMissing(CkptError):
    slug, exit_code, summary = "feature-missing", 13, "CRIU, the kernel or the runtime lacks a needed feature"


class PermissionDenied(CkptError):
    slug, exit_code, summary = "permission", 14, "not permitted (most commands need root)"


class DumpFailed(CkptError):
    slug, exit_code, summary = "dump-failed", 20, "dump failed, the source is running"


class RestoreFailed(CkptError):
    slug, exit_code, summary = "restore-failed", 21, "restore failed, nothing is running"


class StateUnknown(CkptError):
    slug, exit_code, summary = "state-unknown", 22, "the state of the workload is unknown"


class StartedCold(CkptError):
    slug, exit_code, summary = "started-cold", 23, "restore failed, started cold instead"


class ArchiveInvalid(CkptError):
    slug, exit_code, summary = "archive-invalid", 30, "the archive is invalid"


class DigestMismatch(CkptError):
    slug, exit_code, summary = "digest-mismatch", 31, "a digest or signature is wrong"


class KeyProblem(CkptError):
    slug, exit_code, summary = "key", 32, "a key is missing or wrong"


class IncompatibleHost(CkptError):
    slug, exit_code, summary = "incompatible-host", 33, "the host cannot run this checkpoint"


class PolicyRefused(CkptError):
    """Args: wants: rows of `what` (kind:value), `asks`, `default`, `allow` (the option that allows it)."""

    slug, exit_code, summary = "policy", 34, "the checkpoint asks for more than this host allows"

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, log: str | None = None, wants: tuple[dict[str, str], ...] = ()
    ) -> None:
        super().__init__(message, where=where, hint=hint, log=log)
        self.wants = wants

    def to_json(self) -> dict[str, object]:
        """As every error, with `wants`."""
        return {**super().to_json(), "wants": [dict(row) for row in self.wants]}


class CannotConnect(CkptError):
    slug, exit_code, summary = "cannot-connect", 40, "cannot connect to the other end; trying again may help"


class TransferFailed(CkptError):
    slug, exit_code, summary = "transfer-failed", 41, "the transfer failed; trying again may help"


class PeerVersion(CkptError):
    slug, exit_code, summary = "peer-version", 42, "ckpt on the other host speaks another version"


class RemoteRefused(CkptError):
    slug, exit_code, summary = "refused", 43, "the other end refused for good: trying again does not help"


class MigrationRolledBack(CkptError):
    slug, exit_code, summary = "rolled-back", 50, "migration rolled back, the source is running"


class NeedsContinue(CkptError):
    slug, exit_code, summary = "needs-continue", 51, "migration must be finished with --continue"


class NoSpace(CkptError):
    slug, exit_code, summary = "no-space", 60, "no space left"


class Bug(CkptError):
    slug, exit_code, summary = "bug", 70, "a bug in ckpt"


class DoneWithWarnings(CkptError):
    slug, exit_code, summary = "warnings", 100, "done, with warnings"


def _tree(cls: type[CkptError]) -> list[type[CkptError]]:
    found = [cls]
    for sub in cls.__subclasses__():
        found += _tree(sub)
    return found


def exit_code_table() -> list[tuple[int, str, str]]:
    """All exit codes as rows (code, slug, meaning), in order of the code."""
    rows: dict[int, tuple[int, str, str]] = {0: (0, "ok", "success")}
    for cls in _tree(CkptError):
        rows.setdefault(cls.exit_code, (cls.exit_code, cls.slug, cls.summary))
    return [rows[code] for code in sorted(rows)]


SIGNAL_BASE: Final = 128
"""Exit code of a run ended by signal N is SIGNAL_BASE + N."""
