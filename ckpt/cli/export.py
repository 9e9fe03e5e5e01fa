"""`ckpt export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ckpt.cli import completion, protection
from ckpt.cli.carriage import carrier, carrier_options, destination, remember
from ckpt.cli.common import F, Session, dump_options, hooks_option, override_option, state_options, verb
from ckpt.errors import CkptError, UsageError


def compress_options(function: F) -> F:
    function = click.option("--level", type=click.IntRange(0, 22), metavar="N", help="Compression level.")(function)
    kinds = click.Choice(["zstd", "gzip", "none"], case_sensitive=False)
    return click.option("-c", "--compress", type=kinds, help="How to pack (default zstd).")(function)


def _need_root_for_container(session: Session, ref: str) -> None:
    """A checkpoint in one's own store can be read by anybody; what else `ref` may be the engines tell, and those are root's."""
    if os.geteuid() == 0:
        return
    from ckpt.store.catalog import Catalog

    try:
        Catalog(session.store_root).find(ref)
    except (CkptError, OSError):
        session.need_root()


@verb(
    "export",
    examples=(
        ("ckpt export web@2 web.tar.zst", "write a checkpoint of the store as an archive"),
        ("ckpt export -R podman:web web.tar.zst", "save a running container straight to an archive"),
        ("ckpt export web - | ssh b ckpt import -", "to the store of another host"),
        ("ckpt export web root@b:/srv/web.tar.zst", "to a file on another host, over ssh"),
        ("ckpt export web web.age --encrypt age:age1...", "encrypted: age -d opens it, and so does ckpt"),
        ("ckpt export web https://b:7443/web.tar.zst", "to a web server, goes on after a break where the server can"),
        ("ckpt export web oci://reg:5000/ns/web:1 --as image", "to a registry, as an image that podman restores too"),
    ),
)
@click.argument("ref", metavar="CHECKPOINT|TARGET", shell_complete=completion.both)
@click.argument("dest", metavar="[DEST]", required=False, type=click.Path())
@click.option("-o", "--output", metavar="DEST", type=click.Path(), help="The same as DEST.")
@compress_options
@protection.outgoing_options
@click.option("-R", "--leave-running", is_flag=True, help="Let a running container run on.")
@click.option("--as", "form", type=click.Choice(["artifact", "image"]), help="In a registry: an OCI artifact (default), or an image.")
@click.option("--subject", metavar="REF", help="In a registry: the container image that the artifact belongs to.")
@carrier_options
@state_options()
@hooks_option
@override_option
def command(
    session: Session,
    ref: str,
    dest: str | None,
    output: str | None,
    compress: str | None,
    level: int | None,
    leave_running: bool,
    form: str | None,
    subject: str | None,
    token_file: Path | None,
    token_command: str | None,
    header_file: Path | None,
    ca_file: Path | None,
    fingerprint: str | None,
    client_cert: Path | None,
    client_key: Path | None,
    insecure: bool,
    ssh_options: tuple[str, ...],
    **state: Any,
) -> int:
    """Write a checkpoint as one archive that podman restores too.

    DEST is a file, - (stdout), [USER@]HOST:PATH or ssh://[USER@]HOST[:PORT]/PATH, an http(s) URL (ckpt serve, a web server that takes
    PUT, or a presigned URL of object storage), or oci://REGISTRY/NAME:TAG, with the credentials of podman login. It is there whole, or not
    at all. A link that breaks is tried again for a minute; over ssh, and to servers that can, the upload goes on where it was. Paths of ssh
    URLs are absolute, /~/PATH is below the home directory.

    A checkpoint in the store is written as it is. The name of a running container saves it on the way: it ends (unless -R) when the
    other end has the whole archive safely.
    """
    if (dest is None) == (output is None):
        raise UsageError("say where to, once", hint="ckpt export CHECKPOINT FILE; - is stdout")
    outgoing = protection.outgoing(session, protection.take(state, protection.OUTGOING))
    place = destination(session, dest or output or "")
    if (form or subject) and place.scheme != "oci":
        raise UsageError("--as and --subject are for registries", hint="ckpt export CHECKPOINT oci://REGISTRY/NAME:TAG")
    carriage = carrier(
        session, place, token_file=token_file, token_command=token_command, header_file=header_file, ca_file=ca_file, fingerprint=fingerprint,
        client_cert=client_cert, client_key=client_key, insecure=insecure, ssh_options=ssh_options,
        registry_form=form, registry_subject=subject,
    )  # fmt: skip
    if "@" not in ref:
        _need_root_for_container(session, ref)
    from ckpt.ops import export as use_case

    outcome = use_case.export(
        ref,
        place,
        compress=(compress or session.settings.compress).lower(),
        level=level,
        leave_running=leave_running,
        options=dump_options(session, leave_running=leave_running, **state),
        carrier=carriage,
        outgoing=outgoing,
        store_root=session.store_root,
        emit=session.emit,
    )
    remember(place, carriage)
    return session.finish([outcome], id_of="checkpoint")
