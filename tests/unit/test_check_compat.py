"""compare(): facts of two hosts against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckpt.host import facts
from ckpt.model import Finding, HostFacts
from ckpt.ops.compat import compare, size_text, version_tuple

HERE = HostFacts(
    hostname="a",
    arch="x86_64",
    kernel="6.12.57+deb13-amd64",
    criu_version="4.2.1",
    cpu_flags=("avx2", "fpu", "sse2", "vmx"),
    cpus=2,
    memory_available_bytes=8 << 30,
    store_free_bytes=20 << 30,
)


def found(there: HostFacts, here: HostFacts = HERE, *, memory_bytes: int = 1 << 30, disk_bytes: int = 1 << 30) -> dict[str, Finding]:
    findings = compare(here, there, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    assert len({f.check for f in findings}) == len(findings)
    return {f.check: f for f in findings}


def bad(there: HostFacts, here: HostFacts = HERE, **sizes: int) -> dict[str, str]:
    return {f.check: f.severity for f in found(there, here, **sizes).values() if f.severity != "ok"}


def test_equal_hosts() -> None:
    assert bad(HERE) == {}


def test_another_architecture_blocks_and_hides_the_flags() -> None:
    assert bad(replace(HERE, arch="aarch64", cpu_flags=("asimd",))) == {"architecture": "error"}


def test_missing_cpu_flags_block_extra_ones_do_not() -> None:
    assert bad(replace(HERE, cpu_flags=(*HERE.cpu_flags, "avx512f"))) == {}
    there = replace(HERE, cpu_flags=("fpu", "sse2", "vmx"))
    assert bad(there) == {"CPU": "error"}
    assert "avx2" in found(there)["CPU"].detail


def test_flags_that_only_the_kernel_sees_do_not_block() -> None:
    assert bad(replace(HERE, cpu_flags=("avx2", "fpu", "sse2"))) == {}


def test_at_most_eight_flags_are_named() -> None:
    here = replace(HERE, cpu_flags=tuple(f"x{n:02}" for n in range(20)))
    detail = found(replace(HERE, cpu_flags=("fpu",)), here)["CPU"].detail
    assert "x07" in detail and "x08" not in detail and "and 12 more" in detail


def test_unknown_flags_are_a_warning() -> None:
    assert bad(replace(HERE, cpu_flags=())) == {"CPU": "warning"}


def test_criu_absent_older_newer() -> None:
    assert bad(replace(HERE, criu_version="")) == {"CRIU version": "error"}
    assert bad(replace(HERE, criu_version="4.2")) == {"CRIU version": "error"}
    assert bad(replace(HERE, criu_version="4.10")) == {}
    assert bad(HERE, replace(HERE, criu_version="4.1.1")) == {"CRIU version": "warning"}
    assert bad(HERE, replace(HERE, criu_version="")) == {"CRIU version": "warning"}
    assert bad(replace(HERE, criu_version="4.2.0"), replace(HERE, criu_version="4.2")) == {}


def test_an_older_kernel_warns() -> None:
    assert bad(replace(HERE, kernel="6.1.0-41-amd64")) == {"kernel": "warning"}
    assert bad(replace(HERE, kernel="6.18.4")) == {}
    assert bad(replace(HERE, kernel="")) == {"kernel": "warning"}


def test_room() -> None:
    assert bad(HERE, memory_bytes=9 << 30) == {"memory": "error"}
    assert bad(HERE, disk_bytes=21 << 30) == {"disk space": "error"}
    assert bad(replace(HERE, memory_available_bytes=0, store_free_bytes=0)) == {"memory": "warning", "disk space": "warning"}


def test_versions_and_sizes() -> None:
    assert version_tuple("6.12.57+deb13-amd64") == (6, 12, 57)
    assert version_tuple("v4.2") == (4, 2)
    assert version_tuple("criu-dev") == ()
    assert [size_text(n) for n in (0, 900, 1536, 300 << 20, 3 << 29)] == ["0 B", "900 B", "1.5 KiB", "300 MiB", "1.5 GiB"]


def test_the_facts_of_this_host(tmp_path: Path) -> None:
    here = facts.gather(tmp_path / "not" / "there" / "yet")
    assert here.hostname and here.arch and version_tuple(here.kernel)
    assert here.cpu_flags == tuple(sorted(set(here.cpu_flags)))
    assert here.memory_available_bytes > 0 and here.store_free_bytes > 0 and len(here.boot_id) == 36
