"""Names and ports of copies, probes, and what comes of a start that does not get ready."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import BusyError, CkptError, RestoreFailed, UsageError
from ckpt.events import Event
from ckpt.host import run
from ckpt.model import Container, ContainerImage, DumpOptions, RestoreOptions
from ckpt.ops import clone, copies, readiness, warmstart
from ckpt.ops.readiness import NotReady, Probe
from tests.contract import fake


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("web", ["web"]),
        ("web-{1..3}", ["web-1", "web-2", "web-3"]),
        ("web-{3..1}", ["web-3", "web-2", "web-1"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{a,b}-{1..2}", ["a-1", "a-2", "b-1", "b-2"]),
        ("x{,y}", ["x", "xy"]),
        ("{-1..1}", ["-1", "0", "1"]),
    ],
)
def test_braces(text: str, names: list[str]) -> None:
    assert copies.expand(text) == names


@pytest.mark.parametrize("text", ["web-{1..3", "web-1}", "{{a,b},c}", "{1}", "{}", "{1..100000}", "{1..99}{1..99}", "{1..9999999999}"])
def test_braces_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        copies.expand(text)


def test_names_of_copies() -> None:
    assert copies.names((), "web", 3) == ["web-1", "web-2", "web-3"]
    assert copies.names(("a", "b-{1..2}"), "web", None) == ["a", "b-1", "b-2"]
    for given, count in (((), None), (("a",), 2), ((), 0), ((), 257), (("a", "a"), None), (("-a",), None), (("a/b",), None), (("",), None)):
        with pytest.raises(UsageError):
            copies.names(given, "web", count)


def test_ports_of_copies() -> None:
    assert copies.ports(("8080-8081:80",), 2) == [("8080:80/tcp",), ("8081:80/tcp",)]
    assert copies.ports(("127.0.0.1:53:53/udp",), 1) == [("127.0.0.1:53:53/udp",)]
    assert copies.ports(("80",), 2) == [("80/tcp",), ("80/tcp",)]
    assert copies.ports(("[::1]:80:80",), 1) == [("[::1]:80:80/tcp",)]
    assert copies.ports((), 2) == [(), ()]
    for text, count in (
        ("8080-8082:80", 2), ("8080:80", 2), ("8080-80:80", 1), ("0:80", 1), ("80:0", 1), ("70000:80", 1), ("x:80", 1), ("80/icmp", 1),
        ("1-2-3:80", 3), ("65535-65536:1", 2), ("", 1), ("8080:80-81", 1),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            copies.ports((text,), count)
    with pytest.raises(UsageError, match="in both"):
        copies.ports(("80-81:1", "81-82:2"), 2)


def test_probes_are_parsed() -> None:
    assert Probe.parse("port", "080") == Probe("port", "80")
    assert Probe.parse("http", "http://localhost:8080/x?a=1=204") == Probe("http", "http://localhost:8080/x?a=1", 204)
    assert Probe.parse("http", "http://[::1]/") == Probe("http", "http://[::1]/")
    for kind, text in (
        ("port", "0"), ("port", "http"), ("port", "65536"), ("port", "٣"), ("log", "("), ("log", ""), ("http", "https://x/"),
        ("http", "localhost"),
        ("http", "http://x:99999/"), ("http", "http://u:p@x/"), ("http", "http://x/ y"), ("http", "http://x/\r\ny"), ("file", "run/ready"),
        ("cmd", ""),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Probe.parse(kind, text)  # type: ignore[arg-type]


class Toy:
    """An engine that starts processes of this host, for want of containers."""

    name = "toy"

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self.discarded: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, script: str) -> Container:
        with self.log.open("wb") as out:
            self.process = subprocess.Popen([sys.executable, "-c", script], stdout=out, stderr=out)
        return Container("toy", "t1", "web", "running", pid=self.process.pid)

    def describe(self, container: Container) -> Container:
        return container

    def log_command(self, container: Container) -> list[str]:
        return ["tail", "-n", "+1", "-f", str(self.log)]

    def last_words(self, container: Container, lines: int) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def exec_in(self, container: Container, argv: Any, timeout_s: float, **more: Any) -> run.Result:
        return run.run(argv, timeout_s=timeout_s, check=False)

    def run_command(self, name: str, arguments: Any, publish: Any) -> list[str]:
        return []

    def run_new(self, name: str, command: Any) -> Container:
        raise RestoreFailed("no")

    def command_of(self, container: Container) -> list[str]:
        return []

    def command_in(self, config: bytes) -> list[str]:
        return []

    def image_now(self, image: ContainerImage) -> str:
        return ""

    def discard(self, container: Container) -> None:
        self.discarded.append(container.name)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    made = Toy(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


SLEEPS = "import time; print('starting', flush=True); print('ready now', flush=True); time.sleep(60)"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="enters a network namespace")


def ready(toy: Toy, container: Container, probe: Probe, limit_s: float = 10.0) -> float:
    return readiness.wait(toy, container, probe, limit_s)  # type: ignore[arg-type]


def test_ready_by_log_file_and_command(toy: Toy, tmp_path: Path) -> None:
    web = toy.start(SLEEPS)
    assert ready(toy, web, Probe.parse("log", "^ready")) < 10
    mark = tmp_path / "mark"
    for probe in (Probe.parse("file", str(mark)), Probe.parse("cmd", f"test -e {mark}")):
        began = time.monotonic()
        threading.Timer(0.3, mark.touch).start()
        assert ready(toy, web, probe) < 10 and time.monotonic() - began >= 0.3
        mark.unlink()


@needs_root
def test_ready_by_port_and_http(toy: Toy) -> None:
    web = toy.start(SLEEPS)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ok" else 503)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        ready(toy, web, Probe.parse("port", str(port)))
        ready(toy, web, Probe.parse("http", f"http://localhost:{port}/ok"))
        ready(toy, web, Probe.parse("http", f"http://localhost:{port}/no=503"))
        with pytest.raises(NotReady, match="not ready within"):
            ready(toy, web, Probe.parse("http", f"http://localhost:{port}/no"), 0.3)
        server.shutdown()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(NotReady):
            ready(toy, web, Probe.parse("port", str(free.getsockname()[1])), 0.3)


def test_not_ready_says_what_the_log_says(toy: Toy) -> None:
    web = toy.start(SLEEPS)
    ready(toy, web, Probe.parse("log", "now"))
    with pytest.raises(NotReady, match=r"not ready within 0.2 s \(log never\); its log ends: starting \| ready now") as caught:
        ready(toy, web, Probe.parse("log", "never"), 0.2)
    assert caught.value.exit_code == 1
    gone = toy.start("print('no configuration'); raise SystemExit(3)")
    with pytest.raises(NotReady, match="ended before it was ready.*no configuration"):
        ready(toy, gone, Probe.parse("file", "/nowhere/at/all"))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.FakeEngine]:
    (tmp_path / "world").mkdir()
    made = fake.install(tmp_path / "world", monkeypatch.setattr)
    yield made
    made.end_all()


def make(engine: fake.FakeEngine, root: Path, *names: str, events: list[Event] | None = None, **options: Any) -> list[Any]:
    seen: list[Event] = events if events is not None else []
    dump = DumpOptions(tcp_established=False, file_locks=False, shell_job=False)
    wanted = [clone.Copy(name) for name in names]
    return clone.clone("web", lambda original: wanted, dump=dump, options=RestoreOptions(), store_root=root, emit=seen.append, **options)


def test_copies_of_what_runs(engine: fake.FakeEngine, tmp_path: Path) -> None:
    web = engine.start("web")
    outcomes = make(engine, tmp_path / "store", "a", "b", "c")
    assert [(one.target, one.ok) for one in outcomes] == [("a", True), ("b", True), ("c", True)], [one.error for one in outcomes]
    assert engine.describe(web).state == "running"
    assert {one.name for one in engine.containers() if one.state == "running"} == {"web", "a", "b", "c"}
    assert outcomes[0].checkpoint.entry.tags == (clone.TAG,)
    assert not list((tmp_path / "store" / "tmp").iterdir()) and not list((tmp_path / "store" / "jobs").iterdir())


def test_a_name_that_is_taken(engine: fake.FakeEngine, tmp_path: Path) -> None:
    engine.start("web")
    engine.start("b")
    outcomes = make(engine, tmp_path / "store", "a", "b")
    assert [one.ok for one in outcomes] == [True, False]
    assert isinstance(outcomes[1].error, BusyError)
    with pytest.raises(BusyError, match="already: a, b"):
        make(engine, tmp_path / "store", "a", "b")
    with pytest.raises(BusyError, match="already: b"):
        make(engine, tmp_path / "store", "c", "b", all_or_none=True)


def test_all_or_none(engine: fake.FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.start("web")
    really = clone.restoring.bring_back

    def some(source: Any, options: RestoreOptions, *rest: Any, **more: Any) -> Any:
        if options.name == "b":
            raise RestoreFailed("not this one")
        return really(source, options, *rest, **more)

    monkeypatch.setattr(clone.restoring, "bring_back", some)
    outcomes = make(engine, tmp_path / "store", "a", "b", "c", width=1, all_or_none=True)
    assert [one.ok for one in outcomes] == [False] * 3
    assert all(isinstance(one.error, CkptError) for one in outcomes)
    assert {one.name for one in engine.containers()} == {"web"}


def test_what_cannot_be_started(engine: fake.FakeEngine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="starts nothing"):
        warmstart.run_warm(
            warmstart.Wanted("web", ("image",)), engine_name=engine.name, dump=DumpOptions(), options=RestoreOptions(), store_root=tmp_path / "store",
            emit=lambda event: None,
        )  # fmt: skip
