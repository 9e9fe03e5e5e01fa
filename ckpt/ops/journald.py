"""What ckpt did, in systemd's journal: one entry for each operation that is over, with fields to look for (`journalctl CKPT_TARGET=web`).

Nothing is written where there is no journald, and nothing fails for it.
"""

from __future__ import annotations

from typing import Final

from ckpt.host import systemd
from ckpt.model import JobRecord

_PRIORITIES: Final = {"done": 6, "running": 6, "serving": 6, "rolled-back": 4, "waiting": 4, "refused": 4}
"""By the state of a record, as syslog(3) has them; all others are errors."""
_VERBS: Final = {
    "checkpoint": "checkpoint of", "restore": "restore of", "migrate": "migration of", "receive": "migration to this host of",
    "checkpoint-group": "checkpoint of group", "restore-group": "restore of group",
    "migrate-group": "migration of group", "receive-group": "migration to this host of group",
}  # fmt: skip


def tell(
    message: str,
    *,
    phase: str,
    result: str = "",
    id: str = "",
    target: str = "",
    checkpoint: str = "",
    freeze_s: float | None = None,
    total_s: float | None = None,
    error: str = "",
    priority: int = 6,
) -> None:
    """Write one entry. Never raises.

    Args:
        phase: CKPT_PHASE, what was done: checkpoint, restore, migrate, receive, hibernate, resume.
        result: CKPT_RESULT, how it ended: done, rolled-back, failed, lost, waiting; of a resume restored, cold and so on.
        id: CKPT_ID, of the job or the hibernation.
        target: CKPT_TARGET.
        checkpoint: CKPT_CHECKPOINT, its id.
        freeze_s, total_s: CKPT_FREEZE_USEC and CKPT_TOTAL_USEC.
        error: CKPT_ERROR.
    """
    systemd.journal(
        message,
        priority=priority,
        CKPT_ID=id or None,
        CKPT_PHASE=phase,
        CKPT_RESULT=result or None,
        CKPT_TARGET=target or None,
        CKPT_CHECKPOINT=checkpoint or None,
        CKPT_FREEZE_USEC=_us(freeze_s),
        CKPT_TOTAL_USEC=_us(total_s),
        CKPT_ERROR=error or None,
    )


def record(one: JobRecord) -> None:
    """Tell of a job: a checkpoint, a restore, either end of a migration."""
    freeze_s, total_s = _seconds(one, "freeze_s"), _seconds(one, "total_s")
    error = str((one.error or {}).get("message", ""))
    parts = [one.state]
    if freeze_s is not None:
        parts.append(f"frozen {freeze_s:.3f} s")
    if total_s is not None:
        parts.append(f"{total_s:.3f} s in all")
    to = f" to {one.destination}" if one.destination else ""
    by = f" (by ckpt's {one.settled_by})" if one.settled_by else ""
    text = f"{_VERBS.get(one.kind, one.kind)} {one.name or one.container_id[:12]}{to}: {', '.join(parts)}{by}"
    tell(
        text + (f": {error}" if error else ""),
        phase=one.kind,
        result=one.state,
        id=one.id,
        target=one.name or one.container_id,
        checkpoint=str(one.statistics.get("checkpoint_id") or ""),
        freeze_s=freeze_s,
        total_s=total_s,
        error=error,
        priority=_PRIORITIES.get(one.state, 3),
    )


def _seconds(one: JobRecord, key: str) -> float | None:
    value = one.statistics.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _us(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)
