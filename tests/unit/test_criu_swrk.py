"""The RPC client against a stand-in for CRIU that speaks the same protocol."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ckpt.criu import features, swrk
from ckpt.criu.bindings import load
from ckpt.errors import FeatureMissing

try:
    load("rpc_pb2")
except FeatureMissing:
    pytest.skip("pycriu is not installed", allow_module_level=True)

STAND_IN = """#!{python}
import os, socket, sys, time
sys.path[:0] = {path!r}
sys.dont_write_bytecode = True
from ckpt.criu.bindings import load
rpc = load("rpc_pb2")
if sys.argv[1] == "check":
    print({check!r}, file=sys.stderr)
    sys.exit(1 if {check!r} else 0)
sock = socket.socket(fileno=int(sys.argv[2]))
req = rpc.criu_req.FromString(sock.recv(1 << 20))
def say(**kw):
    sock.send(rpc.criu_resp(type=req.type, **kw).SerializeToString())
def notify(script, pid=None):
    answer = rpc.criu_resp(type=rpc.NOTIFY, success=True)
    answer.notify.script = script
    if pid: answer.notify.pid = pid
    sock.send(answer.SerializeToString())
    data = sock.recv(1 << 20)
    return bool(data) and rpc.criu_req.FromString(data).notify_success
{body}
"""


@pytest.fixture
def criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def make(body: str, check: str = "") -> swrk.Request:
        program = tmp_path / "criu"
        program.write_text(STAND_IN.format(python=sys.executable, path=[p for p in sys.path if p], body=textwrap.dedent(body), check=check))
        program.chmod(0o755)
        monkeypatch.setattr(swrk.run, "which", lambda name: str(program))
        return swrk.Request(tmp_path, tmp_path, "dump.log")

    return make


def test_version_features_and_facts(criu) -> None:  # type: ignore[no-untyped-def]
    body = """
    if req.type == rpc.VERSION:
        r = rpc.criu_resp(type=req.type, success=True); r.version.major_number = 4; r.version.minor_number = 2; r.version.sublevel = 1
        sock.send(r.SerializeToString())
    else:
        r = rpc.criu_resp(type=req.type, success=True); r.features.mem_track = False; r.features.lazy_pages = True
        sock.send(r.SerializeToString())
    """
    criu(body)
    assert swrk.version() == (4, 2, 1)
    facts = features.facts()
    assert facts.working and facts.version == "4.2.1" and facts.lazy_pages and not facts.mem_dirty_track
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swrk, "_ask", None)  # it was asked, that is enough
        assert features.facts() is facts and features.version_text() == "4.2.1"
    criu(body, check="Error (criu/vdso.c:401): vdso: Unexpected rt vDSO area bounds")
    facts = features.facts()
    assert not facts.working and "vDSO" in facts.reason and "4.2.1" in facts.hint


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swrk.run, "which", lambda name: None)
    with pytest.raises(FeatureMissing):
        swrk.version()
    assert swrk.check() == (False, "CRIU is not installed")
    facts = features.facts()
    assert not facts.present and not facts.working and facts.reason


def test_dump_options_and_notifications(criu) -> None:  # type: ignore[no-untyped-def]
    request = criu("""
    o = req.opts
    assert o.pid == 7 and o.tcp_established is False and o.notify_scripts and o.log_file == "dump.log"
    assert os.path.isdir(f"/proc/{os.getppid()}/fd/{o.images_dir_fd}")
    ok = notify("pre-dump") and notify("post-dump", 7)
    say(success=ok, cr_errno=0 if ok else 5)
    """)
    seen = []
    swrk.dump(request, 7, on_notify=lambda script, pid: seen.append((script, pid)) is None)
    assert seen == [("pre-dump", None), ("post-dump", 7)]
    with pytest.raises(swrk.CriuFailed) as caught:
        swrk.dump(request, 7, on_notify=lambda script, pid: script != "post-dump")
    assert caught.value.errno == 5 and not caught.value.timed_out
    assert not [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(request.images_dir)]


def test_a_hold_in_the_callback_is_not_the_servers_time(criu) -> None:  # type: ignore[no-untyped-def]
    request = criu('notify("post-dump"); say(success=True)')

    def hold(script: str, pid: int | None) -> bool:
        time.sleep(0.6)  # longer than the limit
        return True

    swrk.dump(request, 7, on_notify=hold, limit=swrk.Limit(0.5))


def test_time_limit_kills(criu) -> None:  # type: ignore[no-untyped-def]
    request = criu("open(os.path.dirname(sys.argv[0]) + '/pid', 'w').write(str(os.getpid())); time.sleep(60)")
    with pytest.raises(swrk.CriuFailed) as caught:
        swrk.dump(request, 7, limit=swrk.Limit(1.0))
    assert caught.value.timed_out
    assert not Path(f"/proc/{(request.images_dir / 'pid').read_text()}").exists()


def test_limit_stopped_and_started_again(criu) -> None:  # type: ignore[no-untyped-def]
    request = criu('notify("post-dump"); time.sleep(60)')
    limit = swrk.Limit(5.0)
    held = threading.Event()

    def hold(script: str, pid: int | None) -> bool:
        limit.stop()
        held.set()
        return True

    failures: list[Exception] = []

    def body() -> None:
        try:
            swrk.dump(request, 7, on_notify=hold, limit=limit)
        except swrk.CriuFailed as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    assert held.wait(10)
    assert limit.left_s() is None
    limit.start(0.1)
    thread.join(10)
    assert failures and failures[0].timed_out  # type: ignore[attr-defined]


def test_death_without_an_answer_and_what_it_said(criu) -> None:  # type: ignore[no-untyped-def]
    request = criu("print('cannot start: no memory', file=sys.stderr); sys.exit(1)")
    with pytest.raises(swrk.CriuFailed) as caught:
        swrk.dump(request, 7)
    assert "without an answer" in caught.value.reason and "no memory" in caught.value.reason
    assert caught.value.log_text() == ""


def test_restore_gives_the_pid(criu) -> None:  # type: ignore[no-untyped-def]
    request = criu("""
    assert req.type == rpc.RESTORE
    notify("post-restore", 42)
    r = rpc.criu_resp(type=req.type, success=True); r.restore.pid = 42
    sock.send(r.SerializeToString())
    """)
    assert swrk.restore(request) == 42


def test_config_file_of_the_environment_does_not_leak(criu, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("CRIU_CONFIG_FILE", "/nowhere")
    swrk.dump(criu('say(success="CRIU_CONFIG_FILE" not in os.environ)'), 7)
