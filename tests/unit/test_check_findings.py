"""What is found becomes findings, options and errors. The engine is made up; the process is a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from ckpt.criu import features
from ckpt.engines import registry
from ckpt.engines.base import Engine
from ckpt.errors import BusyError, CkptError, EngineUnavailable, FeatureMissing, IncompatibleHost, NoSpace, TargetNotFound
from ckpt.host.procfs import DeletedFile, Holder, OpenKinds
from ckpt.model import Capabilities, Container, ContainerImage, DumpOptions, Finding, HostFacts, HostMount, PortMapping, Target, Volume
from ckpt.ops import check, destination, look, resolve
from ckpt.ops.findings import of_workload

WEB = Container(
    engine="fake",
    id="f00d" * 16,
    name="web",
    state="running",
    runtime="/usr/bin/crun",
    container_image=ContainerImage("sha", "busybox"),
    networks=("podman",),
)


class Fake:
    """An engine with one container."""

    name = "fake"
    prefixes = ("fake",)
    capabilities = Capabilities(True, version="1.0", runtimes=("crun",))
    found: tuple[Container, ...] = (WEB,)
    fails = False

    def probe(self) -> Capabilities:
        return self.capabilities

    def containers(self) -> list[Container]:
        return list(self.found)

    def find(self, name: str) -> list[Container]:
        return [c for c in self.found if name == c.name]

    def describe(self, container: Container) -> Container:
        return container

    def preflight(self, container: Container, options: DumpOptions) -> list[Finding]:
        if self.fails:
            raise EngineUnavailable("no answer")
        return [Finding("runtime", "ok", "crun")]


def fake(**attributes: Any) -> Engine:
    engine = Fake()
    for key, value in attributes.items():
        setattr(engine, key, value)
    return cast(Engine, engine)


@pytest.fixture(autouse=True)
def criu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "facts", lambda: features.CriuFacts(version="4.2.1", path="/usr/sbin/criu", working=True))
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def listener() -> Iterator[int]:
    """A process that listens on TCP and holds a lock."""
    code = (
        "import socket, sys, tempfile, fcntl; s = socket.create_server(('127.0.0.1', 0)); f = tempfile.TemporaryFile(); "
        "fcntl.flock(f, fcntl.LOCK_EX); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield process.pid
        process.kill()


def severities(kinds: OpenKinds, container: Container = WEB, options: DumpOptions | None = None, **more: Any) -> dict[str, str]:
    return {f.check: f.severity for f in of_workload(container, kinds, options or DumpOptions(), **more) if f.check != "processes"}


def test_nothing_in_the_way() -> None:
    assert severities(OpenKinds(pids=(1,))) == {}


def test_io_uring_names_process_and_way_out() -> None:
    kinds = OpenKinds(pids=(812,), io_uring=((812, "redis-server"),))
    [finding] = [f for f in of_workload(WEB, kinds, DumpOptions(), criu="CRIU 4.2.1") if f.severity == "error"]
    assert finding.detail == "process 812 (redis-server) holds an io_uring, which CRIU 4.2.1 cannot save"
    assert "io_uring_disabled" in finding.hint


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (OpenKinds(tcp_established=2), {"TCP": "ok"}),
        (OpenKinds(tcp_in_flight=1), {"TCP queue": "warning"}),
        (OpenKinds(file_locks=1), {"file locks": "ok"}),
        (OpenKinds(inotify=3), {"inotify": "ok"}),
        (OpenKinds(inotify=3, inotify_overlay=1), {"inotify": "warning"}),
        (OpenKinds(gpu=(Holder(1, "x", "/dev/nvidia0"),)), {"GPU": "error"}),
        (OpenKinds(devices=(Holder(1, "x", "/dev/fuse"),)), {"devices": "error"}),
        (OpenKinds(anon_unsupported=(Holder(1, "x", "[userfaultfd]"),)), {"special files": "error"}),
        (OpenKinds(sockets_unsupported=(Holder(1, "x", "MPTCP"),)), {"sockets": "error"}),
        (OpenKinds(unix_external=(Holder(1, "x", "/dev/log"),)), {"unix sockets": "error"}),
        (OpenKinds(unix_datagram=(Holder(1, "x", "/dev/log"),)), {"unix sockets": "error"}),
        (OpenKinds(unix_known=False), {"unix sockets": "warning"}),
        (OpenKinds(traced=(Holder(1, "x", "99"),)), {"traced": "error"}),
        (OpenKinds(nested_namespaces=(Holder(1, "x", "pid"),)), {"namespaces": "error"}),
        (OpenKinds(deleted_files=(DeletedFile("/big", 2 << 20, False), DeletedFile("/small", 1, False))), {"deleted files": "error"}),
        (OpenKinds(deleted_files=(DeletedFile("/l", 2 << 20, True),)), {"linked files": "error"}),
        (OpenKinds(entered=((5, "sh"),)), {"exec sessions": "warning"}),
        (OpenKinds(terminals=(Holder(1, "sh", "/dev/pts/0"),)), {"terminal": "warning"}),
        (OpenKinds(host_namespaces=("net", "user", "time")), {"host namespaces": "warning"}),
        (OpenKinds(unreadable=(7,)), {"permission": "warning"}),
    ],
)
def test_what_is_found(kinds: OpenKinds, expected: dict[str, str]) -> None:
    assert severities(kinds) == expected


def test_a_gpu_with_criu_plugin_is_a_warning() -> None:
    assert severities(OpenKinds(gpu=(Holder(1, "x", "/dev/kfd"),)), gpu_plugin=True) == {"GPU": "warning"}


def test_options_of_criu_lift_what_they_are_for(tmp_path: Path) -> None:
    log = (Holder(1, "x", "/dev/log"),)
    files = (DeletedFile("/big", 2 << 20, False), DeletedFile("/linked", 0, True))
    kinds = OpenKinds(unix_datagram=log, deleted_files=files, tcp_in_flight=1)
    assert set(severities(kinds).values()) == {"error", "warning"}
    (tmp_path / "default.conf").write_text("# site\next-unix-sk\n")
    (tmp_path / "runc.conf").write_text("link-remap # yes\nghost-limit 300M\nskip-in-flight\n")
    (tmp_path / "crun.conf").write_text("ghost-limit 2M\n")
    set_up = look.criu_options(replace(WEB, runtime="runc"), root=tmp_path)
    assert set_up == look.CriuOptions(300 << 20, True, True, True)
    assert severities(kinds, set_up=set_up) == {"unix sockets": "warning", "TCP queue": "warning"}
    assert severities(OpenKinds(unix_external=log), set_up=set_up) == {"unix sockets": "error"}
    assert look.criu_options(WEB, root=tmp_path) == look.CriuOptions(2 << 20, ext_unix_sk=True)
    assert look.criu_options(WEB, root=tmp_path / "none") == look.CriuOptions()
    assert look.criu_options(replace(WEB, runtime="criu"), root=tmp_path / "none").link_remap


def test_an_option_switched_off_against_the_workload_blocks() -> None:
    assert severities(OpenKinds(tcp_established=1, file_locks=1), options=DumpOptions(tcp_established=False, file_locks=False)) == {
        "TCP": "error",
        "file locks": "error",
    }


def test_host_mounts_are_a_warning() -> None:
    assert severities(OpenKinds(), replace(WEB, host_mounts=(HostMount("/srv", "/data"),))) == {"host mounts": "warning"}


def test_long_lists_are_cut() -> None:
    kinds = OpenKinds(io_uring=tuple((pid, "x") for pid in range(10)))
    assert "and 6 more hold an" in next(f.detail for f in of_workload(WEB, kinds, DumpOptions()) if f.check == "io_uring")


def test_decide_looks_and_keeps_what_was_said(listener: int) -> None:
    web = replace(WEB, pid=listener)
    assert check.decide(fake(), web, DumpOptions()) == DumpOptions(tcp_established=True, file_locks=True, shell_job=False)
    said = DumpOptions(tcp_established=False, file_locks=False, shell_job=True)
    assert check.decide(fake(), web, said) == said
    tree = replace(web, container_image=None)
    assert check.decide(fake(), tree, DumpOptions()).shell_job is True  # its session is the test's
    assert check.decide(fake(), replace(web, pid=None), DumpOptions()).tcp_established is False


def test_local_findings_of_a_real_process(listener: int) -> None:
    found = {f.check: f for f in check.local_findings(fake(), replace(WEB, pid=listener), DumpOptions())}
    assert found["state"].severity == found["CRIU"].severity == found["runtime"].severity == found["file locks"].severity == "ok"
    assert found["TCP"].detail == "no open connections, 1 listening"


def test_a_container_that_does_not_run_blocks() -> None:
    findings = check.local_findings(fake(), replace(WEB, state="paused"), DumpOptions())
    with pytest.raises(BusyError) as caught:
        check.raise_on_error("web", findings)
    assert caught.value.message == "web cannot be checkpointed: it is paused, not running"
    assert caught.value.where == "web is untouched"
    assert caught.value.hint == "unpause it first"


def test_criu_that_does_not_work_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        features, "facts", lambda: features.CriuFacts(version="3.17.1", path="x", reason="CRIU 3.17.1 does not work on this kernel: no vDSO")
    )
    with pytest.raises(FeatureMissing, match="does not work on this kernel"):
        check.raise_on_error("web", check.local_findings(fake(), WEB, DumpOptions()))


def test_an_engine_that_does_not_answer_is_a_warning() -> None:
    found = {f.check: f.severity for f in check.local_findings(fake(fails=True), WEB, DumpOptions())}
    assert found["runtime"] == "warning"


def test_raise_on_error_passes_warnings() -> None:
    check.raise_on_error("web", [Finding("inotify", "warning", "x")])


@pytest.mark.parametrize(("name", "error"), [("disk space", NoSpace), ("CPU", IncompatibleHost), ("name", BusyError), ("io_uring", FeatureMissing)])
def test_each_finding_has_its_error(name: str, error: type[CkptError]) -> None:
    with pytest.raises(error):
        check.raise_on_error("web", [Finding(name, "error", "x")], to="root@b")


def test_check_of_several_targets_reports_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(target: Target) -> tuple[Engine, Container]:
        if target.name != "web":
            raise TargetNotFound("there is no such container")
        return fake(), WEB

    monkeypatch.setattr(resolve, "resolve", resolved)
    reports = check.check([Target("web"), Target("nope")])
    assert [(r.target, r.ok) for r in reports] == [("web", True), ("nope", False)]
    with pytest.raises(TargetNotFound):
        check.check([Target("nope")])


def there(monkeypatch: pytest.MonkeyPatch, engine: Engine, container: Container = WEB, **request: Any) -> tuple[dict[str, Any], dict[str, Finding]]:
    """The destination's answer and what it means, with this machine as both hosts."""
    monkeypatch.setattr(registry, "by_name", lambda name: engine)
    report = destination.destination_report({**destination.destination_request(container), **request}, store_root=Path("/"))
    facts = replace(destination.facts_from(report["facts"]), memory_available_bytes=1 << 40, store_free_bytes=1 << 40)
    report["facts"] = {key: getattr(facts, key) for key in report["facts"]}
    findings = destination.destination_findings(container, report, source=facts, kinds=OpenKinds(pids=(1,)), disk_bytes=0)
    return report, {f.check: f for f in findings}


def test_a_free_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    report, found = there(monkeypatch, fake(found=(), has_container_image=lambda image: False))
    assert report["names"] == [] and report["container_image"] is False
    assert {f.severity for f in found.values()} == {"ok"}, found


def test_a_destination_with_everything_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        web = replace(
            WEB,
            ports=(PortMapping("", port, 80),),
            networks=("backend",),
            addresses=("10.1.2.3",),
            volumes=(Volume("data", Path("/x"), "/data"),),
            host_mounts=(HostMount("/not/there", "/y"),),
        )
        other = replace(web, id="1" * 64)
        engine = fake(found=(other,), volume_names=lambda: ["data"], network_names=lambda: ["podman"])
        report, found = there(monkeypatch, engine, web)
    assert report["names"] == ["web"] and report["ports_busy"] == [("tcp", port)] and report["addresses_busy"] == ["10.1.2.3"]
    errors = {check for check, f in found.items() if f.severity == "error"}
    assert errors == {"name", "ports", "networks", "addresses", "volumes", "host mounts there"}
    assert found["container image"].severity == "warning"  # this engine cannot tell


LAN = {"driver": "macvlan", "subnets": ["10.1.2.0/24", "fd77::/64"], "interface": "lo", "shared": True}


@pytest.mark.parametrize(
    ("lan", "severities", "says"),
    [
        (LAN, {"addresses": "ok"}, "10.1.2.3, fd77::3 on lan (macvlan)"),
        ({**LAN, "driver": "bridge", "shared": False}, {"addresses": "warning"}, "3 open TCP connections"),
        ({**LAN, "subnets": ["10.1.0.0/16"]}, {"networks": "error", "addresses": "ok"}, "no room for fd77::3"),
        ({**LAN, "subnets": ["10.9.9.0/24", "fd77::/64"]}, {"networks": "error", "addresses": "ok"}, "no room for 10.1.2.3"),
        ({**LAN, "subnets": []}, {"addresses": "ok"}, "10.1.2.3"),  # its addresses come from elsewhere (DHCP)
        ({**LAN, "subnets": ["a lot"]}, {"addresses": "ok"}, "10.1.2.3"),
        ({**LAN, "interface": "eth77"}, {"networks": "error", "addresses": "ok"}, "lies on eth77"),
    ],
)
def test_the_networks_of_a_destination(monkeypatch: pytest.MonkeyPatch, lan: dict[str, Any], severities: dict[str, str], says: str) -> None:
    web = replace(WEB, networks=("lan",), addresses=("10.1.2.3", "fd77::3"))
    engine = fake(found=(), network_names=lambda: ["lan"], network_details=lambda names: {"lan": dict(lan)})
    report, _ = there(monkeypatch, engine, web)
    found = destination.destination_findings(web, report, kinds=OpenKinds(pids=(1,), tcp_established=3), disk_bytes=0)
    seen = {f.check: f.severity for f in found if f.check == "addresses" or (f.check == "networks" and f.severity == "error")}
    assert seen == severities
    assert says in " ".join(f.detail for f in found), found
    copy = destination.destination_findings(web, report, name="copy", kinds=OpenKinds(pids=(1,), tcp_established=3), disk_bytes=0)
    assert "no room" not in " ".join(f.detail for f in copy)


def test_a_destination_without_the_engine_or_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = there(monkeypatch, fake(capabilities=Capabilities(False, reason="podman is not installed")))
    assert "podman is not installed" in found["engine there"].detail
    _, found = there(monkeypatch, fake(found=(), capabilities=Capabilities(True, runtimes=("runc",))))
    assert "has no crun" in found["engine there"].detail


def test_the_request_of_a_renamed_container() -> None:
    web = replace(WEB, addresses=("10.1.2.3",), ports=(PortMapping("", 80, 80),), volumes=(Volume("data", Path("/x"), "/data"),))
    request = destination.destination_request(web, name="copy", publish=("127.0.0.1:8080:80/udp",), ignore_volumes=True)
    assert (request["name"], request["id"], request["addresses"], request["volumes"]) == ("copy", "", [], [])
    assert request["ports"] == [{"host_ip": "127.0.0.1", "host_port": 8080, "protocol": "udp"}]


def test_facts_of_another_version_are_read() -> None:
    assert destination.facts_from({"arch": "x86_64", "cpu_flags": ["a"], "new": 1}) == HostFacts(arch="x86_64", cpu_flags=("a",))
