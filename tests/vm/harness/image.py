"""The machine's disk and kernel: the lab's root file system with Debian's kernel and systemd, cached outside the checkout.

Debian's cloud kernel has ext4 built in and the driver of virtio's disks as a module: an initrd of busybox and that module is enough.
It has what the kernels of many test machines lack: soft-dirty tracking (CONFIG_MEM_SOFT_DIRTY), cgroup2 with all controllers, a real init.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from tests.lab.harness.cache import LabUnavailable, build_once, cache_directory, digest, prune
from tests.lab.harness.rootfs import rootfs, rootfs_digest

# fmt: off
PACKAGES = (
    "linux-image-cloud-amd64", "cpio", "xz-utils", "systemd", "systemd-sysv", "dbus", "udev", "kmod",
    "python3-pytest", "python3-pytest-timeout",
)
# fmt: on
DISK_SIZE = "6G"  # sparse
NETWORK = "[Match]\nName=eth0\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n"
"""As QEMU's user network has it, without asking."""
FILES = {
    "etc/fstab": "",  # the root is mounted by the initrd: nothing waits for udev to find it
    "etc/hostname": "vm\n",
    "etc/hosts": "127.0.0.1 localhost vm\n",
    "etc/machine-id": "",
    "etc/systemd/network/10-all.network": NETWORK,
    "etc/ssh/sshd_config.d/vm.conf": "PermitRootLogin prohibit-password\nUseDNS no\nMaxSessions 100\nHostKey /etc/ssh/ssh_host_ed25519_key\n",
    "etc/systemd/system/ssh.service.d/quick.conf": "[Service]\nExecStartPre=\n",
    # initramfs-tools need not pack anything: the kernel boots without.
    "etc/initramfs-tools/update-initramfs.conf": "update_initramfs=no\n",
}
INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox insmod /virtio_blk.ko
while ! /bin/busybox mount -t ext4 -o noatime /dev/vda /root; do /bin/busybox usleep 50000; done
/bin/busybox umount /dev
exec /bin/busybox switch_root /root /sbin/init
"""
"""The initrd's: Debian's would take seconds under emulation."""
NO_UNITS = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "e2scrub_all.timer", "man-db.timer"),
    *("e2scrub_reap.service", "systemd-networkd-wait-online.service", "redis-server.service", "podman-auto-update.timer", "podman.socket"),
    *("podman-restart.service", "podman-clean-transient.service", "systemd-timesyncd.service", "nftables.service", "getty@tty1.service"),
    *("nginx.service", "systemd-networkd-persistent-storage.service", "systemd-pstore.service", "modprobe@drm.service"),
    *("modprobe@efi_pstore.service",),
    *("modprobe@configfs.service", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    *("serial-getty@ttyS0.service", "systemd-random-seed.service", "systemd-update-utmp.service", "systemd-tmpfiles-clean.timer"),
    *("systemd-pcrphase.service", "systemd-hwdb-update.service", "ldconfig.service", "podman-auto-update.service"),
)
"""Masked: what a test machine does not need while it boots under emulation."""
RECIPE = 2
"""Raise it when the steps below change in a way that changes the result."""
NO_GENERATORS = ("systemd-ssh-generator", "systemd-gpt-auto-generator", "systemd-hibernate-resume-generator", "systemd-cryptsetup-generator")
_INITRD = """
mkdir -p /tmp/initrd/bin /tmp/initrd/dev /tmp/initrd/root
cd /tmp/initrd
cp /bin/busybox bin/
module=$(echo /lib/modules/$1/kernel/drivers/block/virtio_blk.ko*)
case $module in *.xz) xz -dc "$module" >virtio_blk.ko;; *.zst) zstd -dqc "$module" >virtio_blk.ko;; *) cp "$module" virtio_blk.ko;; esac
printf %s "$2" >init
chmod +x init
find . | cpio -o -H newc --quiet >/root/initrd
rm -rf /tmp/initrd
"""
_CHROOT = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}


def image_name() -> str:
    made_of = [PACKAGES, DISK_SIZE, FILES, INIT, NO_UNITS, NO_GENERATORS, _INITRD, RECIPE]
    return f"vm-{digest(rootfs_digest().encode(), json.dumps(made_of, sort_keys=True).encode())}"


def image_ready() -> bool:
    return (cache_directory() / image_name()).exists()


def image() -> Path:
    """A directory with `disk`, `vmlinuz`, `initrd` and `key`, root's ssh key (takes about a minute the first time).

    Raises:
        LabUnavailable: not root, no mirror.
    """
    made = build_once(image_name(), _build)
    prune("vm-", 2)
    return made


def _step(argv: list[str], timeout_s: float = 900.0) -> None:
    env = _ENV | {key: value for key, value in os.environ.items() if key.lower() in ("http_proxy", "https_proxy", "no_proxy")}
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s)
    if done.returncode:
        tail = "\n".join(done.stdout.decode(errors="replace").splitlines()[-12:])
        raise LabUnavailable(f"building the virtual machine's disk: {' '.join(argv[:6])} … ended with {done.returncode}\n{tail}")


def _build(into: Path) -> None:
    if os.geteuid() != 0:
        raise LabUnavailable("building the virtual machine's disk needs root")
    root = into / "root"
    _step(["cp", "-a", "--reflink=auto", str(rootfs()), str(root)])
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
    chroot = [*_CHROOT, f"--root={root}", "--mount-proc"]
    _step([*chroot, "apt-get", "update"])
    _step([*chroot, "apt-get", "install", "-y", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold", *PACKAGES])
    _step([*chroot, "apt-get", "clean"])
    _step([*chroot, "systemctl", "enable", "ssh.service", "systemd-networkd.service"])
    for unit in NO_UNITS:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    generators = root / "etc/systemd/system-generators"
    generators.mkdir()
    for name in NO_GENERATORS:
        (generators / name).symlink_to("/dev/null")
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
    _step([*chroot, "ssh-keygen", "-q", "-A"])
    _step(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vm", "-f", str(into / "key")])
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(into / "key.pub", root / "root/.ssh/authorized_keys")
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    shutil.copy(kernels[-1], into / "vmlinuz")
    _step([*chroot, "sh", "-ec", _INITRD, "sh", kernels[-1].name.removeprefix("vmlinuz-"), INIT])
    (root / "root/initrd").rename(into / "initrd")
    _step(["mke2fs", "-q", "-F", "-t", "ext4", "-J", "size=16", "-d", str(root), str(into / "disk"), DISK_SIZE])
    shutil.rmtree(root)
