"""What an OCI runtime still keeps under an id that its engine does not know (any more), after a restore that failed, say.

Found before the engine begins: when a runtime refuses an id that it has already, podman takes the failure for one of its own making and
deletes, with --force, what the runtime has under that id (DeleteContainer in libpod/oci_conmon_common.go), though it be alive.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from ckpt.errors import StateUnknown
from ckpt.host.run import CommandFailed, run

LIMIT_S: Final = 60.0
_UNKNOWN: Final = ("does not exist", "no such file")
"""Of what runc and crun say about an id that they do not know; a directory without a state in it may be there all the same."""


def forget(program: str, container_id: str, known: Callable[[], bool]) -> None:
    """Remove what a runtime keeps of a container that has ended or was never started, for it would not make another one of that id.

    One that lives is somebody's, whoever lost it, and is not ended. (States: OCI runtime-spec, runtime.md.)

    Args:
        program: path of the runtime.
        known: whether the engine knows the container, whose affair it is then; asked only when the runtime has one.

    Raises:
        StateUnknown: there is a live one, or the runtime does not tell.
    """
    short = container_id[:12]
    where = "it was not touched, and no other one was started"
    hint = f"look at it: {program} state {container_id}; if nobody needs it: {program} delete --force {container_id}"
    try:
        told = run([program, "state", container_id], check=False, timeout_s=LIMIT_S)
        if not told.ok:
            if any(words in told.error_text.lower() for words in _UNKNOWN):
                run([program, "delete", "--force", container_id], check=False, timeout_s=LIMIT_S)
            return  # what else stands in the way the engine meets again, and says it
        state = str(json.loads(told.stdout)["status"])
        if known():
            return
        if state == "stopped":
            run([program, "delete", container_id], check=False, timeout_s=LIMIT_S)  # no --force: the runtime looks again
            return
        if state == "created":
            run([program, "delete", "--force", container_id], check=False, timeout_s=LIMIT_S)
            return
    except (CommandFailed, ValueError, KeyError, TypeError) as error:
        said = error.reason if isinstance(error, CommandFailed) else "its answer makes no sense"
        raise StateUnknown(f"{program} does not tell whether a container {short} lives: {said}", where=where, hint=hint) from error
    raise StateUnknown(f"{program} has a {state} container {short} that its engine does not know", where=where, hint=hint)
