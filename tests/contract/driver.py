"""One operation in a process of its own, for tests that kill it: `driver.py WORLD-KIND WORLD VERB ARGS...`, JSON on stdout.

WORLD-KIND `fake` works on the fake engine's world, `real` (WORLD is then ignored) on whatever engines the host has. It is run by
a host's own Python, so it needs nothing but ckpt.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ckpt.engines.base import Startable  # noqa: E402
from ckpt.errors import CkptError  # noqa: E402
from ckpt.events import Event  # noqa: E402
from ckpt.model import DumpOptions, RestoreOptions, Target  # noqa: E402
from ckpt.ops import guard, recover, resolve  # noqa: E402
from ckpt.ops.checkpoint import checkpoint  # noqa: E402
from ckpt.ops.hibernate import resume as resuming  # noqa: E402
from ckpt.ops.hibernate.settings import HibernateSettings  # noqa: E402
from ckpt.ops.restore import restore  # noqa: E402
from ckpt.ops.result import Outcome  # noqa: E402
from ckpt.store.catalog import Catalog  # noqa: E402
from ckpt.store.job import Job  # noqa: E402

OPTIONS = DumpOptions()


def said(outcome: Outcome, events: list[str]) -> dict[str, Any]:
    error = outcome.error
    return {
        "ok": outcome.ok,
        "ref": outcome.checkpoint.ref if outcome.checkpoint else None,
        "container": outcome.container.id if outcome.container else None,
        "state": outcome.container.state if outcome.container else None,
        "code": error.exit_code if error else 0,
        "message": error.message if error else "",
        "where": (error.where if error else "") or "",
        "log": (error.log if error else "") or "",
        "stats": outcome.stats,
        "events": events,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    events: list[str] = []

    def emit(event: Event) -> None:
        events.append(type(event).__name__)

    root = Path(arguments.store)
    match arguments.verb:
        case "guard":
            return {"ok": guard.guard_main(arguments.what) == 0}
        case "checkpoint":
            options = replace(OPTIONS, leave_running=arguments.leave_running)
            return said(checkpoint([Target.parse(arguments.what)], options=options, store_root=root, emit=emit)[0], events)
        case "restore":
            return said(restore([arguments.what], options=RestoreOptions(name=arguments.name), store_root=root, emit=emit)[0], events)
        case "restore-latest":
            return said(restore([], latest=True, options=RestoreOptions(), store_root=root, emit=emit)[0], events)
        case "state":
            engine, container = resolve.resolve(Target.parse(arguments.what))
            return {"ok": True, "state": container.state, "container": container.id}
        case "start":
            return start_cold(Target.parse(arguments.what))
        case "hibernate-resume":
            done = resuming.resume(store_root=root, settings=HibernateSettings(), same_boot=arguments.same_boot, emit=emit)
            return {"ok": True, "reason": done.reason, "how": {one.target: one.how for one in done.back}}
        case "sweep":
            return {"ok": True, "said": recover.sweep(root)}
        case "hold":
            return hold(Target.parse(arguments.what), root)
        case "hold-restore":
            return hold_restore(arguments.what, root)
    raise AssertionError(arguments.verb)


def start_cold(target: Target) -> dict[str, Any]:
    """The engine's own stop and start, without a checkpoint."""
    engine, container = resolve.resolve(target)
    able = engine.probe().startable
    assert able == isinstance(engine, Startable)
    if not able or not isinstance(engine, Startable):
        return {"ok": False, "startable": False}
    engine.stop(container, 1.0)
    engine.stop(container, 1.0)  # it is idempotent
    states = [c.state for c in engine.find(container.id)]
    return {"ok": True, "stopped": states, "state": engine.start(container).state}


def hold(target: Target, root: Path) -> dict[str, Any]:
    """Hold a dump, look at the workload meanwhile, resume it."""
    engine, container = resolve.resolve(target)
    catalog = Catalog(root)
    draft = catalog.begin(container.name)
    job = Job.create(root, "checkpoint", engine=engine.name, container_id=container.id, name=container.name, leave_running=False)
    held = engine.dump(container, draft.stage, replace(OPTIONS, tcp_established=False, file_locks=False, shell_job=False), job)
    inventory = (draft.stage / "checkpoint" / "inventory.img").exists()
    held.resume()
    job.write("rolled-back")
    draft.discard()
    recover.close(job, None)
    return {"ok": True, "inventory": inventory, "state": engine.describe(container).state}


def hold_restore(ref: str, root: Path) -> dict[str, Any]:
    """Hold a restore, then abort it (twice: it is idempotent)."""
    from ckpt.engines import registry

    catalog = Catalog(root)
    found = catalog.find(ref)
    draft = catalog.begin(found.manifest.name)
    catalog.materialize(found, draft.stage)
    engine = registry.by_name(found.manifest.engine)
    for container in engine.find(found.manifest.container_id):
        engine.remove(container)
    job = Job.create(root, "restore", engine=engine.name, container_id=found.manifest.container_id, name=found.manifest.name)
    options = RestoreOptions(tcp_established=False, file_locks=False, shell_job=False)
    held = engine.restore(draft.stage, found.manifest, options, job, rootfs_ready=lambda root: None, volume_ready=lambda name, at: None)
    held.abort()
    held.abort()
    draft.discard()
    job.write("rolled-back")
    recover.close(job, None)
    return {"ok": True, "left": [c.id for c in engine.find(found.manifest.container_id)]}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["fake", "real"])
    parser.add_argument("world")
    parser.add_argument("verb")
    parser.add_argument("what", nargs="?", default="")
    parser.add_argument("--store", default="/var/lib/ckpt")
    parser.add_argument("--leave-running", action="store_true")
    parser.add_argument("--name")
    parser.add_argument("--same-boot", action="store_true")
    arguments = parser.parse_args()
    if arguments.kind == "fake":
        from tests.contract import fake

        fake.install(Path(arguments.world))
    try:
        result = run(arguments)
    except CkptError as error:
        result = {"ok": False, "code": error.exit_code, "message": error.message, "where": error.where or "", "log": error.log or ""}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
