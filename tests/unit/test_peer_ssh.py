"""Destinations, ssh's command line, its failures; and `connect` through programs that stand in for ssh."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from ckpt.errors import CannotConnect, PeerVersion, TransferFailed, UsageError
from ckpt.host.run import Result
from ckpt.peer.client import connect
from ckpt.transports import ssh, ssh_cipher
from ckpt.transports.ssh import Destination, PeerMissing


@pytest.mark.parametrize(
    "text,expected",
    [
        ("b", Destination("b")),
        ("root@b", Destination("b", "root")),
        ("root@b:2222", Destination("b", "root", 2222)),
        ("ssh://b", Destination("b")),
        ("ssh://root@b:22/", Destination("b", "root", 22)),
        ("[2001:db8::1]", Destination("2001:db8::1")),
        ("root@[2001:db8::1]:22", Destination("2001:db8::1", "root", 22)),
        ("ssh://root@[::1]:22", Destination("::1", "root", 22)),
        ("fe80::1%eth0", Destination("fe80::1%eth0")),
        ("10.0.0.1:22", Destination("10.0.0.1", None, 22)),
        ("me@realm@host_1", Destination("host_1", "me@realm")),
    ],
)
def test_destinations(text: str, expected: Destination) -> None:
    assert Destination.parse(text) == expected
    assert Destination.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-oProxyCommand=x",
        "root@-oX",
        "-x@b",
        "a b",
        "b\n",
        "b:",
        "b:x",
        "b:0",
        "b:65536",
        "b:/path",
        "ssh://b/path",
        "@b",
        "u:pw@b",
        "[b]",
        "[::1",
    ]
    + ["u:pw@b", "[::1]x", "a:b:c", "b;id", "$(id)", "b\x00", "b:\u0661"],
)
def test_unusable_destinations(text: str) -> None:
    with pytest.raises(UsageError):
        Destination.parse(text)


def test_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_SSH", raising=False)
    words = ssh.argv("root@[::1]:2222", ["ckpt", "peer", "a b", "$x"], ["BatchMode=no", "Port=7"], batch=True)
    assert words[:2] == ["ssh", "-T"]
    assert words[-5:] == ["-p", "2222", "--", "root@::1", "ckpt peer 'a b' '$x'"]
    values = [words[i + 1] for i, word in enumerate(words) if word == "-o"]
    assert values[:2] == ["BatchMode=no", "Port=7"], "ssh takes the first value: the user's come first"
    assert {"BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3", "Compression=no"} <= set(values)
    monkeypatch.setenv("CKPT_SSH", "relay 'x y' ssh")
    assert ssh.argv("b", ["ckpt"])[:4] == ["relay", "x y", "ssh", "-T"]
    for option in ("", "-v", "X=1\nY=2", "no value"[:2]):
        with pytest.raises(UsageError):
            ssh.argv("b", [], [option])


@pytest.mark.parametrize(
    "code,stderr,cls,said",
    [
        (255, "No ED25519 host key is known for b and you have requested strict checking.\nHost key verification failed.", CannotConnect, "unknown"),
        (255, "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", CannotConnect, "changed"),
        (255, "root@b: Permission denied (publickey,password).", CannotConnect, "permission denied"),
        (255, "ssh: connect to host b port 22: Connection refused", CannotConnect, "refused"),
        (255, "ssh: connect to host b port 22: No route to host", CannotConnect, "no route"),
        (255, "ssh: Could not resolve hostname b: Name or service not known", CannotConnect, "not known"),
        (255, "ssh: connect to host b port 22: Connection timed out", CannotConnect, "timed out"),
        (255, "kex_exchange_identification: read: Connection reset by peer", CannotConnect, "closed the connection"),
        (255, "something new", CannotConnect, "something new"),
        (None, "", CannotConnect, "no answer in time"),
        (127, "bash: line 1: ckpt: command not found", PeerMissing, "not installed"),
        (127, "sh: 1: ckpt: not found", PeerMissing, "not installed"),
        (2, "Error: No such command 'peer'.", PeerVersion, "too old"),
        (1, "This account is currently not available.", CannotConnect, "not available"),
    ],
)
def test_what_ssh_says(code: int | None, stderr: str, cls: type[Exception], said: str) -> None:
    error = ssh.explain("root@b:22", code, stderr)
    assert type(error) is cls
    assert said in error.message and "b" in error.message


def test_the_faster_cipher_comes_first_and_none_is_added() -> None:
    chacha, small, large = "chacha20-poly1305@openssh.com", "aes128-gcm@openssh.com", "aes256-gcm@openssh.com"
    said = "host b\nciphers {}\nmacs x\n"
    assert ssh_cipher.reordered(said.format(f"{chacha},{small},{large},aes128-ctr")) == (f"Ciphers={small},{large},{chacha},aes128-ctr",)
    assert ssh_cipher.reordered(said.format(f"{chacha},{large}")) == (f"Ciphers={large},{chacha}",)
    for as_it_is in (f"{small},{chacha}", chacha, f"{chacha},aes128-ctr"):
        assert ssh_cipher.reordered(said.format(as_it_is)) == ()
    assert ssh_cipher.reordered("") == ()


def test_a_chosen_cipher_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_SSH", raising=False)
    monkeypatch.setattr(ssh_cipher, "cpu_flags", lambda: ("aes",))
    asked: list[list[str]] = []

    def answer(argv: list[str], **options: object) -> Result:
        asked.append(argv)
        return Result(tuple(argv), 0, b"ciphers chacha20-poly1305@openssh.com,aes128-gcm@openssh.com\n", b"")

    monkeypatch.setattr(ssh_cipher, "run", answer)
    assert ssh_cipher.preference(Destination("b"), ["Port=7"]) == ("Ciphers=aes128-gcm@openssh.com,chacha20-poly1305@openssh.com",)
    assert asked[0][:2] == ["ssh", "-G"] and "Port=7" in asked[0] and asked[0][-1] == "b"
    assert ssh_cipher.preference(Destination("b"), ["ciphers=aes256-ctr"]) == ()
    monkeypatch.setattr(ssh_cipher, "cpu_flags", lambda: ())
    assert ssh_cipher.preference(Destination("b"), []) == ()
    assert len(asked) == 1


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A program in ssh's place that runs `body`."""
    script = tmp_path / "ssh.py"
    script.write_text(textwrap.dedent(body))
    monkeypatch.setenv("CKPT_SSH", shlex.join([sys.executable, str(script)]))
    monkeypatch.setenv("HOME", str(tmp_path))


PEER = f"""
import sys, os, signal
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from ckpt.peer.server import main
from ckpt.errors import BusyError
def report(session, args):
    print("noise on stdout")
    os.system("echo more noise; cat")
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return {{"argv": sys.argv[1:], "blocked": blocked, "session": os.getsid(0) == os.getpid()}}
def hang(session, args):
    session.on_lost(lambda: open(args["mark"], "w").close())
    return {{}}
def die(session, args):
    sys.stderr.write("the last words\\n"); sys.stderr.flush()
    os._exit(255)
def term(session, args):
    session.on_lost(lambda: open(args["mark"], "w").close())
    os.kill(os.getpid(), signal.SIGTERM)
    return {{}}
sys.exit(main({{"report": report, "hang": hang, "die": die, "term": term}}))
"""


def test_connect_runs_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "print('motd', flush=True)" + PEER)
    before = len(os.listdir("/proc/self/fd"))
    with connect("root@b:2222", ssh_options=["User=x"]) as peer:
        answer = peer.call("report")
        assert answer["argv"][-1] == "ckpt peer" and answer["argv"][-2] == "root@b" and answer["session"] and answer["blocked"]
        assert peer.version and peer.hostname
    assert len(os.listdir("/proc/self/fd")) == before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_exception_is_a_lost_link_for_the_other_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, PEER)
    mark = tmp_path / "mark"
    with pytest.raises(ZeroDivisionError), connect("b") as peer:
        peer.call("hang", {"mark": str(mark)})
        _ = 1 / 0
    assert mark.exists()


def test_the_last_words_of_ssh_are_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, PEER)
    with pytest.raises(TransferFailed, match="lost the link to b: .*the last words"), connect("b") as peer:
        peer.call("die")


def test_a_signal_ends_the_session_like_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, PEER)
    mark = tmp_path / "mark"
    with pytest.raises(TransferFailed), connect("b") as peer:
        peer.call("term", {"mark": str(mark)})
        peer.call("report")
    assert mark.exists()


@pytest.mark.parametrize(
    "body,cls,said",
    [
        ("import sys; sys.exit('root@b: Permission denied (publickey).')", CannotConnect, "Permission denied"),
        ("import sys; print('Host key verification failed.', file=sys.stderr); sys.exit(255)", CannotConnect, "host key is unknown"),
        ("import sys; print('sh: 1: ckpt: not found', file=sys.stderr); sys.exit(127)", PeerMissing, "not installed"),
        ("print('This account is currently not available.'); raise SystemExit(1)", CannotConnect, "not available"),
        ("import sys; sys.stdin.read()", CannotConnect, "no answer"),
        ("import sys\nwhile True: sys.stdout.write('y\\n' * 4096)", TransferFailed, "text instead"),
    ],
)
def test_connect_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, cls: type[Exception], said: str) -> None:
    stand_in(tmp_path, monkeypatch, body)
    with pytest.raises(cls, match=said) as caught, connect("b", timeout_s=0.7):
        pass
    assert type(caught.value) is cls


def test_no_ssh_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_SSH", "/nonexistent/ssh")
    with pytest.raises(CannotConnect, match="cannot start"), connect("b"):
        pass
