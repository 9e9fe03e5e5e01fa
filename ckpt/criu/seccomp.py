"""What the seccomp filters in CRIU images let through: CRIU gives them back as they are, whatever the container's configuration says.

The filters are classic BPF (linux/filter.h, linux/bpf_common.h) over `struct seccomp_data` (seccomp(2)). They are not run but followed: arguments
of a system call are unknown, so every branch on them is taken both ways, and a filter cannot hide behind one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ckpt.criu import images
from ckpt.errors import ArchiveInvalid

_X86_64, _I386, _AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
_X32: Final = 0x40000000
CALLS: Final[dict[int, dict[str, int]]] = {
    _X86_64: {
        "acct": 163, "bpf": 321, "delete_module": 176, "finit_module": 313, "fsconfig": 431, "fsmount": 432, "fsopen": 430, "fspick": 433,
        "init_module": 175, "ioperm": 173, "iopl": 172, "kexec_file_load": 320, "kexec_load": 246, "mount": 165, "mount_setattr": 442,
        "move_mount": 429, "open_by_handle_at": 304, "open_tree": 428, "perf_event_open": 298, "pivot_root": 155, "quotactl": 179, "reboot": 169,
        "setdomainname": 171, "sethostname": 170, "setns": 308, "settimeofday": 164, "swapoff": 168, "swapon": 167, "umount2": 166, "unshare": 272,
        "userfaultfd": 323, "vhangup": 153,
    },
    _I386: {
        "acct": 51, "bpf": 357, "delete_module": 129, "finit_module": 350, "init_module": 128, "ioperm": 101, "iopl": 110, "kexec_load": 283,
        "mount": 21, "open_by_handle_at": 342, "perf_event_open": 336, "pivot_root": 217, "reboot": 88, "sethostname": 74, "setns": 346,
        "settimeofday": 79, "swapon": 87, "umount2": 52, "unshare": 310, "userfaultfd": 374,
    },
    _AARCH64: {
        "acct": 89, "bpf": 280, "delete_module": 106, "finit_module": 273, "fsconfig": 431, "fsmount": 432, "fsopen": 430, "init_module": 105,
        "kexec_file_load": 294, "kexec_load": 104, "mount": 40, "mount_setattr": 442, "move_mount": 429, "open_by_handle_at": 265, "open_tree": 428,
        "perf_event_open": 241, "pivot_root": 41, "quotactl": 60, "reboot": 142, "sethostname": 161, "setns": 268, "settimeofday": 170,
        "swapon": 224, "umount2": 39, "unshare": 97, "userfaultfd": 282, "vhangup": 58,
    },
}  # fmt: skip
"""System calls with which a container can reach beyond itself, by architecture (AUDIT_ARCH_*) and number."""

_INSTRUCTION: Final = struct.Struct("<HBBI")
_LENGTH_CAP: Final = 4096  # BPF_MAXINSNS
_CHAIN_CAP: Final = 64
_STEPS_CAP: Final = 200_000
_LETS_THROUGH: Final = 0x7FC00000  # SECCOMP_RET_USER_NOTIF; TRACE, LOG and ALLOW are above it

_Program = list[tuple[int, int, int, int]]


def let_through(images_dir: Path, filters: Iterable[int], expected: frozenset[str]) -> list[str]:
    """Names in `CALLS` that one of these filters (with those below it) lets through although they are not `expected`.

    Args:
        filters: numbers of filters in seccomp.img, the last one that each thread installed.

    Raises:
        ArchiveInvalid: there is no such filter, or it is no program.
    """
    wanted = set(filters)
    if not wanted:
        return []
    entry = next(images._entries(images_dir / "seccomp.img", "SECCOMP", "seccomp_pb2", "seccomp_entry"), None)
    known = list(entry.seccomp_filters) if entry is not None else []
    found: set[str] = set()
    programs: dict[int, _Program] = {}
    for number in wanted:
        chain: list[_Program] = []
        at: int | None = number
        while at is not None:
            if not 0 <= at < len(known) or len(chain) >= _CHAIN_CAP:
                raise ArchiveInvalid("seccomp.img has no such filter")
            if at not in programs:
                programs[at] = _program(bytes(known[at].filter))
            chain.append(programs[at])
            at = known[at].prev if known[at].HasField("prev") else None
        for architecture, calls in CALLS.items():
            for name, call in calls.items():
                numbers = (call, call | _X32) if architecture == _X86_64 else (call,)
                if name not in expected and any(all(_may_allow(one, n, architecture) for one in chain) for n in numbers):
                    found.add(name)
    return sorted(found)


def _program(data: bytes) -> _Program:
    if not data or len(data) % _INSTRUCTION.size or len(data) > _LENGTH_CAP * _INSTRUCTION.size:
        raise ArchiveInvalid("seccomp.img has a filter that is no program")
    return list(_INSTRUCTION.iter_unpack(data))


def _may_allow(program: _Program, number: int, architecture: int) -> bool:
    """Whether some arguments make the filter let the call through. What cannot be followed may."""
    states: list[tuple[int, int | None, int | None, tuple[int | None, ...]]] = [(0, 0, 0, (0,) * 16)]
    seen = set(states)
    steps = 0
    while states:
        at, a, x, memory = states.pop()
        steps += 1
        if at >= len(program) or steps > _STEPS_CAP:
            return True
        code, yes, no, k = program[at]
        kind, mode, source = code & 7, code & 0xE0, code & 8
        following: list[tuple[int, int | None, int | None, tuple[int | None, ...]]] = []
        if kind in (0, 1):  # BPF_LD, BPF_LDX
            value: int | None = None
            if mode == 0x20:
                value = {0: number, 4: architecture}.get(k)
            elif mode == 0x00:
                value = k
            elif mode == 0x60:
                value = memory[k % 16]
            elif mode == 0x80:
                value = 64  # the size of struct seccomp_data
            following = [(at + 1, value, x, memory) if kind == 0 else (at + 1, a, value, memory)]
        elif kind in (2, 3):  # BPF_ST, BPF_STX
            changed = list(memory)
            changed[k % 16] = a if kind == 2 else x
            following = [(at + 1, a, x, tuple(changed))]
        elif kind == 4:  # BPF_ALU
            following = [(at + 1, _calculate(code & 0xF0, a, x if source else k), x, memory)]
        elif kind == 5:  # BPF_JMP
            following = [(at + 1 + step, a, x, memory) for step in _jumps(code & 0xF0, a, x if source else k, k, yes, no)]
        elif kind == 6:  # BPF_RET
            verdict = a if code & 0x18 == 0x10 else k
            # KILL_PROCESS is the smallest, as a signed number.
            if verdict is None or (not verdict & 0x80000000 and verdict & 0x7FFF0000 >= _LETS_THROUGH):
                return True
            continue
        else:  # BPF_MISC
            following = [(at + 1, a, a, memory) if mode == 0 and not code & 0x80 else (at + 1, x, x, memory)]
        for state in following:
            if state not in seen:
                seen.add(state)
                states.append(state)
    return False


def _calculate(what: int, a: int | None, other: int | None) -> int | None:
    if what == 0x80:  # BPF_NEG
        return None if a is None else -a & 0xFFFFFFFF
    if a is None or other is None:
        return None
    shift = other if other < 32 else 32
    value = {
        0x00: a + other, 0x10: a - other, 0x20: a * other, 0x40: a | other, 0x50: a & other, 0x60: a << shift, 0x70: a >> shift, 0xA0: a ^ other,
    }.get(what)  # fmt: skip
    return None if value is None else value & 0xFFFFFFFF


def _jumps(what: int, a: int | None, other: int | None, k: int, yes: int, no: int) -> tuple[int, ...]:
    if what == 0x00:  # BPF_JA
        return (k,)
    if a is None or other is None:
        return (yes, no)
    holds = {0x10: a == other, 0x20: a > other, 0x30: a >= other, 0x40: bool(a & other)}.get(what)
    return (yes, no) if holds is None else (yes if holds else no,)
