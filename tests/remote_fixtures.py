"""Servers of remote corpora, as fixtures; `conftest` imports them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.loopback import Server, http_server, s3_server
from phi_fast.data import remote_files

_buckets = itertools.count()


@pytest.fixture(scope="session")
def s3_process() -> Iterator[Server]:
    pytest.importorskip("moto")
    server = s3_server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_process: Server, no_waits: None, monkeypatch: pytest.MonkeyPatch) -> Server:
    """moto's S3, as the endpoint of every client of S3, with short waits between attempts."""
    import s3fs

    s3_process.reset()
    names = {"AWS_ENDPOINT_URL": s3_process.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    for name, value in {**names, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    remote_files._file_system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    return s3_process


@pytest.fixture
def http(tmp_path: Path, no_waits: None) -> Iterator[Server]:
    """An HTTP server of the test's folder, with short waits between attempts."""
    server = http_server(tmp_path)
    yield server
    server.close()


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again after 10 ms, so that tests of failing servers are fast."""
    monkeypatch.setattr(remote_files.Patience, "wait", lambda patience, failures: 0.01)


def new_bucket() -> str:
    return f"bucket-{next(_buckets)}"
