"""Servers on loopback, real S3 (moto) and HTTP, that delay and fail as they are told to: for experiments and tests."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from werkzeug.exceptions import NotFound
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.utils import send_from_directory
from werkzeug.wrappers import Request, Response

Fault = Callable[[str, str], str | None]
"""(method, path) -> what goes wrong with the request: "error" (503), "drop" (half of the body, then the connection is
closed), "short" (half of the body, with a length that fits it), "slow" (0.3 s), "whole" (the range is ignored), or
None."""


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Log no requests: `Server.requests` has them."""


class Server:
    """Serves a WSGI application in threads of this process, and records the requests.

    fault: see `Fault`; may be set at any time. delay: seconds before each answer.
    """

    def __init__(self, application: Any) -> None:
        self.application, self.delay = application, 0.0
        self.fault: Fault = lambda method, path: None
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, range) of each."""
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self._server.log = lambda *_: None  # it would print the errors that tests ask for
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        self.fault, self.delay = lambda method, path: None, 0.0
        self.requests.clear()

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """(start, stop) of each range asked of the files of that name."""
        found = [re.fullmatch(r"bytes=(\d+)-(\d+)", part) for _, path, part in self.requests if path.endswith(name)]
        return [(int(match[1]), int(match[2]) + 1) for match in found if match]

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path, environ.get("HTTP_RANGE", "")))
        time.sleep(self.delay)
        fault = self.fault(method, path)
        if fault == "error":
            return Response("busy", 503)(environ, start_response)
        if fault == "slow":
            time.sleep(0.3)
        if fault == "whole":
            environ.pop("HTTP_RANGE", None)
        if fault not in ("drop", "short") or method == "HEAD":
            return self.application(environ, start_response)
        answer = Response.from_app(self.application, environ)
        answer.direct_passthrough = False
        body = answer.get_data()
        half = body[: len(body) // 2]
        if fault == "short":
            answer.set_data(half)
            return answer(environ, start_response)
        answer.headers["Content-Length"] = str(len(body))
        start_response(answer.status, answer.headers.to_wsgi_list())
        return _cut(half)


def _cut(half: bytes) -> Iterator[bytes]:
    yield half
    raise ConnectionResetError("as the test asked for")


def http_server(directory: Path) -> Server:
    """Serves the files below a directory, in parts if asked for."""

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        try:
            answer: Any = send_from_directory(directory, request.path.lstrip("/"), environ)
        except NotFound as error:
            answer = error.get_response()
        return answer(environ, start_response)

    return Server(application)


def s3_server() -> Server:
    """moto's S3, for clients that have its URL as their endpoint."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    return Server(DomainDispatcherApplication(create_backend_app))


def upload(server: Server, directory: Path, bucket: str, prefix: str) -> str:
    """Copy a directory's files into a bucket; returns their URL."""
    import boto3

    client = boto3.client(
        "s3", endpoint_url=server.url, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )
    client.create_bucket(Bucket=bucket)
    for path in sorted(directory.iterdir()):
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")
    return f"s3://{bucket}/{prefix}"
