"""CRIU's log turned into a cause and a next step.

The wording of CRIU's messages is in its sources (criu/*.c); RULES is the table, one row for each failure seen in practice.
`cr_errmsg` of the RPC is not used: it is the *first* error line, which is often harmless.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Verb = Literal["dump", "restore"]


@dataclass(frozen=True, slots=True)
class Cause:
    """Why CRIU failed, in one sentence, what to do next, and the line of the log (from 1; 0: not found) that says so."""

    message: str
    hint: str
    line_number: int


@dataclass(frozen=True, slots=True)
class Rule:
    """A failure: pattern of CRIU's line, message (its groups; {process}: who was being dumped), hint."""

    name: str
    pattern: str
    message: str
    hint: str
    verb: Verb | None = None


NOISE: Final = re.compile(
    r"RLIMIT_NOFILE|Can't setup RLIMIT|Can't set SIGCHLD|kerndat.*cache|Can't (load|find) plugin|Disable pidfd|cgroupd: recv req error", re.I
)
"""Error lines that are harmless."""

GENERIC: Final = re.compile(
    r"(Dumping FAILED|Restoring FAILED|Pre-dumping FAILED|Dump files \(pid: \d+\) failed|Unable to (dump|restore) .* failed|"
    r"exited, (status|signal)=|"
    r"killed by signal 9|One of more action scripts failed|Can't dump file \d+ .*failed|Failed to (restore|dump) task|"
    r"cr-restore\.c:\d+\): \d+ (exited|killed)|"
    r"Error sending cmd|Can't wait|Can't write|Error during|task \d+ (exited|failed)|Unable to kill|uns: Can't stop)",
    re.I,
)
"""Error lines that only say that an earlier one happened."""

_CHANGED = "the same file must be there, unchanged, where the restore runs: put the version from dump time back, or dump again"

RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "io_uring",
        r"anon_inode:\[io_uring\]",
        "{process} holds an io_uring, which CRIU cannot save",
        "start it with io_uring off (redis: --io-threads 1, node: UV_USE_IO_URING=0, or sysctl kernel.io_uring_disabled=2), then try again",
    ),
    Rule(
        "io_uring-fd",
        # Newer kernels refuse to hand an io_uring over a unix socket, so CRIU never learns what it was.
        r"send_fds failed \(-22\)",
        "{process} holds a descriptor that the kernel does not hand over, most likely an io_uring, which CRIU cannot save",
        "start it with io_uring off (redis: --io-threads 1, node: UV_USE_IO_URING=0, or sysctl kernel.io_uring_disabled=2), then try again",
        "dump",
    ),
    Rule(
        "anon-inode",
        r"\(?anon_inode:\[?(?P<kind>[\w-]+)\]?",
        "{process} holds a kernel object that CRIU cannot save (anon_inode:{kind})",
        "find out which feature of the program makes it and turn that off",
        "dump",
    ),
    Rule(
        "gpu",
        r"(?P<device>/dev/(?:nvidia[\w-]*|kfd|dri/\w+)|cuda_plugin|cuda-checkpoint|amdgpu_plugin|(?:CHECKPOINT|PAUSE|RESUME)_DEVICES)",
        "{process} uses the GPU ({device}), which CRIU alone cannot save or restore",
        "install CRIU's GPU plugin (CUDA: cuda-checkpoint and criu-cuda-plugin; AMD: criu-amdgpu-plugin), or stop the work on the GPU first",
    ),
    Rule(
        "inotify",
        r"fsnotify:.*(?:Can't dump that handle|[Cc]an't (?:find|dump|open))|irmap: .*[Cc]an't|Can't dump that handle",
        "{process} watches files by inotify or fanotify on a file system (overlayfs) where CRIU cannot find them again",
        "turn file watching off in the program, or put the watched folder on a volume or tmpfs",
        "dump",
    ),
    Rule(
        "tcp-dump",
        r"Connected TCP socket, consider using",
        "{process} has a connected TCP socket",
        "dump with --tcp-established to carry the connections along, or close them first",
        "dump",
    ),
    Rule(
        "tcp-image",
        r"Connected TCP socket in image",
        "the checkpoint has connected TCP sockets in it",
        "restore with --tcp-established",
        "restore",
    ),
    Rule(
        "in-flight",
        r"In-flight connection",
        "{process} has a connection that it did not accept yet",
        "try again in a moment, or dump with --tcp-established (the client will have to connect again)",
        "dump",
    ),
    Rule("file-locks", r"Some file locks are hold", "{process} holds file locks", "dump (and restore) with --file-locks", "dump"),
    Rule(
        "tty",
        r"Found slave peer index \d+ without|tty: .*(?:There is no|Can't find).*(?:master|slave)|tty: Unable to find.*index",
        "{process} is attached to a terminal that belongs to a program outside of the tree",
        "start it without the terminal (setsid, </dev/null >log 2>&1), or dump with --shell-job to attach to another terminal on restore",
    ),
    Rule(
        "session",
        r"(?:The root process (?P<pid>\d+) is not a session leader|A session leader of .* is outside|Can't find a session leader)",
        "the process tree does not begin with its own session leader",
        "dump with --shell-job, or start the program with setsid",
    ),
    Rule(
        "pid-taken",
        r"Can't fork for (?P<pid>\d+): File exists",
        "pid {pid} is taken on this host",
        "end the process that has it, or restore where it is free: on another host, or in an own pid namespace (unshare --pid --fork)",
        "restore",
    ),
    Rule(
        "tid-taken",
        r"Unable to create a thread: -17\b",
        "the number of a thread is taken on this host",
        "end the process that has it, or restore in an own pid namespace (unshare --pid --fork)",
        "restore",
    ),
    Rule(
        "file-changed",
        r"File (?P<path>.+?) has bad (?P<what>size|mode|build-ID)(?: length)? ?(?P<detail>[^\n]*)",
        "{path} is not what it was at dump time: bad {what} {detail}",
        _CHANGED,
        "restore",
    ),
    Rule(
        "device",
        r"Can't open (?:file )?(?P<path>/?dev/\S+?)(?: on restore)?: ",
        "the device {path} is missing on this host",
        "make the device available here (and to the container), then restore again",
        "restore",
    ),
    Rule(
        "file-missing",
        r"(?:Can't open file (?P<path>\S+?)(?: on restore)?|(?P<path2>/?\S+)): (?:No such file or directory)",
        "a file or folder that the program had open is missing here: {path}{path2}",
        _CHANGED,
        "restore",
    ),
    Rule(
        "file-open",
        r"Can't open file (?P<path>\S+?)(?: on restore)?: (?P<why>.+)",
        "a file that the program had open cannot be opened here: {path}: {why}",
        _CHANGED,
        "restore",
    ),
    Rule(
        "bind-address",
        r"Can't (?:bind|connect) inet socket.*: Cannot assign requested address",
        "an address that the program was bound to does not exist on this host",
        "give this host (or the container) the address that it had at dump time, or restore without the connections (--tcp-close)",
        "restore",
    ),
    Rule(
        "bind-in-use",
        r"Can't (?:bind|connect) inet socket.*: Address already in use",
        "a port that the program was bound to is in use on this host",
        "ss -tlnp shows who has it; end that program, then restore again",
        "restore",
    ),
    Rule("space", r"No space left on device", "the disk is full", "free space in the store, or point --store to a larger disk"),
    Rule(
        "vdso",
        r"Unexpected rt vDSO|vdso: (?:Can't|Failed to|Unable)",
        "this version of CRIU does not work with this kernel (it does not understand the kernel's vDSO)",
        "install a newer CRIU: 4.2.1 or later",
    ),
    Rule(
        "sockopt",
        r"Can't [gs]et (?P<opt>\d+:\d+) opt",
        "this version of CRIU does not work with the sockets of this kernel (socket option {opt})",
        "install a newer CRIU: 4.2.1 or later, which Linux 6.16 and later need",
    ),
    Rule(
        "kerndat",
        r"Could not initialize kernel features detection|kerndat.*failed",
        "this version of CRIU does not work with this kernel",
        "criu check says what is missing; install a newer CRIU",
    ),
    Rule(
        "unix-external",
        r"External socket is used|Can't dump half of stream unix connection|(?:unix|sk-unix).*(?:external|Can't connect)",
        "{process} has a unix socket connected to a program outside of the tree",
        "close that connection first (D-Bus, X11, a database on this host), or dump the other program in the same tree",
    ),
    Rule(
        "ghost",
        r"Can't dump ghost file (?P<path>.+) of (?P<size>\d+) size",
        "a deleted but open file is too large to carry along: {path}, {size} bytes",
        "have the program close or truncate the file (log rotation), or raise ghost-limit in /etc/criu/default.conf",
        "dump",
    ),
    Rule(
        "link-remap",
        r"Can't create link remap for (?P<path>.+?)\. |Can't link remap to (?P<path2>\S+):",
        "a deleted but open file cannot be linked back: {path}{path2}",
        "have the program close the file, or dump where its folder can be written to",
    ),
    Rule(
        "nested-ns",
        r"Can't dump nested (?P<kind>\w+) namespace|Nested mount namespaces are not supported|Can't dump a pid namespace",
        "{process} is in a nested namespace ({kind}), which CRIU cannot save",
        "checkpoint the inner container itself, or run the program without a sandbox (browsers: --no-sandbox)",
        "dump",
    ),
    Rule(
        "mount-external",
        r"(?:No mapping for \d+:(?P<mp>\S+) mountpoint|Unable to statfs (?P<mp2>\S+)|(?P<mp3>\d+:\S+) doesn't have a proper root mount|"
        r"mount .*\d+:(?P<mp4>\S+) .*unreachable sharing|autodetected external mount)",
        "a mount of the program comes from outside of it and is not declared: {mp}{mp2}{mp3}{mp4}",
        "the same host folder must exist where the restore runs; give the mount to the engine as a volume",
    ),
    Rule(
        "cpuset",
        r"Failed writing .* to \S*(?:cpuset)\S*|Restoring special cpuset props failed",
        "the cgroup's cpuset cannot be set here: this host has other CPUs, or an empty parent cpuset",
        "start the container without --cpuset-cpus, or fill cpuset.cpus of the parent cgroup",
        "restore",
    ),
    Rule(
        "cgroup",
        r"cg: .*(?:Can't|Failed|failed)",
        "a control group of the workload cannot be saved or made again",
        "see the log; a container that owns its cgroup namespace, or manage-cgroups ignore in CRIU's configuration, avoids it",
    ),
    Rule(
        "network-lock",
        r"Locking network failed|Iptables configuration failed|Locking connection failed|without libnftables|"
        r"execvp\(\"ip6?tables[\w-]*\".*failed",
        "CRIU could not lock the network: iptables or nftables does not work here",
        "install iptables (iptables-restore) and nftables, also in a minimal container host, then try again",
    ),
    Rule(
        "freeze",
        r"Timeout reached|Unable to freeze cgroup|Unable to freeze",
        "the processes could not be frozen in time; one of them may hang in the kernel (disk, NFS)",
        "look for processes in state D (ps -eo pid,stat,wchan,comm), then try again",
        "dump",
    ),
    Rule(
        "seccomp",
        r"seccomp.*(?:fail|not support|returned|Can't)|(?:suspend|suspending) seccomp",
        "the seccomp filter of the program cannot be saved or restored on this kernel",
        "CRIU needs CONFIG_CHECKPOINT_RESTORE and CAP_SYS_ADMIN; as a test run it with --security-opt seccomp=unconfined",
    ),
    Rule(
        "apparmor",
        r"apparmor|lsm:.*(?:fail|Can't)|can't write.*attr/current",
        "the AppArmor or SELinux confinement of the program cannot be saved or restored here",
        "load the same profile on this host (apparmor_parser -r), or restore where the same security module runs",
    ),
    Rule(
        "traced",
        r"Unable to (?:detach from|interrupt task:?) \d+|Unseizable|SEIZE \d+: |(?:Can't|Cannot) (?:attach to|interrupt)",
        "a process cannot be stopped: a debugger or strace is attached to it, or it is a zombie",
        "detach the debugger, then try again",
        "dump",
    ),
    Rule(
        "cpu",
        r"(?:CPU|cpu).*(?:capabilities|not supported|do not match|mismatch)|cpu: .*(?:fail|not support)",
        "the CPU of this host lacks what the checkpoint needs",
        "restore on a host with the same or a newer CPU of the same family",
    ),
    Rule(
        "device-dump",
        r"Can't dump file (?P<fd>\d+) of that type \[(?P<mode>\d+)\] \((?P<what>.*)\)",
        "{process} has a file open that CRIU cannot save: descriptor {fd}, {what}",
        "have the program close it before the dump",
        "dump",
    ),
    Rule(
        "memory-tracking",
        r"Tracking memory is not available|BUG at criu/mem\.c",
        "this kernel has no memory tracking (soft-dirty)",
        "dump without pre-dump",
        "dump",
    ),
    Rule(
        "version",
        r"(?:Head m|M)agic doesn't match|(?:Image|Unsupported) .*version|img_version",
        "the CRIU images are damaged or were written by another version of CRIU",
        "ckpt verify checks the digests; CRIU must be at least as new as the one that made the dump",
        "restore",
    ),
    Rule(
        "script",
        r"Script \S*/hold exited with",
        "the operation was called off while it was held",
        "the reason is in the message of the command that was running",
    ),
    Rule(
        "permission",
        r"(?:Operation not permitted|Permission denied)\s*$",
        "CRIU was denied a right that it needs",
        "run as root; in a container or virtual host give CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE and CAP_SYS_PTRACE",
    ),
)

_ERROR: Final = re.compile(r"^(?:\(\d+\.\d+\)\s*)?(?:pie:\s*)?(?:\d+:\s*)?(?:pie:\s*)?(?:\d+:\s*)?Error\s*\((?P<at>[^)]*)\):\s*(?P<text>.*)$")
_WARN: Final = re.compile(r"Warn\s+\([^)]*\):\s*(?P<text>.*(?:io_uring|vDSO|iptables-restore|No space).*)$")
_TASK: Final = re.compile(r"Dumping task \(pid: (?P<pid>\d+) comm: (?P<comm>[^)]*)\)")
_ROOM_BYTES: Final = 1 << 18
_CLEAN: Final = re.compile(r"[\x00-\x1f\x7f]+")


def explain(log_text: str, *, verb: Verb) -> Cause:
    """The cause that a CRIU log tells.

    Args:
        log_text: dump.log, restore.log, or what CRIU said on standard error.
        verb: which of the two failed.
    """
    if not log_text.strip():
        hint = "criu check tells whether CRIU works on this host, dmesg whether it was killed"
        return Cause("CRIU left no log: it was killed, or could not start", hint, 0)
    task = ""
    errors: list[tuple[int, str, str, str]] = []  # line number, where in CRIU, text, process
    finished = False
    for number, line in enumerate(log_text.splitlines(), 1):
        if found := _TASK.search(line):
            task = f"process {found['pid']} ({found['comm']})"
        finished = finished or "FAILED" in line or "finished successfully" in line
        match = _ERROR.match(line) or _WARN.search(line)
        if match and not NOISE.search(line):
            errors.append((number, match.groupdict().get("at", ""), match["text"], task))
    # The last line that we know is nearest to the cause; generic ones only follow from it.
    for number, _at, text, process in reversed(errors):
        for rule in RULES:
            if rule.verb in (None, verb) and (found := re.search(rule.pattern, text)):
                return Cause(_fill(rule.message, found, process), rule.hint, number)
    for number, _at, text, _process in reversed(errors):
        if not GENERIC.search(f"{_at}): {text}"):
            return Cause(f"CRIU says: {_CLEAN.sub(' ', text).strip()}", "the log tells more", number)
    if errors:
        return Cause(f"CRIU says: {_CLEAN.sub(' ', errors[-1][2]).strip()}", "the log tells more", errors[-1][0])
    if not finished:
        return Cause("CRIU was killed in the middle", "dmesg tells whether memory ran out; try again", len(log_text.splitlines()))
    return Cause(f"the {verb} failed and CRIU's log does not say why", "the log tells more", 0)


def disk_full(log_path: Path) -> Cause | None:
    """The cause that a log cannot tell, because it was cut short itself: its file system has no room left."""
    try:
        room = os.statvfs(log_path if log_path.exists() else log_path.parent)
    except OSError:
        return None
    if room.f_bavail * room.f_frsize >= _ROOM_BYTES:
        return None
    return next(Cause(rule.message, rule.hint, 0) for rule in RULES if rule.name == "space")


def _fill(template: str, match: re.Match[str], process: str) -> str:
    groups = {key: _CLEAN.sub(" ", value or "").strip() for key, value in match.groupdict().items()}
    for key, value in groups.items():
        if key.startswith("path") and value and not value.startswith("/"):
            groups[key] = f"/{value}"  # CRIU's paths are relative to the root of the tree
    return template.format_map({"process": process or "a process", **groups}).strip()
