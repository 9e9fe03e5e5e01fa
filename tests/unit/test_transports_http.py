"""The http carrier against a server with every fault: it goes on after breaks, or ends with one clear error and nothing half stored."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import socket
import ssl
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt.errors import CannotConnect, CkptError, DigestMismatch, KeyProblem, NoSpace, RemoteRefused, TargetNotFound, TransferFailed, UsageError
from ckpt.host.run import run
from ckpt.transports.base import CarrierOptions, Location, Payload, Stored, carrier_of
from tests.unit.web_double import Web, serving

CHUNK = 64 << 10
QUICK = CarrierOptions(chunk_bytes=CHUNK, idle_timeout_s=5.0, retry_limit_s=5.0)
QUERY = "".join(("ses", "ame"))  # in two, so that a traceback's source lines do not hold it
HASTY = replace(QUICK, idle_timeout_s=0.4, retry_limit_s=0.3)


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


def get(url: str, options: CarrierOptions = QUICK) -> bytes:
    location = Location.parse(url)
    data = bytearray()
    with carrier_of(location).open_read(location, options) as reading:
        while piece := reading.read(100_000):
            data += piece
        assert reading.size_bytes in (None, len(data))
    return bytes(data)


def put(url: str, data: bytes, options: CarrierOptions = QUICK, piece: int = 50_000) -> Stored:
    location = Location.parse(url)
    with carrier_of(location).open_write(location, options, Payload()) as writing:
        for at in range(0, len(data), piece):
            writing.write(memoryview(data)[at : at + piece])
        return writing.commit()


def digest_field(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_partial", [True, False], ids=["kept", "dropped"])
def test_an_upload_interrupted_at_a_random_byte_50_times_arrives_and_little_is_sent_twice(web: Web, keep_partial: bool) -> None:
    web.keep_partial = keep_partial
    choose = random.Random(4)
    data = choose.randbytes(4_000_000)
    # A server that drops what came needs a whole chunk now and then to get on.
    web.cuts_in = [cut for _ in range(50) for cut in ([choose.randrange(1, CHUNK)] if keep_partial else [choose.randrange(1, CHUNK), -1])]
    stored = put(f"{web.url}/in/web.tar", data)
    assert web.cuts_in == []
    assert web.objects["/in/web.tar"] == data
    assert stored == Stored(len(data), hashlib.sha256(data).hexdigest(), "web@3")
    # Each interruption costs a chunk at most.
    assert web.bytes_in <= len(data) + (0 if keep_partial else 50 * CHUNK)


def test_a_download_interrupted_at_a_random_byte_50_times_arrives_and_nothing_is_sent_twice(web: Web) -> None:
    choose = random.Random(5)
    data = choose.randbytes(3_000_000)
    web.objects["/web.tar"] = data
    web.repr_digest = digest_field(data)
    web.cuts_out = [choose.randrange(1, 50_000) for _ in range(50)]
    cuts = list(web.cuts_out)
    assert get(f"{web.url}/web.tar") == data
    assert web.cuts_out == []
    asked = [int(headers["Range"][6:-1]) for _, _, headers in web.seen if "Range" in headers]
    # What was in flight when a reset came may be lost to the reader: it asks for that again, never for more than was cut off.
    assert len(asked) == 50 and all(after - before <= cut for before, after, cut in zip([0, *asked], asked, cuts, strict=False))


def test_a_plain_put_that_breaks_is_sent_again(web: Web) -> None:
    web.resumable = False
    data = os.urandom(300_000)
    web.cuts_in = [1000, 250_000]
    assert put(f"{web.url}/web.tar", data).size_bytes == len(data)
    assert web.objects["/web.tar"] == data


def test_a_lost_answer_to_the_end_of_an_upload_is_asked_for_again(web: Web) -> None:
    web.lose_finish = 2
    assert put(f"{web.url}/web.tar", b"x" * 200_000).reference == "web@3"


def test_an_overloaded_server_is_asked_again_when_it_says(web: Web) -> None:
    web.objects["/web.tar"] = b"data"
    web.answers["GET"] = [(503, {"Retry-After": "0"}, b""), (429, {}, b"")]
    web.answers["PATCH"] = [(503, {}, b""), (423, {}, b""), (409, {}, b""), (409, {"Upload-Offset": "0"}, b"")]
    assert get(f"{web.url}/web.tar") == b"data"
    put(f"{web.url}/up.tar", b"x" * 100_000)
    assert web.objects["/up.tar"] == b"x" * 100_000


def test_the_servers_limits_shape_the_chunks(web: Web) -> None:
    web.limits = "max-size=150000, max-append-size=10000"
    put(f"{web.url}/up.tar", b"x" * 100_000)
    assert max(int(h["Content-Length"]) for method, _, h in web.seen if method == "PATCH") == 10_000
    with pytest.raises(RemoteRefused, match="at most 150000"):
        put(f"{web.url}/up2.tar", b"x" * 200_000)
    assert web.uploads.keys() == {"/uploads/0"} and "/up2.tar" not in web.objects


# -- nothing half stored -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumable", [True, False], ids=["resumable", "plain"])
def test_leaving_without_commit_leaves_nothing(web: Web, resumable: bool) -> None:
    web.resumable = resumable
    web.objects["/up.tar"] = b"as before"
    location = Location.parse(f"{web.url}/up.tar")
    with pytest.raises(KeyboardInterrupt), carrier_of(location).open_write(location, QUICK, Payload()) as writing:
        writing.write(bytes(200_000))
        raise KeyboardInterrupt
    assert web.objects == {"/up.tar": b"as before"}
    assert web.uploads == {}


BAD_PUTS = {
    401: RemoteRefused, 403: RemoteRefused, 404: RemoteRefused, 405: RemoteRefused, 409: RemoteRefused, 413: RemoteRefused,
    500: TransferFailed, 502: TransferFailed, 503: TransferFailed, 504: TransferFailed, 507: RemoteRefused,
}  # fmt: skip


@pytest.mark.parametrize(("status", "kind"), BAD_PUTS.items())
@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT"])
def test_every_bad_answer_to_an_upload(web: Web, method: str, status: int, kind: type[CkptError]) -> None:
    if method == "PATCH" and status in (404, 409):
        kind = TransferFailed
    web.resumable = method != "PUT"
    web.objects["/up.tar"] = b"as before"
    web.answers[method] = [(status, {"Content-Type": "application/problem+json"}, b'{"detail": "because\\u0007 I say so"}')] * 9
    with pytest.raises(kind) as caught:
        put(f"{web.url}/up.tar?{QUERY}", bytes(3_000_000 if status == 413 else 100_000), HASTY)
    assert web.objects == {"/up.tar": b"as before"}
    assert web.uploads == {}
    shown = "".join(traceback.format_exception(caught.value))
    assert QUERY not in shown and "\a" not in caught.value.message and "\n" not in caught.value.message


BAD_GETS = {**BAD_PUTS, 404: TargetNotFound, 410: TargetNotFound, 204: RemoteRefused, 206: RemoteRefused}


@pytest.mark.parametrize(("status", "kind"), BAD_GETS.items())
def test_every_bad_answer_to_a_download(web: Web, status: int, kind: type[CkptError]) -> None:
    web.answers["GET"] = [(status, {}, b"")] * 9
    with pytest.raises(kind) as caught:
        get(f"{web.url}/web.tar?X-Amz-Signature={QUERY}", HASTY)
    assert QUERY not in "".join(traceback.format_exception(caught.value))


def test_a_wrong_digest(web: Web) -> None:
    web.objects["/web.tar"] = b"data" * 1000
    web.repr_digest = digest_field(b"else")
    with pytest.raises(DigestMismatch):
        get(f"{web.url}/web.tar")
    web.answers["PATCH"] = [(204, {"Upload-Offset": "100"}, b""), (201, {"Repr-Digest": digest_field(b"else")}, b"")]
    with pytest.raises(DigestMismatch):
        put(f"{web.url}/up.tar", bytes(100))


def test_a_wrong_digest_that_the_server_finds(web: Web) -> None:
    location = Location.parse(f"{web.url}/up.tar")
    with pytest.raises(DigestMismatch, match="wrong digest"), carrier_of(location).open_write(location, QUICK, Payload()) as writing:
        writing.write(bytes(CHUNK))
        writing.write(bytes(10))  # the first chunk is under way or there
        web_upload = web.uploads["/uploads/0"]
        while len(web_upload["data"]) < CHUNK:
            pass
        web_upload["data"][5] ^= 1
        writing.commit()
    assert web.objects == {}


def test_a_wrong_length(web: Web) -> None:
    web.objects["/web.tar"] = b"data" * 1000
    web.answers["GET"] = [(200, {"Content-Length": "5000", "Connection": "close"}, b"x" * 10)]
    with pytest.raises(TransferFailed):
        get(f"{web.url}/web.tar")
    web.resumable = False
    web.answers["HEAD"] = [(200, {"Content-Length": "77"}, b"")]
    with pytest.raises(TransferFailed, match="77 bytes"):
        put(f"{web.url}/up.tar", bytes(100))


@pytest.mark.parametrize("told", ["0", "999999", "-1", "x"])
def test_a_server_that_tells_impossible_offsets(web: Web, told: str) -> None:
    location = Location.parse(f"{web.url}/up.tar")
    web.answers["HEAD"] = [(204, {"Upload-Offset": told}, b"")] * 9
    with pytest.raises((TransferFailed, RemoteRefused)), carrier_of(location).open_write(location, HASTY, Payload()) as writing:
        writing.write(bytes(CHUNK))
        while len(web.uploads["/uploads/0"]["data"]) < CHUNK:
            pass
        web.cuts_in = [100]  # so it is asked: 0 would take back what it acknowledged
        writing.write(bytes(CHUNK))
        writing.commit()
    assert web.objects == {}


# -- downloads that cannot go on -----------------------------------------------------------------------------------


def test_without_ranges_it_starts_again_only_while_nothing_was_read(web: Web) -> None:
    web.ranges = False
    web.objects["/web.tar"] = os.urandom(100_000)
    web.cuts_out = [0]
    assert get(f"{web.url}/web.tar") == web.objects["/web.tar"]
    web.cuts_out = [50_000]
    with pytest.raises(TransferFailed, match="cannot send the rest"):
        get(f"{web.url}/web.tar")


def test_without_a_validator_it_does_not_go_on(web: Web) -> None:
    web.validators = False
    web.objects["/web.tar"] = os.urandom(100_000)
    web.cuts_out = [50_000]
    with pytest.raises(TransferFailed, match="cannot send the rest"):
        get(f"{web.url}/web.tar")


def test_a_file_that_changes_meanwhile_is_not_mixed(web: Web) -> None:
    web.objects["/web.tar"] = bytes(2_000_000)
    web.cuts_out = [50_000]
    location = Location.parse(f"{web.url}/web.tar")
    with pytest.raises(TransferFailed, match="changed"), carrier_of(location).open_read(location, QUICK) as reading:
        assert reading.read(10)
        web.objects["/web.tar"], web.etag = b"\1" * 2_000_000, '"two"'
        while reading.read(100_000):
            pass


def test_a_part_that_was_not_asked_for(web: Web) -> None:
    web.objects["/web.tar"] = bytes(100_000)
    web.cuts_out = [50_000]
    location = Location.parse(f"{web.url}/web.tar")
    with pytest.raises(TransferFailed, match="another part"), carrier_of(location).open_read(location, QUICK) as reading:
        assert reading.read(10)
        web.answers["GET"] = [(206, {"Content-Range": "bytes 0-99999/100000"}, b"")]
        while reading.read(100_000):
            pass


def test_without_a_length_the_end_of_the_connection_is_the_end(web: Web) -> None:
    web.length = False
    web.objects["/web.tar"] = os.urandom(100_000)
    assert get(f"{web.url}/web.tar") == web.objects["/web.tar"]


# -- time ----------------------------------------------------------------------------------------------------------


def test_a_trickle_of_bytes_is_no_transfer(web: Web) -> None:
    web.objects["/web.tar"] = bytes(100_000)
    web.trickle_s = 0.02
    web.ranges = False
    with pytest.raises(TransferFailed, match="in time"):
        get(f"{web.url}/web.tar", HASTY)


def test_a_byte_a_connection_is_no_transfer(web: Web) -> None:
    web.objects["/web.tar"] = bytes(1_000_000)
    web.cuts_out = [1] * 100_000
    with pytest.raises(TransferFailed, match="tried"):
        get(f"{web.url}/web.tar", HASTY)


def test_a_server_that_never_answers(web: Web) -> None:
    web.silent_s = 3
    with pytest.raises(TransferFailed, match="in time"):
        get(f"{web.url}/web.tar", HASTY)


def test_a_server_that_never_reads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/x"
        with pytest.raises(TransferFailed):
            put(url + "?sig=1", bytes(20_000_000), HASTY)


def test_a_limit_for_the_whole(web: Web) -> None:
    web.objects["/web.tar"] = bytes(100_000)
    web.trickle_s = 0.0001
    with pytest.raises(TransferFailed, match="not done in 0.2 s"):
        get(f"{web.url}/web.tar", replace(QUICK, total_timeout_s=0.2))


# -- connecting ----------------------------------------------------------------------------------------------------


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for act in (lambda: get(f"http://127.0.0.1:{port}/x"), lambda: put(f"http://127.0.0.1:{port}/x", b"")):
        with pytest.raises(CannotConnect, match="refused"):
            act()


def test_a_host_that_nobody_knows() -> None:
    with pytest.raises(CannotConnect, match="not known"):
        get("https://nobody.invalid/x")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    where = tmp_path_factory.mktemp("tls")
    cert, key = where / "cert.pem", where / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=lab"]
    run([*argv, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert])
    return cert, key


def test_a_certificate_must_be_trusted(certificate: tuple[Path, Path]) -> None:
    with serving(certificate) as web:
        web.objects["/web.tar"] = b"data"
        with pytest.raises(RemoteRefused, match="not trusted") as caught:
            get(f"{web.url}/web.tar")
        assert "--ca" in (caught.value.hint or "")
        assert get(f"{web.url}/web.tar", replace(QUICK, ca_file=certificate[0])) == b"data"
        put(f"{web.url}/up.tar", bytes(100_000), replace(QUICK, ca_file=certificate[0]))
        assert len(web.objects["/up.tar"]) == 100_000
        with pytest.raises(RemoteRefused, match="not trusted"):
            get(f"{web.url.replace('127.0.0.1', 'localhost')}/web.tar", replace(QUICK, ca_file=certificate[0]))


def test_a_certificate_known_by_its_fingerprint(certificate: tuple[Path, Path]) -> None:
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate[0].read_text())).hexdigest()
    with serving(certificate) as web:
        web.objects["/web.tar"] = b"data"
        assert get(f"{web.url.replace('127.0.0.1', 'localhost')}/web.tar", replace(QUICK, fingerprint=f"sha256:{digest}")) == b"data"
        with pytest.raises(RemoteRefused, match="another one than expected"):
            get(f"{web.url}/web.tar", replace(QUICK, fingerprint="sha256:" + "0" * 64))
        assert len(web.seen) == 1


def test_breaks_within_tls(certificate: tuple[Path, Path]) -> None:
    with serving(certificate) as web:
        options = replace(QUICK, ca_file=certificate[0])
        data = os.urandom(500_000)
        web.cuts_in = [1000, 30_000, 60_000]
        put(f"{web.url}/up.tar", data, options)
        web.cuts_out = [100, 70_000]
        assert get(f"{web.url}/up.tar", options) == data


def test_early_refusal_within_tls(certificate: tuple[Path, Path]) -> None:
    with serving(certificate) as web:
        web.answers["PUT"] = [(413, {}, b"")] * 9
        with pytest.raises(RemoteRefused, match="too large"):
            put(f"{web.url}/up.tar?sig=x", bytes(5_000_000), replace(HASTY, ca_file=certificate[0]))


def test_plain_http_where_tls_was_meant(web: Web) -> None:
    with pytest.raises(RemoteRefused, match="speaks no TLS"):
        get(f"{web.url.replace('http', 'https')}/web.tar")


# -- redirects and secrets -----------------------------------------------------------------------------------------


def test_redirects_lose_neither_tls_nor_the_token(web: Web, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sesame\n")
    options = replace(QUICK, ca_file=certificate[0], token_file=token)
    web.objects["/web.tar"] = b"data"
    with serving(certificate) as secure:
        secure.answers["GET"] = [(302, {"Location": f"{web.url}/web.tar"}, b"")]
        with pytest.raises(RemoteRefused, match="from https to http"):
            get(f"{secure.url}/web.tar", options)
        assert web.seen == []
        secure.objects["/web.tar"] = b"data"
        web.answers["GET"] = [(307, {"Location": "/there"}, b""), (307, {"Location": f"{secure.url}/web.tar"}, b"")]
        assert get(f"{web.url}/web.tar", options) == b"data"
        assert [h.get("Authorization") for _, _, h in web.seen] == ["Bearer sesame"] * 2
        assert "Authorization" not in secure.seen[-1][2]


def test_redirects_in_circles(web: Web) -> None:
    web.answers["GET"] = [(302, {"Location": "/web.tar"}, b"")] * 20
    with pytest.raises(RemoteRefused, match="more than 5 times"):
        get(f"{web.url}/web.tar")


@pytest.mark.parametrize("to", ["ftp://x/", "file:///etc/passwd", "http://[", "http://u:p@127.0.0.1/"])
def test_redirects_elsewhere(web: Web, to: str) -> None:
    web.answers["GET"] = [(302, {"Location": to}, b"")]
    with pytest.raises(RemoteRefused, match="redirects"):
        get(f"{web.url}/web.tar")


def test_a_put_is_sent_where_it_is_redirected(web: Web) -> None:
    web.resumable = False
    web.answers["PUT"] = [(307, {"Location": "/there.tar"}, b"")]
    web.answers["HEAD"] = [(405, {}, b"")]
    put(f"{web.url}/up.tar", bytes(100_000))
    assert web.objects == {"/there.tar": bytes(100_000)}


def test_an_upload_elsewhere_is_refused(web: Web) -> None:
    web.answers["POST"] = [(201, {"Location": "http://127.0.0.1:1/uploads/1"}, b"")]
    with pytest.raises(RemoteRefused, match="elsewhere"):
        put(f"{web.url}/up.tar", bytes(100))


def test_a_presigned_url_gets_one_put_and_no_token(web: Web, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sesame\n")
    put(f"{web.url}/bucket/up.tar?X-Amz-Signature=abc&X-Amz-Expires=60", bytes(100_000), replace(QUICK, token_file=token))
    [(method, path, headers)] = web.seen
    assert (method, path) == ("PUT", "/bucket/up.tar?X-Amz-Signature=abc&X-Amz-Expires=60")
    assert headers["Content-Length"] == "100000" and "Authorization" not in headers and "Transfer-Encoding" not in headers


def test_tokens_come_from_files_and_commands_and_netrc_is_left_alone(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password silent\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    web.objects["/x"] = b"data"
    get(f"{web.url}/x")
    assert "Authorization" not in web.seen[-1][2]
    get(f"{web.url}/x", replace(QUICK, token_command=("echo", "open-sesame")))
    assert web.seen[-1][2]["Authorization"] == "Bearer open-sesame"
    headers = tmp_path / "headers"
    headers.write_text("# for the gate\nX-Gate: 7\nAuthorization: Basic bWU6eA==\n")
    get(f"{web.url}/x", replace(QUICK, header_file=headers))
    assert web.seen[-1][2]["X-Gate"] == "7" and web.seen[-1][2]["Authorization"] == "Basic bWU6eA=="


def test_what_is_no_token(web: Web, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"two words\n")
    empty = tmp_path / "empty"
    empty.touch()
    for options in (
        replace(QUICK, token_file=tmp_path / "none"), replace(QUICK, token_file=bad), replace(QUICK, token_file=empty),
        replace(QUICK, token_command=("sh", "-c", "echo sesame >&2; exit 3")), replace(QUICK, header_file=bad),
        replace(QUICK, ca_file=tmp_path / "none"), replace(QUICK, client_cert=tmp_path / "none"),
    ):  # fmt: skip
        with pytest.raises(KeyProblem) as caught:
            get(f"{web.url}/x", options)
        assert "sesame" not in caught.value.message and "two words" not in caught.value.message
    assert web.seen == []


def test_clear_text_only_to_this_host() -> None:
    with pytest.raises(UsageError, match="not encrypted"):
        get("http://192.0.2.1/x")
    with pytest.raises(UsageError, match="user or password") as caught:
        get("https://me:sesame@127.0.0.1/x")
    assert "sesame" not in caught.value.message


def test_no_space_where_a_plain_put_waits(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.resumable = False
    location = Location.parse(f"{web.url}/up.tar")
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
    with pytest.raises(NoSpace), carrier_of(location).open_write(location, QUICK, Payload()) as writing:
        writing.write(b"x")
    assert full.closed and web.objects == {}


def test_before_anything_is_touched(web: Web) -> None:
    location = Location.parse(f"{web.url}/up.tar")
    carrier_of(location).check_write(location, QUICK)
    web.answers["OPTIONS"] = [(401, {}, b"")]
    with pytest.raises(RemoteRefused, match="who asks"):
        carrier_of(location).check_write(location, QUICK)
    web.answers["OPTIONS"] = [(403, {"Ckpt-Upload": "1"}, b"")]
    with pytest.raises(RemoteRefused):
        carrier_of(location).check_write(location, QUICK)
    assert {method for method, _, _ in web.seen} == {"OPTIONS"}
