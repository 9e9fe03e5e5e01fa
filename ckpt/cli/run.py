"""`ckpt run`."""

from __future__ import annotations

import click

from ckpt.cli.common import Duration, Session, dump_options, timeout_option, verb
from ckpt.errors import UsageError
from ckpt.model import RestoreOptions


@verb(
    "run",
    examples=(
        ("ckpt run --warm web --ready-port 8080 -- IMAGE", "start it, save it when it is ready"),
        ("ckpt run --warm web -- IMAGE", "from then on: restored, not started"),
        ("ckpt run --warm web -R --ready-log 'Started' -- IMAGE", "the first one runs on, too"),
    ),
)
@click.option("--warm", metavar="NAME", help="Restore the warm checkpoint of this name; where there is none, start it and make one.")
@click.option("--ready-port", metavar="PORT", help="It is ready when this TCP port accepts a connection inside of its network.")
@click.option("--ready-log", metavar="REGEX", help="It is ready when a line of its log fits.")
@click.option("--ready-http", metavar="URL[=STATUS]", help="It is ready when this answers inside of its network (default: a status below 400).")
@click.option("--ready-cmd", metavar="COMMAND", help="It is ready when this shell command succeeds inside.")
@click.option("--ready-file", metavar="PATH", help="It is ready when this is there, inside.")
@click.option("--ready-timeout", type=Duration(), default=60.0, metavar="TIME", help="Longest time to become ready (default 60s).")
@click.option("-R", "--leave-running", is_flag=True, help="After a cold start, let it run on.")
@click.option("-p", "--publish", multiple=True, metavar="PORT", help="A port of the host ([IP:]HOST:CONTAINER[/PROTOCOL]). Can be repeated.")
@click.option("--engine", default="podman", metavar="ENGINE", help="What starts it (podman).")
@timeout_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- ARGUMENTS...")
def command(
    session: Session,
    warm: str | None,
    ready_port: str | None,
    ready_log: str | None,
    ready_http: str | None,
    ready_cmd: str | None,
    ready_file: str | None,
    ready_timeout: float,
    leave_running: bool,
    publish: tuple[str, ...],
    engine: str,
    timeout_s: float | None,
    arguments: tuple[str, ...],
) -> int:
    """Start a container from a checkpoint of itself when it was ready, instead of from nothing.

    The first time it is started (podman run -d with these arguments), and saved as soon as it is ready: NAME@warm. It ends then, unless -R.
    From then on NAME@warm is restored, or, while NAME runs, a copy of it. With other arguments, or when the name of its container
    image means another one by now, it is started cold and NAME@warm is replaced.
    """
    if warm is None:
        raise UsageError("ckpt run is for --warm NAME", hint="podman run starts a container that is not to be kept warm")
    if not arguments:
        raise UsageError("what shall be started?", hint=f"ckpt run --warm {warm} --ready-port 8080 -- IMAGE [COMMAND...]")
    given = {"port": ready_port, "log": ready_log, "http": ready_http, "cmd": ready_cmd, "file": ready_file}
    chosen = [(kind, text) for kind, text in given.items() if text is not None]
    if len(chosen) > 1:
        raise UsageError(f"--ready-{chosen[0][0]} and --ready-{chosen[1][0]}: one of them says when it is ready")
    from ckpt.ops import copies, warmstart
    from ckpt.ops.readiness import Probe

    copies.names([warm], warm, None)
    probe = Probe.parse(chosen[0][0], chosen[0][1]) if chosen else None  # type: ignore[arg-type]
    copies.ports(publish, 1)
    if ready_timeout <= 0:
        raise UsageError("--ready-timeout is more than nothing")
    session.need_root()
    dump = dump_options(session, leave_running=leave_running, timeout_s=timeout_s)
    options = RestoreOptions(lazy=True, timeout_s=dump.timeout_s, allow=tuple(session.settings.allow))
    wanted = warmstart.Wanted(warm, arguments, publish, probe, ready_timeout)
    outcome = warmstart.run_warm(wanted, engine_name=engine, dump=dump, options=options, store_root=session.store_root, emit=session.emit)
    return session.finish([outcome])
