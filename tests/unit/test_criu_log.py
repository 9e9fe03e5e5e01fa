"""Every rule of the log table with a line of CRIU: from real runs, or composed from the format in CRIU's sources."""

from __future__ import annotations

import pytest

from ckpt.criu.log import RULES, Verb, explain

NOISE = "(00.000001) Error (criu/util.c:1594): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
TASK = "(00.001000) Dumping task (pid: 812 comm: redis-server)\n"
DUMP_END = "(00.024996) Error (criu/cr-dump.c:1545): Dump files (pid: 812) failed with -1\n(00.025598) Error (criu/cr-dump.c:1975): Dumping FAILED.\n"
RESTORE_END = (
    "(00.032963)   5024: Error (criu/files.c:1221): Unable to open fd=3 id=0xd\n"
    "(00.033000) Error (criu/cr-restore.c:1265): 5024 exited, status=1\n"
    "(00.032995) Error (criu/cr-restore.c:2331): Restoring FAILED.\n"
)

CASES: list[tuple[str, Verb, str, str]] = [
    ("io_uring", "dump", "Error (criu/proc_parse.c:502): Unknown shit 600 (anon_inode:[io_uring])", "process 812 (redis-server) holds an io_uring"),
    ("io_uring", "dump", "Error (criu/files-ext.c:98): Can't dump file 5 of that type [600] (unknown anon_inode:[io_uring])", "holds an io_uring"),
    ("io_uring-fd", "dump", "pie: 4972: Error (criu/pie/parasite.c:588): send_fds failed (-22)", "most likely an io_uring"),
    (
        "anon-inode",
        "dump",
        "Error (criu/files-ext.c:98): Can't dump file 7 of that type [600] (unknown anon_inode:[perf_event])",
        "anon_inode:perf_event",
    ),
    ("gpu", "dump", "Error (criu/files-ext.c:98): Can't dump file 9 of that type [20666] (chr 195:255 /dev/nvidiactl)", "/dev/nvidiactl"),
    ("gpu", "dump", "Error (cuda_plugin.c:397): cuda_plugin: CHECKPOINT_DEVICES failed with OS call failed", "GPU"),
    ("inotify", "dump", "Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle", "inotify"),
    ("tcp-dump", "dump", "Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.", "connected TCP socket"),
    ("tcp-image", "restore", "5024: Error (criu/sk-inet.c:912): inet: Connected TCP socket in image", "connected TCP sockets in it"),
    ("in-flight", "dump", "Error (criu/sk-inet.c:185): inet: In-flight connection (l) for 5b84", "did not accept yet"),
    (
        "file-locks",
        "dump",
        "Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
        "file locks",
    ),
    ("tty", "dump", "Error (criu/tty.c:410): tty: Found slave peer index 1 without correspond master peer", "attached to a terminal"),
    (
        "session",
        "dump",
        "Error (criu/pstree.c:304): The root process 4966 is not a session leader. Consider using --shell-job option",
        "session leader",
    ),
    ("pid-taken", "restore", "Error (criu/cr-restore.c:1237): Can't fork for 5327: File exists", "pid 5327 is taken"),
    ("tid-taken", "restore", "pie: 12: Error (criu/pie/restorer.c:1900): Unable to create a thread: -17", "thread is taken"),
    (
        "file-changed",
        "restore",
        "5024: Error (criu/files-reg.c:2175): File tmp/data has bad size 4 (expect 0)",
        "/tmp/data is not what it was at dump time: bad size 4",
    ),
    ("file-changed", "restore", "5048: Error (criu/files-reg.c:2294): File tmp/data has bad mode 0100755 (expect 0100644)", "bad mode 0100755"),
    (
        "file-changed",
        "restore",
        "9: Error (criu/files-reg.c:2153): File usr/lib/libc.so.6 has bad build-ID",
        "/usr/lib/libc.so.6 is not what it was at dump time: bad build-ID",
    ),
    (
        "device",
        "restore",
        "9: Error (criu/files-reg.c:2353): Can't open file dev/fuse on restore: No such file or directory",
        "the device /dev/fuse is missing",
    ),
    (
        "file-missing",
        "restore",
        "5036: Error (criu/files-reg.c:2353): Can't open file tmp/data on restore: No such file or directory",
        "missing here: /tmp/data",
    ),
    ("file-open", "restore", "5036: Error (criu/files-reg.c:2353): Can't open file srv/x on restore: Permission denied", "/srv/x: Permission denied"),
    (
        "bind-address",
        "restore",
        "5062: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket (id 13): Cannot assign requested address",
        "address",
    ),
    ("bind-address", "restore", "5062: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket back: Cannot assign requested address", "address"),
    ("bind-in-use", "restore", "5076: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket (id 13): Address already in use", "port"),
    ("space", "dump", "Error (criu/image.c:600): Can't write image: No space left on device", "disk is full"),
    ("vdso", "dump", "Error (criu/vdso.c:401): vdso: Unexpected rt vDSO area bounds", "kernel's vDSO"),
    ("sockopt", "dump", "Error (criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported", "socket option 1:16"),
    ("kerndat", "dump", "Error (criu/crtools.c:280): Could not initialize kernel features detection.", "does not work with this kernel"),
    ("unix-external", "dump", "Error (criu/sk-unix.c:874): unix: External socket is used. Consider using --ext-unix-sk option.", "unix socket"),
    ("unix-external", "dump", "Error (criu/sk-unix.c:881): unix: Can't dump half of stream unix connection. name: a; peer name: b", "unix socket"),
    ("ghost", "dump", "Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/big of 314572800 size, increase limit", "/tmp/big, 314572800 bytes"),
    ("link-remap", "dump", "Error (criu/files-reg.c:1140): Can't create link remap for /srv/f. Use link-remap option.", "/srv/f"),
    ("nested-ns", "dump", "Error (criu/namespaces.c:460): Can't dump nested pid namespace for 5004", "nested namespace (pid)"),
    ("mount-external", "restore", "1: Error (criu/mount.c:3141): mnt: No mapping for 655:/data mountpoint", "/data"),
    ("mount-external", "dump", "Error (criu/mount.c:753): mnt: 1021:/etc/hosts doesn't have a proper root mount", "/etc/hosts"),
    ("cpuset", "restore", "Error (criu/cgroup.c:1490): cg: Failed writing 0-1 to cpuset//a/b/cpuset.cpus: Permission denied", "cpuset"),
    ("cgroup", "restore", "Error (criu/cgroup.c:700): cg: Can't open 3 cgroup", "control group"),
    (
        "network-lock",
        "dump",
        "Error (criu/net.c:3332): net: Locking network failed: iptables-restore returned 1. This may be connected to",
        "iptables",
    ),
    ("network-lock", "dump", "Error (criu/util.c:642): execvp(\"iptables-restore\", ...) failed: No such file or directory", "iptables"),
    ("freeze", "dump", "Error (criu/cr-dump.c:1808): Timeout reached. Try to interrupt: 0", "frozen in time"),
    ("seccomp", "restore", "pie: 5: Error (criu/pie/restorer.c:546): seccomp: SECCOMP_SET_MODE_FILTER returned -22 on tid 5", "seccomp"),
    ("apparmor", "restore", "Error (criu/lsm.c:406): apparmor LSM specified but apparmor not supported by kernel", "AppArmor"),
    ("traced", "dump", "Error (compel/src/lib/infect.c:417): Unable to detach from 812: No such process", "debugger"),
    ("cpu", "restore", "Error (criu/arch/x86/cpu.c:223): cpu: CPU instruction capabilities do not match run time", "CPU"),
    (
        "device-dump",
        "dump",
        "Error (criu/files-ext.c:98): Can't dump file 4 of that type [20600] (chr 10:232 /dev/kvm)",
        "descriptor 4, chr 10:232 /dev/kvm",
    ),
    ("memory-tracking", "dump", "Error (criu/mem.c:46): BUG at criu/mem.c:46", "memory tracking"),
    ("version", "restore", "Error (criu/image.c:554): Head magic doesn't match for files.img", "another version of CRIU"),
    ("script", "dump", "Error (criu/action-scripts.c:88): Script /var/lib/ckpt/jobs/1/hold exited with 256", "called off"),
    ("permission", "dump", "Error (criu/namespaces.c:300): Can't setns 9/net: Operation not permitted", "denied a right"),
]


@pytest.mark.parametrize(("rule", "verb", "line", "expected"), CASES)
def test_rule(rule: str, verb: Verb, line: str, expected: str) -> None:
    text = NOISE + TASK + f"(00.020000) {line}\n" + (DUMP_END if verb == "dump" else RESTORE_END)
    cause = explain(text, verb=verb)
    assert expected in cause.message
    assert cause.line_number == 3
    assert cause.hint == next(r.hint for r in RULES if r.name == rule)
    assert "{" not in cause.message


def test_every_rule_has_a_case() -> None:
    assert {r.name for r in RULES} == {name for name, *_ in CASES}


def test_noise_alone_is_no_cause() -> None:
    cause = explain(NOISE + "(00.025598) Error (criu/cr-dump.c:1975): Dumping FAILED.\n", verb="dump")
    assert "RLIMIT" not in cause.message


def test_unknown_error_is_quoted_without_control_characters() -> None:
    cause = explain(NOISE + "(00.1) Error (criu/x.c:1): something\x1b[31mnew\n" + DUMP_END, verb="dump")
    assert cause.message == "CRIU says: something [31mnew"
    assert cause.line_number == 2


def test_no_log_and_killed() -> None:
    assert "no log" in explain("", verb="dump").message
    assert "killed" in explain("(00.1) Collecting fds (pid: 8)\n", verb="dump").message
    assert "killed" in explain(NOISE, verb="restore").message
