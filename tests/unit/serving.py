"""A real `ckpt serve` on this host's loopback, in a thread, and requests to it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.serve import app, certificate, listen, tokens
from ckpt.serve.uploads import Uploads


class Server:
    """Serves a store until `close`.

    Args:
        rules: further arguments of app.Rules.
    """

    def __init__(self, store: Path, *, client_ca: Path | None = None, quota_bytes: int | None = None, port: int = 0, **rules: Any) -> None:
        self.store = store
        self.tokens = tokens.Tokens(store)
        serving = certificate.serving(certificate.own(store), client_ca=client_ca)
        self.fingerprint = serving.fingerprint
        self.service: app.Service | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.port = port
        self.error: BaseException | None = None

        async def main(uploads: Uploads) -> None:
            self._loop = asyncio.get_running_loop()
            self.service = app.Service(app.Rules(store, **rules), uploads)
            await listen._serve("127.0.0.1", port, self.service, serving, self._listening)

        def run() -> None:
            try:
                with Uploads(store, max_bytes=rules.get("max_bytes"), quota_bytes=quota_bytes) as uploads:
                    asyncio.run(main(uploads))
            except BaseException as error:
                self.error = error
            finally:
                self._ready.set()

        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert self._ready.wait(20)
        if self.error is not None:
            raise self.error

    def _listening(self, addresses: list[str]) -> None:
        self.port = int(addresses[0].rpartition(":")[2])
        self._ready.set()

    def token(self, *allow: str, **options: Any) -> str:
        return self.tokens.new(allow=allow or ("upload", "download", "migrate"), **options)[1]

    def cut(self) -> None:
        """Every connection that carries a migration."""
        assert self._loop is not None and self.service is not None
        for transport in list(self.service.tunnels):
            self._loop.call_soon_threadsafe(transport.abort)

    def close(self) -> None:
        if self._loop is not None and self.service is not None and self.thread.is_alive():
            self._loop.call_soon_threadsafe(self.service.stopping.set)
        self.thread.join(60)
        assert not self.thread.is_alive()

    def client(self, token: str | None = None, **options: Any) -> Client:
        return Client(self.port, token, **options)


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def offset(self) -> int:
        return int(self.headers["Upload-Offset"])

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One request a connection."""

    def __init__(self, port: int, token: str | None = None, *, context: ssl.SSLContext | None = None, path: str = "/checkpoints/web") -> None:
        self.port = port
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.path = path
        self.upload = ""
        self._context = context or unverified()

    def request(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None) -> Answer:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self._context, timeout=30)
        try:
            connection.request(method, path, body=body, headers={**self.headers, **(headers or {})})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def begin(self, length: int | None = None) -> Answer:
        answer = self.request("POST", self.path, {"Ckpt-Upload": "1", "Content-Length": "0"} | ({"Upload-Length": str(length)} if length else {}))
        self.upload = answer.headers.get("Location", "")
        return answer

    def append(self, offset: int, data: bytes) -> Answer:
        return self.request("PATCH", self.upload, {"Upload-Offset": str(offset), "Upload-Complete": "?0"}, data)

    def finish(self, offset: int, digest: bytes) -> Answer:
        sent = {"Upload-Offset": str(offset), "Upload-Complete": "?1", "Content-Length": "0"}
        return self.request("PATCH", self.upload, {**sent, "Repr-Digest": f"sha-256=:{base64.b64encode(digest).decode()}:"})

    def send(self, data: bytes) -> Answer:
        """All of it."""
        begun = self.begin()
        if begun.status != 201:
            return begun
        sent = self.append(0, data)
        return self.finish(len(data), hashlib.sha256(data).digest()) if sent.status == 204 else sent


def unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
