"""`ckpt restore`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ckpt.cli import carriage, completion, protection
from ckpt.cli.carriage import carrier_options, digest_option
from ckpt.cli.checkpoint import microseconds
from ckpt.cli.common import Session, all_and_latest, hooks_option, one_way, state_options, verb
from ckpt.cli.render.rows import Row
from ckpt.errors import UsageError
from ckpt.model import RestoreOptions


@verb(
    "restore",
    examples=(
        ("ckpt restore web", "the newest checkpoint of web"),
        ("ckpt restore web@2", "an older one"),
        ("ckpt restore --lazy web", "runs at once, its memory follows"),
        ("ckpt restore -n copy web", "beside the original, under another name"),
        ("ckpt restore --group shop", "the newest set of a group, all or none"),
        ("ckpt restore --isolated web@3", "a copy without network, to look into it"),
        ("ckpt restore -i web.tar.zst", "from an archive, podman's too"),
        ("ckpt restore -i https://a/web.tar.zst", "the same from a web server"),
    ),
)
@click.argument("refs", nargs=-1, metavar="[CHECKPOINT]...", shell_complete=completion.checkpoints)
@all_and_latest("checkpoint")
@click.option(
    "-i", "--import", "import_from", type=click.Path(), metavar="SOURCE", help="Restore from an archive, past the store: as for ckpt import."
)
@digest_option
@protection.incoming_options
@click.option("--group", metavar="NAME[@N]", help="Restore the checkpoints of a group together: all or none.")
@click.option("-n", "--name", metavar="NAME", help="Give the container this name (and a new id).")
@click.option("-p", "--publish", multiple=True, metavar="PORT", help="Publish other ports than the checkpoint's ([IP:]HOST:CONTAINER[/PROTOCOL]).")
@click.option("--pod", metavar="POD", help="Restore into this pod.")
@click.option("-k", "--keep", is_flag=True, help="Keep CRIU's logs of a restore that went well.")
@click.option("--allow", multiple=True, metavar="KIND:VALUE", help="What a checkpoint from elsewhere may have: cap:SYS_ADMIN. Can be repeated.")
@click.option("--lazy", is_flag=True, help="Resume at once, memory follows.")
@click.option("--isolated", is_flag=True, help="As a copy NAME-isolated for analysis: no network but a loopback, volumes of its own, no hooks.")
@state_options(restoring=True)
@hooks_option
@click.option("--ignore-static-ip", is_flag=True, help="Take a new IP address.")
@click.option("--ignore-static-mac", is_flag=True, help="Take a new MAC address.")
@click.option("--print-stats", is_flag=True, help="Print podman's JSON of times (microseconds) and pages instead of names.")
@carrier_options
def command(
    session: Session,
    refs: tuple[str, ...],
    every: bool,
    latest: bool,
    import_from: str | None,
    digest: str | None,
    group: str | None,
    keep: bool,
    print_stats: bool,
    publish: tuple[str, ...],
    timeout_s: float | None,
    token_file: Path | None,
    token_command: str | None,
    header_file: Path | None,
    ca_file: Path | None,
    fingerprint: str | None,
    client_cert: Path | None,
    client_key: Path | None,
    insecure: bool,
    ssh_options: tuple[str, ...],
    allow: tuple[str, ...],
    **given: Any,
) -> int:
    """Bring checkpoints back to life.

    The checkpoint stays in the store. -a restores the newest checkpoint of every name that does not run.

    A checkpoint that was made elsewhere (imported, or restored with -i) gets what this host gives to any container. What it asks for
    beyond that (capabilities, devices, files of the host, ...) is listed and refused; --allow lets it have one such thing, as the list
    says, mount:DIR also what is below DIR.

    With --lazy the workload runs before its memory is there: page faults are served from the checkpoint, the rest is brought in the
    background by CRIU's lazy-pages daemon, which outlives ckpt. Until all of it is there the checkpoint cannot be removed and the
    workload cannot be saved or moved. Should the daemon be killed before that, or the checkpoint prove damaged, the missing memory
    is lost to the workload, which is then ended; the checkpoint stays, restore it again.
    """
    if group is not None:
        if refs or every or latest or import_from is not None:
            raise UsageError("--group names what to restore: leave checkpoints, --all, --latest and --import away")
        if given["name"] is not None or publish or given["pod"] is not None or given["lazy"]:
            raise UsageError("--name, --publish, --pod and --lazy are for single checkpoints, not for a group")
    elif import_from is not None:
        if refs or every or latest:
            raise UsageError("--import takes an archive instead of a checkpoint's name, --all or --latest")
    else:
        one_way(refs, every=every, latest=latest, what="checkpoint")
    if given["name"] is not None and (every or len(refs) > 1):
        raise UsageError("--name fits one checkpoint only")
    if digest is not None and import_from is None:
        raise UsageError("--digest goes with --import")
    session.need_root()
    incoming = protection.incoming(session, protection.take(given, protection.INCOMING))
    place = carriage.source(import_from) if import_from is not None else None
    reach = None if place is None else carriage.carrier(
        session, place, token_file=token_file, token_command=token_command, header_file=header_file, ca_file=ca_file, fingerprint=fingerprint,
        client_cert=client_cert, client_key=client_key, insecure=insecure, ssh_options=ssh_options,
    )  # fmt: skip
    from ckpt.ops import policy

    policy.Allowed.parse(allow)  # a wrong one is no configuration's fault
    limit_s = timeout_s if timeout_s is not None else session.settings.timeout_s
    options = RestoreOptions(publish=publish, timeout_s=limit_s, allow=(*session.settings.allow, *allow), **given)
    if group is not None:
        from ckpt.ops import group_restore as together

        outcomes = together.bring_back_group(
            group, options=options, store_root=session.store_root, emit=session.emit, keep=keep, incoming=incoming
        )
        return session.finish(outcomes, id_of="container", stats=_stats if print_stats else None)
    from ckpt.ops import restore as use_case

    outcomes = use_case.restore(
        refs, all=every, latest=latest, import_from=place, digest=carriage.digest(digest), carrier=reach, options=options,
        store_root=session.store_root, emit=session.emit, keep=keep, incoming=incoming,
    )  # fmt: skip
    return session.finish(outcomes, id_of="container", stats=_stats if print_stats else None)


def _stats(rows: Sequence[Row], took_s: float) -> object:
    """Podman's `container restore --print-stats` (pkg/domain/entities/types: RestoreReport), times in microseconds."""
    return {
        "podman_restore_duration": microseconds(took_s),
        "container_statistics": [
            {
                "Id": row["container_id"],
                "runtime_restore_duration": microseconds(row["stats"].get("restore_s")),
                "criu_statistics": {
                    "forking_time": row["stats"].get("forking_time_us", 0),
                    "restore_time": row["stats"].get("restore_time_us", 0),
                    "pages_restored": row["stats"].get("pages_restored", 0),
                },
            }
            for row in rows
        ],
    }
