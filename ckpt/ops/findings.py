"""What an open look at a workload (`OpenKinds`) means for its dump: findings, without I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ckpt.host.procfs import Holder, OpenKinds
from ckpt.model import Container, DumpOptions, Finding
from ckpt.ops.compat import size_text
from ckpt.ops.look import CriuOptions

NAMED: Final = 4
"""So many holders or paths are named, the rest is counted."""
_GPU_PLUGINS: Final = "CRIU's plugin for it (cuda_plugin, amdgpu_plugin)"


def of_workload(
    container: Container, kinds: OpenKinds, options: DumpOptions, *, criu: str = "CRIU", set_up: CriuOptions | None = None, gpu_plugin: bool = False
) -> list[Finding]:
    """Findings of everything that the tree holds, what is fine included where it needs an option.

    Args:
        criu: what to call CRIU.
        set_up: the options of CRIU that are in effect for this container (None: CRIU's defaults).
    """
    set_up = set_up or CriuOptions()
    return [
        Finding("processes", "ok", _processes(kinds)),
        *_unsupported(kinds, criu, gpu_plugin),
        *_unix(kinds, criu, set_up),
        *_tcp(kinds, options, set_up),
        *_locks(kinds, options),
        *_terminals(container, kinds, options),
        *_files(kinds, set_up),
        *_surroundings(container, kinds),
    ]


def is_process_tree(container: Container) -> bool:
    """True for a workload that is no container: session and terminal are then somebody else's, not its engine's."""
    return container.container_image is None and container.bundle_dir is None


def _processes(kinds: OpenKinds) -> str:
    count = len(kinds.pids) - len(kinds.entered)
    threads = f"{kinds.threads} {'thread' if kinds.threads == 1 else 'threads'}"
    return f"{count} {'process' if count == 1 else 'processes'}, {threads}, {size_text(kinds.dump_bytes)} of memory"


def _unsupported(kinds: OpenKinds, criu: str, gpu_plugin: bool) -> Iterable[Finding]:
    if kinds.io_uring:
        hint = "start it with io_uring off (an option of the program, or sysctl kernel.io_uring_disabled=2), then try again"
        yield Finding("io_uring", "error", f"{_who(kinds.io_uring)} {_holds(kinds.io_uring)} an io_uring, which {criu} cannot save", hint)
    if kinds.gpu:
        detail = f"{_who(kinds.gpu)} {_holds(kinds.gpu)} {_what(kinds.gpu)} open"
        if gpu_plugin:
            yield Finding("GPU", "warning", f"{detail}: left to {_GPU_PLUGINS}", "the same kind of GPU and driver must be where it is restored")
        else:
            yield Finding("GPU", "error", f"{detail}, and {criu} has no plugin for GPUs here", f"install {_GPU_PLUGINS}")
    if kinds.anon_unsupported:
        detail = f"{_who(kinds.anon_unsupported)} {_holds(kinds.anon_unsupported)} {_what(kinds.anon_unsupported)}, which {criu} cannot save"
        yield Finding("special files", "error", detail, "have the program close it")
    if kinds.sockets_unsupported:
        names = {h.what for h in kinds.sockets_unsupported}
        detail = (
            f"{_who(kinds.sockets_unsupported)} {_holds(kinds.sockets_unsupported)} a socket of {', '.join(sorted(names))}, which {criu} cannot save"
        )
        hint = "for Go programs: GODEBUG=multipathtcp=0" if any("MPTCP" in name for name in names) else "have the program close it"
        yield Finding("sockets", "error", detail, hint)
    if kinds.devices:
        detail = f"{_who(kinds.devices)} {_holds(kinds.devices)} the device {_what(kinds.devices)} open, which {criu} cannot save"
        yield Finding("devices", "error", detail, "have the program close it")
    if kinds.traced:
        tracers = ", ".join(sorted({h.what for h in kinds.traced}))
        yield Finding("traced", "error", f"{_who(kinds.traced)} is traced by process {tracers}", "detach the debugger or strace")
    if kinds.nested_namespaces:
        detail = f"{_who(kinds.nested_namespaces)} has a namespace of its own inside ({_what(kinds.nested_namespaces)}), which {criu} cannot save"
        yield Finding("namespaces", "error", detail, "containers or sandboxes inside a container cannot be saved with it: stop them first")


def _unix(kinds: OpenKinds, criu: str, set_up: CriuOptions) -> Iterable[Finding]:
    outside = kinds.unix_external + (() if set_up.ext_unix_sk else kinds.unix_datagram)
    if outside:
        detail = f"{_who(outside)} {_has(outside)} a unix socket connected to a process outside ({_what(outside)}), which {criu} cannot save"
        only_datagrams = not kinds.unix_external
        hint = "put ext-unix-sk into /etc/criu/runc.conf" if only_datagrams else "have the program close it, or connect over TCP instead"
        yield Finding("unix sockets", "error", detail, hint)
    elif not kinds.unix_known:
        yield Finding("unix sockets", "warning", "it could not be seen whether unix sockets lead outside", "load the kernel module unix_diag")
    elif kinds.unix_datagram:
        detail = f"datagram sockets connected to processes outside ({_what(kinds.unix_datagram)}): connected again at the restore"
        yield Finding("unix sockets", "warning", detail, "these sockets must be there when it is restored")


def _tcp(kinds: OpenKinds, options: DumpOptions, set_up: CriuOptions) -> Iterable[Finding]:
    count = kinds.tcp_established
    if count:
        connections = f"{count} open {'connection' if count == 1 else 'connections'}"
        if options.tcp_established is False:
            yield Finding("TCP", "error", f"{connections}, and saving them was switched off", "leave the option away, or give --tcp-established")
        else:
            yield Finding("TCP", "ok", f"{connections}: saved and restored (--tcp-established)")
    elif kinds.tcp_listen:
        yield Finding("TCP", "ok", f"no open connections, {kinds.tcp_listen} listening")
    if kinds.tcp_in_flight:
        waiting = f"{kinds.tcp_in_flight} {'connection waits' if kinds.tcp_in_flight == 1 else 'connections wait'} to be accepted"
        if set_up.skip_in_flight:
            yield Finding("TCP queue", "warning", f"{waiting}: dropped, their clients must connect again")
        else:
            # Not an error: a server that is alive takes them within moments.
            yield Finding("TCP queue", "warning", f"{waiting}, which CRIU refuses", "if they stay: put skip-in-flight into /etc/criu/runc.conf")


def _locks(kinds: OpenKinds, options: DumpOptions) -> Iterable[Finding]:
    if not kinds.file_locks:
        return
    locks = f"{kinds.file_locks} held"
    if options.file_locks is False:
        yield Finding("file locks", "error", f"{locks}, and saving them was switched off", "leave the option away, or give --file-locks")
    else:
        yield Finding("file locks", "ok", f"{locks}: saved and restored (--file-locks)")


def _terminals(container: Container, kinds: OpenKinds, options: DumpOptions) -> Iterable[Finding]:
    if not is_process_tree(container):
        if container.terminal:
            yield Finding("terminal", "ok", "the container's own, made anew at its restore")
        elif kinds.terminals:
            hint = "end what brought it in (a shell that was attached from outside)"
            yield Finding("terminal", "warning", f"{_who(kinds.terminals)} {_has(kinds.terminals)} {_what(kinds.terminals)} of the host open", hint)
        return
    if not kinds.needs_shell_job:
        return
    detail = (
        f"{_who(kinds.terminals)} {_has(kinds.terminals)} {_what(kinds.terminals)} open"
        if kinds.terminals
        else "its session belongs to another process"
    )
    if options.shell_job is False:
        yield Finding("terminal", "error", f"{detail}, and --shell-job was switched off", "leave the option away, or start it with setsid </dev/null")
    else:
        hint = "restore it from a terminal, or start it with setsid </dev/null >log 2>&1"
        yield Finding("terminal", "warning" if kinds.terminals else "ok", f"{detail}: saved as a shell job", hint if kinds.terminals else "")


def _files(kinds: OpenKinds, set_up: CriuOptions) -> Iterable[Finding]:
    ghosts = kinds.ghosts_over(set_up.ghost_limit_bytes)
    if ghosts:
        files = _listed([f"{f.path} ({size_text(f.size_bytes)})" for f in ghosts])
        hint = "restart what keeps them open, or raise ghost-limit in /etc/criu/runc.conf"
        yield Finding("deleted files", "error", f"deleted but open: {files}; CRIU saves up to {size_text(set_up.ghost_limit_bytes)} each", hint)
    linked = [f.path for f in kinds.deleted_files if f.linked]
    if linked and not set_up.link_remap:
        hint = "restart what keeps them open, or put link-remap into /etc/criu/runc.conf"
        yield Finding("linked files", "error", f"open under a name that was removed while another remains: {_listed(linked)}", hint)
    if kinds.inotify_overlay:
        detail = (
            f"{kinds.inotify_overlay} of {kinds.inotify} inotify watches are on an overlay file system, where CRIU often cannot find the files again"
        )
        yield Finding("inotify", "warning", detail, "put what is watched on a volume, or switch the watching off")
    elif kinds.inotify:
        yield Finding("inotify", "ok", f"{kinds.inotify} watches")


def _surroundings(container: Container, kinds: OpenKinds) -> Iterable[Finding]:
    if kinds.entered:
        detail = f"{_who(kinds.entered)} {'was' if len(kinds.entered) == 1 else 'were'} put in from outside (exec): not saved"
        yield Finding("exec sessions", "warning", detail, "end them first")
    if kinds.uninterruptible:
        detail = f"{_who(kinds.uninterruptible)} waits in the kernel and cannot be frozen now"
        yield Finding("blocked", "warning", detail, "look at its storage (NFS?), try again when it runs")
    if not is_process_tree(container):
        shared = [kind for kind in ("net", "pid", "ipc", "uts") if kind in kinds.host_namespaces]
        if shared:
            detail = f"shares {', '.join(shared)} with the host"
            yield Finding("host namespaces", "warning", detail, "its ports, connections and ids must be free wherever it is restored")
    if container.host_mounts:
        detail = _listed([f"{m.source} on {m.destination}" for m in container.host_mounts])
        yield Finding("host mounts", "warning", detail, "they are not saved and must be there when it is restored")
    if kinds.unreadable:
        detail = f"could not look into {_listed([str(pid) for pid in kinds.unreadable], noun='processes')}"
        yield Finding("permission", "warning", detail, "run it as root")


def _pairs(holders: Iterable[Holder] | Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    return list(dict.fromkeys((h[0], h[1]) for h in holders))


def _who(holders: Iterable[Holder] | Iterable[tuple[int, str]]) -> str:
    pairs = _pairs(holders)
    return ("process " if len(pairs) == 1 else "processes ") + _listed([f"{pid} ({comm})" for pid, comm in pairs])


def _holds(holders: Iterable[Holder] | Iterable[tuple[int, str]]) -> str:
    return "holds" if len(_pairs(holders)) == 1 else "hold"


def _has(holders: Iterable[Holder] | Iterable[tuple[int, str]]) -> str:
    return "has" if len(_pairs(holders)) == 1 else "have"


def _what(holders: Iterable[Holder]) -> str:
    return _listed(list(dict.fromkeys(h.what for h in holders)))


def _listed(items: list[str], *, noun: str = "") -> str:
    shown = ", ".join(items[:NAMED]) + (f" and {len(items) - NAMED} more" if len(items) > NAMED else "")
    return f"{noun} {shown}" if noun else shown
