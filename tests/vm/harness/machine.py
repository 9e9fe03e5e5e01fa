"""One virtual machine: boot it, run programs in it over ssh, restart it, and it is gone with the process that made it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.lab.harness.cache import LabUnavailable, cache_directory, locked

from .image import image, image_name

QEMU: Final = "qemu-system-x86_64"
QEMU_IMG: Final = "qemu-img"
NEEDED: Final = {QEMU: "qemu-system-x86", QEMU_IMG: "qemu-utils", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "mke2fs": "e2fsprogs"}
"""program -> Debian package"""
BOOT_LIMIT_S: Final = 240.0
SSH: Final = (
    *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8"),
)


class VmError(AssertionError):
    """A program in the machine failed or took too long, or the machine did not come up; what it said is in the message."""


class Vm:
    """A Debian machine with systemd, podman, crun, runc and CRIU, emulated (no /dev/kvm needed). Its disk is a throw-away copy.

    Args:
        memory_mib: of the machine.
        cpus: virtual ones; each is a thread of the emulator.
    """

    def __init__(self, *, memory_mib: int = 2048, cpus: int = 2) -> None:
        self._memory_mib, self._cpus = memory_mib, cpus
        self._stack = contextlib.ExitStack()
        self._qemu: subprocess.Popen[bytes] | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Vm:
        made = prepare()
        with self._stack:
            self._stack.enter_context(locked(cache_directory() / f"{image_name()}.lock", shared=True))
            self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-vm-", dir="/var/tmp")))
            self._key = self.directory / "key"
            shutil.copy(made / "key", self._key)
            self._key.chmod(0o600)
            self.port = _free_port()
            self._stack.callback(self._end)
            self._made = made
            self._disk = self.directory / "disk"
            self._make_disk()
            self._start()
            self.wait_for_boot()
            self._share_connection()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def _make_disk(self) -> None:
        """Its own disk over the common one. It outlives the emulator, as a disk does a power cut."""
        argv = [QEMU_IMG, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(self._made / "disk"), str(self._disk)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise VmError(f"cannot make the disk: {done.stderr}")

    def _start(self) -> None:
        # Huge pages by request only: the kernel marks one as a whole, with small ones it can be said exactly what must be read.
        # Nehalem without cx16: what QEMU 7.2's emulation runs this kernel on without faults. cache=unsafe: what the machine synchronises
        # goes to this machine's page cache and no further; killing the emulator loses none of it. Should we be killed, it goes with us.
        argv = [
            *(QEMU, "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "Nehalem,-cx16", "-m", str(self._memory_mib), "-smp", str(self._cpus)),
            *("-display", "none", "-no-user-config", "-nodefaults", "-kernel", str(self._made / "vmlinuz"), "-initrd", str(self._made / "initrd")),
            *("-append", "console=ttyS0 quiet net.ifnames=0 mitigations=off transparent_hugepage=madvise"),
            *("-drive", f"file={self._disk},format=qcow2,if=none,id=d0,cache=unsafe", "-device", "virtio-blk-pci,drive=d0"),
            *("-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{self.port}-:22", "-device", "virtio-net-pci,netdev=n0,romfile="),
            *("-chardev", f"file,id=c0,path={self.directory / 'console'},append=on", "-serial", "chardev:c0"),
            *("-device", "virtio-rng-pci"),
        ]
        dies_with_us = ["setpriv", "--pdeathsig", "KILL", "--"]
        with open(self.directory / "qemu.log", "ab") as log:
            self._qemu = subprocess.Popen([*dies_with_us, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def power_cut(self) -> None:
        """Cut its power in the middle of whatever it does: what it has not synchronised is lost. It is off until `power_on`."""
        self._end()

    def power_on(self) -> None:
        """Start it again on its disk and wait until programs can be run.

        Raises:
            VmError: it did not come up.
        """
        self._start()
        self.wait_for_boot()
        self._share_connection()

    def _share_connection(self) -> None:
        """One connection for all programs: a new one costs seconds of emulated arithmetic."""
        argv = [*self.ssh("")[:-1], "-M", "-N"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._master = subprocess.Popen(argv, **quiet)  # type: ignore[call-overload]

    def _end_connection(self) -> None:
        if self._master is not None:
            self._master.kill()
            self._master.wait()
            self._master = None
            (self.directory / "ssh").unlink(missing_ok=True)

    def _end(self) -> None:
        self._end_connection()
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._qemu = None

    def wait_for_boot(self, *, other_than: str = "", limit_s: float = BOOT_LIMIT_S) -> str:
        """Wait until programs can be run; the boot's id. `other_than`: the id of a boot that is to be over.

        Raises:
            VmError: not in time; with the end of the console.
        """
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self._qemu is None or self._qemu.poll() is not None:
                raise VmError(f"the emulator ended: {(self.directory / 'qemu.log').read_text(errors='replace')[-2000:]}\n{self.console()[-3000:]}")
            try:
                found = self.boot_id()
            except VmError:
                found = ""
            if found and found != other_than:
                return found
            time.sleep(0.3)
        raise VmError(f"no boot in {limit_s:g} s:\n{self.console()[-3000:]}")

    def boot_id(self) -> str:
        return self.run(["cat", "/proc/sys/kernel/random/boot_id"], timeout_s=10).strip()

    def console(self) -> str:
        """What the kernel and init said on the serial console."""
        with contextlib.suppress(OSError):
            return (self.directory / "console").read_text(errors="replace")
        return ""

    def ssh(self, command: str) -> list[str]:
        """The command line that runs a shell command in the machine."""
        shared = ["-o", f"ControlPath={self.directory / 'ssh'}"]  # where there is none yet, ssh makes a connection of its own
        return ["ssh", *SSH, *shared, "-i", str(self._key), "-p", str(self.port), "root@127.0.0.1", command]

    def run(self, argv: Sequence[str] | str, *, input: bytes | None = None, timeout_s: float = 120.0, check: bool = True) -> str:
        """Run a program (or a shell command) to its end; what it wrote, standard error included.

        Raises:
            VmError: a status other than 0, or over time.
        """
        command = argv if isinstance(argv, str) else shlex.join(argv)
        with subprocess.Popen(self.ssh(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                said, _ = process.communicate(input or b"", timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
                raise VmError(f"in the machine: {command}: no end after {timeout_s:g} s\n{said.decode(errors='replace')}") from None
            except BaseException:
                process.kill()
                raise
        text = said.decode(errors="replace")
        if check and process.returncode:
            raise VmError(f"in the machine: {command}: status {process.returncode}\n{text}")
        return text

    def send(self, source: Path, names: Sequence[str], into: str) -> None:
        """Copy files and directories `names` below `source` into a directory of the machine.

        Raises:
            VmError: it did not work.
        """
        tar = ["tar", "-C", str(source), "--exclude=__pycache__", "-cf", "-", *names]
        with subprocess.Popen(tar, stdout=subprocess.PIPE) as packing:
            unpacking = self.ssh(f"mkdir -p {shlex.quote(into)} && tar -C {shlex.quote(into)} -xf - --no-same-owner")
            done = subprocess.run(unpacking, stdin=packing.stdout, capture_output=True, timeout=300)
        if done.returncode or packing.returncode not in (0, 1):  # 1: a file changed meanwhile
            raise VmError(f"cannot copy to the machine: {done.stderr.decode(errors='replace')}")

    def reboot(self, command: str = "systemctl reboot", *, timeout_s: float = 60.0) -> str:
        """Restart it with a command of its own and wait until it has started all; what the command said.

        Args:
            timeout_s: for the command to be over, and again for the machine to go down.

        Raises:
            VmError: the command failed, or it did not come back.
        """
        before = self.boot_id()
        said = self.run(f"{{ {command}; }} 2>&1; echo \"ended with $?\"", check=False, timeout_s=timeout_s)
        if (status := said.rpartition("ended with ")[2].strip()) not in ("", "0", "100"):  # "": cut off by the reboot itself
            raise VmError(f"in the machine: {command}: status {status}\n{said}")
        self._end_connection()
        self.wait_for_boot(other_than=before, limit_s=BOOT_LIMIT_S + timeout_s)
        self._share_connection()
        return said

    def wait_for_units(self, timeout_s: float = BOOT_LIMIT_S) -> str:
        """Wait until init has started all; its word for the machine's state (systemctl(1), is-system-running).

        Raises:
            VmError: not in time.
        """
        return self.run(["systemctl", "is-system-running", "--wait"], check=False, timeout_s=timeout_s).strip()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def missing_programs() -> list[str]:
    return [program for program in NEEDED if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin") is None]


def check_prerequisites() -> None:
    """Raises LabUnavailable when this machine cannot run the virtual one."""
    if os.geteuid() != 0:
        raise LabUnavailable("the virtual machine's disk is made by root")
    if os.uname().machine != "x86_64":
        raise LabUnavailable("the virtual machine is an x86-64 one")
    if missing := missing_programs():
        raise LabUnavailable(f"missing programs: {', '.join(missing)} (apt-get install {' '.join(sorted({NEEDED[m] for m in missing}))})")


def prepare() -> Path:
    """Make the disk (once; cached outside the checkout).

    Raises:
        LabUnavailable: not on this machine; the message says why.
    """
    check_prerequisites()
    return image()


def install_missing() -> None:
    """Install what the virtual machine needs and this machine lacks (Debian, root; nothing happens elsewhere)."""
    packages = sorted({NEEDED[program] for program in missing_programs()})
    if not packages or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    print(f"installing {', '.join(packages)}", file=sys.stderr)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for argv in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *packages]):
        subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=900)
