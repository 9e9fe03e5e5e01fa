"""Commands inside of a running container, by its OCI runtime (runc-exec(8), crun(1)).

Not by the engine above: podman would make a session of it, in its database and, with systemd, in a scope of its own, which is refused
while the host goes down; and it leaves the command running when its client is killed. The runtime puts the command straight into the
container's namespaces and cgroup, with the user, the environment and the rights of its first process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt.errors import EngineUnavailable
from ckpt.host import marked
from ckpt.host.run import Result, which
from ckpt.model import Container


def exec_in(
    container: Container, argv: Sequence[str], timeout_s: float, *, env: Mapping[str, str] | None = None, mark: str = "", alone: bool = False
) -> Result:
    """Run a command inside (see engines.base.ExecsInside)."""
    program = which(container.runtime or "crun")
    if program is None:
        raise EngineUnavailable(f"{container.runtime or 'crun'} is not installed", hint=f"apt install {container.runtime or 'crun'}")
    mark = mark or marked.new_mark()
    words = [f"--env={key}={value}" for key, value in {**(env or {}), marked.VARIABLE: mark}.items()]
    return marked.run([program, "exec", *words, container.id, *argv], mark=mark, timeout_s=timeout_s, alone=alone)
