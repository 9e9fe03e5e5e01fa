"""Commands inside of a running container, by its OCI runtime (runc-exec(8), crun(1)).

Not by the engine above: podman would make a session of it, in its database and, with systemd, in a scope of its own, which is refused
while the host goes down; and it leaves the command running when its client is killed. The runtime puts the command straight into the
container's namespaces and cgroup, with the user, the environment and the rights of its first process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ckpt.errors import CkptError, EngineUnavailable
from ckpt.host import marked
from ckpt.host.run import Result, run, which
from ckpt.model import Container

_QUERY_TIMEOUT_S: Final = 20.0


def exec_in(
    container: Container, argv: Sequence[str], timeout_s: float, *, env: Mapping[str, str] | None = None, mark: str = "", alone: bool = False
) -> Result:
    """Run a command inside (see engines.base.ExecsInside)."""
    program = which(container.runtime or "crun")
    if program is None:
        raise EngineUnavailable(f"{container.runtime or 'crun'} is not installed", hint=f"apt install {container.runtime or 'crun'}")
    mark = mark or marked.new_mark()
    process = _first_process(program, container)
    process |= {"args": list(argv), "terminal": False}
    process["env"] = [*(process.get("env") or []), *(f"{key}={value}" for key, value in {**(env or {}), marked.VARIABLE: mark}.items())]
    process.pop("consoleSize", None)
    # Its environment may hold passwords: neither an argument nor a file. (crun's --env would also replace all that there is.)
    fd = os.memfd_create("process", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as out:
            out.write(json.dumps(process).encode())
        words = [program, "exec", "--process", f"/proc/self/fd/{fd}", container.id]
        return marked.run(words, mark=mark, timeout_s=timeout_s, alone=alone, pass_fds=(fd,))
    finally:
        os.close(fd)


def _first_process(program: str, container: Container) -> dict[str, Any]:
    """The `process` of the container's config.json (OCI runtime-spec, config.md). Raises CkptError."""
    result = run([program, "state", container.id], check=False, timeout_s=_QUERY_TIMEOUT_S)
    try:
        bundle = Path(str(json.loads(result.stdout)["bundle"]))
        return dict(json.loads((bundle / "config.json").read_bytes())["process"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = result.error_text.rsplit("\n", 1)[-1] if not result.ok else str(error)
        raise CkptError(f"{Path(program).name} does not know the first process of {container.name or container.id}: {said}") from error
