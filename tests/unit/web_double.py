"""A small web server for tests: GET with ranges, PUT, the uploads of docs/http.md, and every fault on demand."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 4096


class Web(ThreadingHTTPServer):
    """Knobs are attributes; `seen` has every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "http"
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.answers: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        """What a method answers instead, once each, in order."""
        self.cuts_in: list[int] = []
        """After so many bytes of a request's content the connection is reset; -1: not this one's."""
        self.cuts_out: list[int] = []
        """The same of an answer's content."""
        self.keep_partial = True
        self.lose_finish = 0
        self.resumable = True
        self.limits = ""
        self.ranges = True
        self.validators = True
        self.length = True
        self.trickle_s = 0.0
        self.silent_s = 0.0
        self.max_bytes: int | None = None
        self.repr_digest = ""
        self.etag = '"one"'
        self.bytes_in = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def serving(tls: tuple[Path, Path] | None = None) -> Iterator[Web]:
    web = Web()
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        web.socket = context.wrap_socket(web.socket, server_side=True, do_handshake_on_connect=False)
        web.scheme = "https"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        web.server_close()
        thread.join(10)


class Cut(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        self.request.settimeout(20)
        super().setup()

    def _any(self) -> None:
        web = self.server
        web.seen.append((self.command, self.path, dict(self.headers.items())))
        self.close_connection = False
        try:
            if web.answers.get(self.command):
                status, headers, content = web.answers[self.command].pop(0)
                if status != 413:
                    self._content()
                else:
                    self.close_connection = True  # answered at once, what still comes is not read
                self._answer(status, headers, content)
            else:
                getattr(self, "_" + self.command.lower())()
        except Cut:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_OPTIONS = do_DELETE = _any

    def _answer(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204 and "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _content(self, into: bytearray | None = None) -> bytearray:
        web = self.server
        left = int(self.headers.get("Content-Length", 0))
        cut: int | None = web.cuts_in.pop(0) if left and web.cuts_in else -1
        cut = None if cut == -1 else cut
        data = bytearray() if into is None else into
        got = 0
        while left:
            if cut is not None and got >= cut:
                raise Cut
            piece = self.rfile.read1(min(left, PIECE, PIECE if cut is None else cut - got))  # type: ignore[attr-defined]
            if not piece:
                raise Cut
            data += piece
            got += len(piece)
            left -= len(piece)
            with web.lock:
                web.bytes_in += len(piece)
        if cut is not None:
            raise Cut
        return data

    def _get(self) -> None:
        web = self.server
        time.sleep(web.silent_s)
        data = web.objects.get(self.path.partition("?")[0])
        if data is None:
            self._answer(404)
            return
        start = 0
        headers = {"ETag": web.etag} if web.validators else {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        status = 200
        if asked and web.ranges and self.headers.get("If-Range") == web.etag:
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if web.repr_digest:
            headers["Repr-Digest"] = web.repr_digest
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if web.length:
            self.send_header("Content-Length", str(len(data) - start))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        cut = web.cuts_out.pop(0) if web.cuts_out else None
        for at in range(start, len(data), PIECE):
            piece = data[at : at + PIECE]
            if cut is not None and at - start + len(piece) > cut:
                self.wfile.write(piece[: cut - (at - start)])
                raise Cut
            if web.trickle_s:
                for number in range(len(piece)):
                    self.wfile.write(piece[number : number + 1])
                    time.sleep(web.trickle_s)
            self.wfile.write(piece)

    def _head(self) -> None:
        if self.path.startswith("/uploads/"):
            upload = self.server.uploads.get(self.path)
            if upload is None:
                self._answer(404)
            else:
                self._answer(204, {"Upload-Offset": str(len(upload["data"])), "Upload-Complete": "?1" if upload["done"] else "?0"})
            return
        data = self.server.objects.get(self.path)
        self._answer(404 if data is None else 200, {} if data is None else {"Content-Length": str(len(data))})

    def _put(self) -> None:
        data = self._content()
        self.server.objects[self.path.partition("?")[0]] = bytes(data)
        self._answer(201)

    def _options(self) -> None:
        if self.server.resumable:
            self._answer(204, {"Ckpt-Upload": "1", **({"Upload-Limit": self.server.limits} if self.server.limits else {})})
        else:
            self._answer(501)

    def _post(self) -> None:
        place = f"/uploads/{len(self.server.uploads)}"
        self.server.uploads[place] = {"data": bytearray(), "path": self.path, "done": False}
        self._answer(201, {"Location": place, "Upload-Offset": "0"})

    def _patch(self) -> None:
        web = self.server
        upload = web.uploads.get(self.path)
        if upload is None:
            self._content()
            self._answer(404)
        elif self.headers.get("Upload-Complete") == "?1":
            digest = base64.b64encode(hashlib.sha256(upload["data"]).digest()).decode()
            field = f"sha-256=:{digest}:"
            if self.headers["Repr-Digest"] != field:
                self._answer(422, {"Content-Type": "application/problem+json"}, b'{"title": "wrong digest", "code": "digest-mismatch"}')
                return
            upload["done"] = True
            web.objects[upload["path"]] = bytes(upload["data"])
            if web.lose_finish:
                web.lose_finish -= 1
                raise Cut
            headers = {"Upload-Offset": str(len(upload["data"])), "Repr-Digest": field, "Content-Type": "application/json"}
            self._answer(201, headers, b'{"schema": 1, "ref": "web@3"}')
        elif int(self.headers["Upload-Offset"]) != len(upload["data"]):
            self._content()
            self._answer(409, {"Upload-Offset": str(len(upload["data"]))})
        else:
            if web.max_bytes is not None and len(upload["data"]) + int(self.headers["Content-Length"]) > web.max_bytes:
                self._content()
                self._answer(413)
                return
            before = len(upload["data"])
            try:
                self._content(upload["data"])
            except Cut:
                if not web.keep_partial:
                    del upload["data"][before:]
                raise
            self._answer(204, {"Upload-Offset": str(len(upload["data"]))})

    def _delete(self) -> None:
        self.server.uploads.pop(self.path, None)
        self._answer(204)
