"""A small registry for tests, on the loopback in clear text (or by TLS), that can be told to misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_UPLOAD = re.compile(r"/v2/(.+)/blobs/uploads/([0-9]*)\Z")
_BLOB = re.compile(r"/v2/(.+)/blobs/(sha256:[0-9a-f]{64})\Z")
_MANIFEST = re.compile(r"/v2/(.+)/manifests/([^/]+)\Z")


@dataclass
class Seen:
    """A request as it came in."""

    method: str
    path: str
    query: str
    authorization: str
    headers: dict[str, str]


class FakeRegistry:
    """Blobs, manifests and uploads in memory. `hook` sees every request first and may answer it (then it returns True)."""

    def __init__(self, *, context: ssl.SSLContext | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.uploads: dict[str, bytearray] = {}
        self.seen: list[Seen] = []
        self.cuts: deque[int] = deque()
        """Of the body of each next PATCH (or PUT of a blob) only so many bytes are kept, then the connection is reset; -1: this one is left alone."""
        self.read_cuts: deque[int] = deque()
        """The same for GET of a blob: so many bytes are sent."""
        self.patched_bytes = 0
        self.hook: Callable[[Handler], bool] = lambda handler: False
        self.min_chunk = 0
        self.max_body = 1 << 40
        self.ranges = True
        self.user: tuple[str, str] | None = None
        self.tokens: set[str] | None = None
        self.realm = ""
        self.slow_s = 0.0
        """How long each 64 KiB of a body take to be read."""
        self.challenge_scope = True
        self.referrers = False
        self._count = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.registry = self  # type: ignore[attr-defined]
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https" if context else "http"
        self.port = self._server.server_address[1]
        self.name = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeRegistry:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def new_upload(self) -> str:
        self._count += 1
        self.uploads[str(self._count)] = bytearray()
        return str(self._count)

    def add_blob(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    def add_manifest(self, repository: str, tag: str, plain: dict[str, Any] | bytes, kind: str = "application/vnd.oci.image.manifest.v1+json") -> str:
        data = plain if isinstance(plain, bytes) else json.dumps(plain).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.manifests[repository, tag] = self.manifests[repository, digest] = (data, kind)
        return digest

    def requests(self, method: str, part: str = "") -> list[Seen]:
        return [seen for seen in self.seen if seen.method == method and part in seen.path]


@dataclass
class _Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    @property
    def registry(self) -> FakeRegistry:
        return self.server.registry  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str, **headers: str) -> None:
        self.answer(status, headers, json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode())

    def reset(self) -> None:
        """Cut the connection with a RST."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
        with suppress(OSError):
            self.connection.close()

    def body(self, limit: int = -1) -> bytes:
        left = int(self.headers.get("Content-Length") or 0)
        if limit >= 0:
            left = min(left, limit)
        parts = []
        while left:
            data = self.rfile.read1(min(left, 65536))  # type: ignore[attr-defined]
            if not data:
                break
            parts.append(data)
            left -= len(data)
            time.sleep(self.registry.slow_s)
        return b"".join(parts)

    def _any(self) -> None:
        registry, parts = self.registry, urlsplit(self.path)
        authorization = self.headers.get("Authorization", "")
        registry.seen.append(Seen(self.command, parts.path, parts.query, authorization, dict(self.headers.items())))
        if registry.hook(self):
            return
        if parts.path == "/token":
            self.body()
            registry.tokens = {*(registry.tokens or ()), f"t{len(registry.seen)}"}
            self.answer(200, body=json.dumps({"token": f"t{len(registry.seen)}", "expires_in": 300}).encode())
            return
        if not self._authorized(authorization):
            self.body()
            return
        if parts.path == "/v2/":
            self.answer(200)
        elif match := _UPLOAD.match(parts.path):
            self._upload(match[1], match[2], parts.query)
        elif match := _BLOB.match(parts.path):
            self._blob(match[2])
        elif match := _MANIFEST.match(parts.path):
            self._manifest(match[1], match[2])
        else:
            self.error(404, "NOT_FOUND")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _any

    def _authorized(self, authorization: str) -> bool:
        registry = self.registry
        if registry.realm:
            if authorization.removeprefix("Bearer ") in (registry.tokens or ()):
                return True
            scope = ',scope="repository:ns/web:pull,push"' if registry.challenge_scope else ""
            self.error(401, "UNAUTHORIZED", **{"WWW-Authenticate": f'Bearer realm="{registry.realm}",service="fake"{scope}'})
            return False
        if registry.user:
            wanted = "Basic " + base64.b64encode(":".join(registry.user).encode()).decode()
            if authorization != wanted:
                self.error(401, "UNAUTHORIZED", **{"WWW-Authenticate": 'Basic realm="fake"'})
                return False
        return True

    def _upload(self, name: str, number: str, query: str) -> None:
        registry = self.registry
        if self.command == "POST":
            self.body()
            number = registry.new_upload()
            extra = {"OCI-Chunk-Min-Length": str(registry.min_chunk)} if registry.min_chunk else {}
            self.answer(202, {"Location": f"/v2/{name}/blobs/uploads/{number}?state=0", "Range": "0-0", **extra})
            return
        if number not in registry.uploads:
            self.body()
            self.error(404, "BLOB_UPLOAD_UNKNOWN")
            return
        held = registry.uploads[number]

        def where() -> dict[str, str]:
            return {
                "Location": f"{registry.scheme}://{registry.name}/v2/{name}/blobs/uploads/{number}?state={len(held)}",
                "Range": f"0-{max(len(held) - 1, 0)}",
            }

        if self.command == "GET":
            self.answer(204, where())
        elif self.command == "DELETE":
            del registry.uploads[number]
            self.answer(204)
        elif self.command == "PATCH":
            cut = registry.cuts.popleft() if registry.cuts else -1
            if int(self.headers["Content-Length"]) > registry.max_body:
                self.close_connection = True
                self.answer(413)
                return
            if int(self.headers["Content-Range"].partition("-")[0]) != len(held):
                self.body()
                self.answer(416, where())
                return
            data = self.body(cut)
            held += data
            registry.patched_bytes += len(data)
            self.reset() if cut >= 0 else self.answer(202, where())
        else:
            length = int(self.headers.get("Content-Length") or 0)
            cut = registry.cuts.popleft() if registry.cuts and length > 2 else -1
            if length > registry.max_body:
                self.close_connection = True
                self.answer(413)
                return
            data = self.body(cut)
            registry.patched_bytes += len(data)
            if cut >= 0:
                self.reset()
                return
            held += data
            digest = parse_qs(query)["digest"][0]
            if digest != f"sha256:{hashlib.sha256(held).hexdigest()}":
                self.error(400, "DIGEST_INVALID")
                return
            registry.blobs[digest] = bytes(held)
            del registry.uploads[number]
            self.answer(201, {"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest})

    def _blob(self, digest: str) -> None:
        registry = self.registry
        data = registry.blobs.get(digest)
        if data is None:
            self.error(404, "BLOB_UNKNOWN")
            return
        if self.command == "HEAD":
            self.answer(200, {"Content-Length": str(len(data))})
            return
        match = re.match(r"bytes=([0-9]+)-\Z", self.headers.get("Range", "")) if registry.ranges else None
        first = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(data) - first))
        if match:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        cut = registry.read_cuts.popleft() if registry.read_cuts else -1
        if cut < 0:
            self.wfile.write(data[first:])
        else:
            self.wfile.write(data[first : first + cut])
            self.wfile.flush()
            self.close_connection = True

    def _manifest(self, name: str, reference: str) -> None:
        registry = self.registry
        if self.command == "PUT":
            data = self.body()
            digest = registry.add_manifest(name, reference, data, self.headers["Content-Type"])
            subject = json.loads(data).get("subject")
            extra = {"OCI-Subject": subject["digest"]} if registry.referrers and subject else {}
            self.answer(201, {"Docker-Content-Digest": digest, **extra})
            return
        found = registry.manifests.get((name, reference))
        if found is None:
            self.error(404, "MANIFEST_UNKNOWN")
            return
        digest = f"sha256:{hashlib.sha256(found[0]).hexdigest()}"
        self.answer(200, {"Content-Type": found[1], "Docker-Content-Digest": digest}, found[0])
