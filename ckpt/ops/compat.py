"""Can a checkpoint of one host run on another? Facts against facts, without I/O."""

from __future__ import annotations

import re
from typing import Final

from ckpt.model import Finding, HostFacts

FLAGS_NAMED: Final = 8
"""So many missing CPU flags are named, the rest is counted."""

_PAGE_PROTOCOL_LINE: Final = (4, 2)
"""CRIU 4.2 changed the page server's header and the pagemap entries, with no version handshake."""

# What only the kernel or a hypervisor uses: a program cannot come to depend on it, so its absence stops nothing.
_KERNEL_ONLY: Final = frozenset(
    """acpi amd_dcm amd_ppin aperfmperf apic arat arch_capabilities arch_lbr arch_perfmon art avic bts bus_lock_detect cat_l2 cat_l3 cdp_l2 cdp_l3
    constant_tsc cpb cppc cpuid cpuid_fault cqm cqm_llc cqm_mbm_local cqm_mbm_total cqm_occup_llc dca de decodeassists ds_cpl dtes64 dtherm dts
    ept ept_ad epb est extapic extd_apicid flexpriority flush_l1d flushbyasid hfi ht hw_pstate hwp hwp_act_window hwp_epp hwp_notify hwp_pkg_req
    hypervisor ibpb ibpb_exit_to_user ibrs ibrs_enhanced ibs ibt ida intel_ppin intel_pt invpcid invpcid_single kaiser lbrv mba mca mce md_clear
    monitor mtrr nonstop_tsc nonstop_tsc_s3 npt nrip_save nx overflow_recov pae pat pausefilter pbe pcid pconfig pdcm pdpe1gb pebs perfctr_core
    perfctr_l2 perfctr_llc perfctr_nb perfmon_v2 pfthreshold pge pln proc_feedback pse pse36 pti pts rdt_a rep_good retpoline
    rtm_always_abort sdbg sep sev sev_es sev_snp skinit smap smca sme smep smx split_lock_detect ss ssbd stibp succor svm svm_lock tm tm2 tme topoext
    tpr_shadow tsc_adjust tsc_deadline_timer tsc_known_freq tsc_reliable tsc_scale tsx_force_abort umip v_spec_ctrl v_vmsave_vmload vgif virt_ssbd
    vmcb_clean vme vmmcall vmx vnmi vpid wdt x2apic x2avic xtopology xtpr""".split()
)


def compare(source: HostFacts, destination: HostFacts, *, memory_bytes: int, disk_bytes: int) -> list[Finding]:
    """What stands in the way of running on `destination` what runs on `source`, one finding a subject.

    Args:
        memory_bytes: memory that the workload has now.
        disk_bytes: space that its checkpoint takes in the destination's store.
    """
    return [
        _arch(source, destination),
        *([_cpu(source, destination)] if source.arch == destination.arch else []),
        *_criu(source, destination),
        *_kernel(source, destination),
        _room("memory", "of memory", memory_bytes, destination.memory_available_bytes, "free memory on the destination"),
        _room("disk space", "in the store", disk_bytes, destination.store_free_bytes, "free some space on the destination (ckpt prune)"),
    ]


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "4.2.1" and "6.12.57+deb13-amd64" as (4, 2, 1) and (6, 12, 57); () for none."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def size_text(size_bytes: int) -> str:
    """A size for people: "412 MiB"."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _arch(source: HostFacts, destination: HostFacts) -> Finding:
    if not source.arch or not destination.arch:
        return Finding("architecture", "warning", "the architectures could not be compared")
    if source.arch != destination.arch:
        return Finding("architecture", "error", f"{source.arch} here, {destination.arch} there", "processes cannot move between architectures")
    return Finding("architecture", "ok", source.arch)


def _cpu(source: HostFacts, destination: HostFacts) -> Finding:
    if not source.cpu_flags or not destination.cpu_flags:
        return Finding("CPU", "warning", "the CPU flags could not be compared")
    missing = sorted(set(source.cpu_flags) - set(destination.cpu_flags) - _KERNEL_ONLY)
    if not missing:
        return Finding("CPU", "ok", "all CPU flags are there")
    named = ", ".join(missing[:FLAGS_NAMED])
    more = f" and {len(missing) - FLAGS_NAMED} more" if len(missing) > FLAGS_NAMED else ""
    hint = "a program may use them; move to a CPU that has them, or mask them on the source (hypervisor, GLIBC_TUNABLES) and start it again"
    return Finding("CPU", "error", f"the destination's CPU lacks {named}{more}", hint)


def _criu(source: HostFacts, destination: HostFacts) -> list[Finding]:
    here, there = version_tuple(source.criu_version), version_tuple(destination.criu_version)
    if not there:
        return [Finding("CRIU version", "error", "CRIU is not installed on the destination", "install CRIU there")]
    if not here:
        return [Finding("CRIU version", "warning", f"unknown here, {destination.criu_version} there")]
    versions = f"{source.criu_version} -> {destination.criu_version}"
    if _padded(there) < _padded(here):
        hint = "install the same or a newer CRIU on the destination"
        return [Finding("CRIU version", "error", f"{versions}: the destination's is older and may not read these CRIU images", hint)]
    if (here < _PAGE_PROTOCOL_LINE) != (there < _PAGE_PROTOCOL_LINE):
        hint = "install CRIU 4.2 or newer on both hosts"
        return [Finding("CRIU version", "warning", f"{versions}: memory cannot be streamed between CRIU before and after 4.2", hint)]
    return [Finding("CRIU version", "ok", versions)]


def _padded(version: tuple[int, ...]) -> tuple[int, ...]:
    return (*version, 0, 0, 0)[:3]


def _kernel(source: HostFacts, destination: HostFacts) -> list[Finding]:
    here, there = version_tuple(source.kernel)[:2], version_tuple(destination.kernel)[:2]
    if not here or not there:
        return [Finding("kernel", "warning", "the kernels could not be compared")]
    if there < here:
        hint = "features of the newer kernel that the program uses may be missing"
        return [Finding("kernel", "warning", f"{source.kernel} -> {destination.kernel}: the destination's is older", hint)]
    return [Finding("kernel", "ok", f"{source.kernel} -> {destination.kernel}")]


def _room(check: str, where: str, needed_bytes: int, free_bytes: int, hint: str) -> Finding:
    if not free_bytes:
        return Finding(check, "warning", f"it is not known how much is free {where}")
    if free_bytes < needed_bytes:
        return Finding(check, "error", f"{size_text(needed_bytes)} {where} needed, {size_text(free_bytes)} free", hint)
    return Finding(check, "ok", f"{size_text(needed_bytes)} needed, {size_text(free_bytes)} free")
