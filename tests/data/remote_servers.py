"""Real servers on the loopback address that fail on request: files over HTTP, and a proxy in front of moto's S3."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

Answer = tuple[int, dict[str, str], bytes]
FAULTS = ("drop", "short", "agreed", "error", "slow")
"""What can be wrong with an answer: no answer at all; half of the body; half of the body with a Content-Length that
agrees; status 503; the second half only after `Server.delay` seconds."""


class Server(ThreadingHTTPServer):
    """Answers with what `respond` returns, spoilt by what `fault` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        """Method, path and range of each request."""
        self.fault: Callable[[str], str | None] = lambda request: None
        self.delay = 1.0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def respond(self, handler: Handler) -> Answer:
        raise NotImplementedError

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may leave in the middle of an answer."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        request = f"{self.command} {self.path} {self.headers.get('Range', '')}".strip()
        self.server.requests.append(request)
        fault = self.server.fault(request)
        if fault == "drop":
            self.close_connection = True
            return
        status, headers, body = (503, {}, b"busy") if fault == "error" else self.server.respond(self)
        sent = body[: len(body) // 2] if fault in ("short", "agreed") else body
        length = len(sent) if fault == "agreed" else len(body)
        self.send_response(status)
        for name, value in ({"Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "slow":
            self.wfile.write(sent[: len(sent) // 2])
            time.sleep(self.server.delay)
            sent = sent[len(sent) // 2 :]
        self.wfile.write(sent)
        self.close_connection |= fault == "short"

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *words: object) -> None:
        pass


class FileServer(Server):
    """Serves bytes by path, with ETags and byte ranges."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.ranges = files, True
        super().__init__()

    def respond(self, handler: Handler) -> Answer:
        content = self.files.get(handler.path.partition("?")[0])
        if content is None:
            return 404, {}, b"no such file"
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if asked and self.ranges:
            start, stop = int(asked[1]), int(asked[2]) + 1
            if start >= len(content):
                return 416, headers, b""
            return 206, headers, content[start:stop]
        size = {"Content-Length": str(len(content))} if handler.command == "HEAD" else {}
        return 200, headers | size, content


class Proxy(Server):
    """Passes requests on to another server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        super().__init__()

    def respond(self, handler: Handler) -> Answer:
        size = int(handler.headers.get("Content-Length", 0))
        origin = http.client.HTTPConnection("127.0.0.1", self.port)
        origin.request(handler.command, handler.path, handler.rfile.read(size), dict(handler.headers))
        answer = origin.getresponse()
        kept = {name: value for name, value in answer.getheaders() if name not in ("Connection", "Transfer-Encoding")}
        if handler.command != "HEAD":
            kept.pop("Content-Length", None)
        return answer.status, kept, answer.read()


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def failing(*faults: str | None, on: str = "GET") -> Callable[[str], str | None]:
    """A `Server.fault` that spoils the first answers to requests that begin with `on`, one fault each."""
    left = list(faults)
    return lambda request: left.pop(0) if left and request.startswith(on) else None


COMMIT = "5" * 40
"""The commit that `Hub` gives for every revision."""


class Hub(FileServer):
    """The part of the Hugging Face hub's API that reading data sets needs; files are named OWNER/NAME/PATH."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)

    def respond(self, handler: Handler) -> Answer:
        path, _, query = handler.path.partition("?")
        path = unquote(path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            names = [name.removeprefix(f"{found[1]}/") for name in self.files if name.startswith(f"{found[1]}/")]
            siblings = [{"rfilename": name} for name in names]
            return self.json({"id": found[1], "sha": COMMIT, "siblings": siblings, "private": False})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            return self.tree(found[1], (found[3] or "").strip("/"), "recursive=true" in query)
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            handler.path = f"{found[1]}/{found[3]}"
            status, headers, body = super().respond(handler)
            return status, headers | {"X-Repo-Commit": COMMIT}, body
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def tree(self, repository: str, folder: str, deep: bool) -> Answer:
        entries: dict[str, dict] = {}
        below = f"{repository}/{folder}/" if folder else f"{repository}/"
        for name, content in self.files.items():
            if not name.startswith(below):
                continue
            path = name.removeprefix(f"{repository}/")
            inner = name.removeprefix(below).split("/")
            for depth in range(1, len(inner)):
                if deep or depth == 1:
                    inside = path.split("/")[: -len(inner) + depth]
                    entries["/".join(inside)] = {"type": "directory", "path": "/".join(inside), "oid": "0" * 40}
            if deep or len(inner) == 1:
                oid = hashlib.sha1(content).hexdigest()
                entries[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
        return self.json(list(entries.values()))

    def json(self, value: object) -> Answer:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
