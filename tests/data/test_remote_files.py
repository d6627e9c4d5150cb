"""Byte ranges over HTTP and S3 from servers that fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
from remote_servers import FAULTS, FileServer, Proxy, failing, serving

from phi_fast.data import remote_files
from phi_fast.data.remote_files import Patience, RemoteError, find, is_url, read_range, stat

pytest.importorskip("aiohttp")
CONTENT = bytes(range(256)) * 40
QUICK = Patience(attempts=4, first_wait=0.01, timeout=5)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer({"/a.bin": CONTENT})) as running:
        assert isinstance(running, FileServer)
        yield running


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    """Port of an S3 server with the object s3://bucket/folder/a.bin."""
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(moto: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    import boto3

    with serving(Proxy(moto)) as running:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{moto}")
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="folder/a.bin", Body=CONTENT)
        client.put_object(Bucket="bucket", Key="folder/b.bin", Body=b"b")
        remote_files._file_system.cache_clear()
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        assert isinstance(running, Proxy)
        yield running
        remote_files._file_system.cache_clear()


def test_the_bytes_asked_for(server: FileServer) -> None:
    url = f"{server.url}/a.bin"
    assert read_range(url, 100, 1000, QUICK) == CONTENT[100:1000]
    assert read_range(url, 0, len(CONTENT), QUICK) == CONTENT
    assert read_range(url, 5, 5, QUICK) == b""
    found = stat(url, QUICK)
    assert found is not None and found.size == len(CONTENT) and found.version


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_overcome_and_named(server: FileServer, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    server.fault = failing(*[fault] * (4 if fault == "drop" else 2))  # aiohttp itself sends a dropped request again
    impatient = Patience(attempts=4, first_wait=0.01, timeout=0.3)
    assert read_range(f"{server.url}/a.bin", 7, 4007, impatient) == CONTENT[7:4007]
    assert len(server.requests) >= 3
    lines = [record.getMessage() for record in caplog.records if record.name == "phi_fast.remote"]
    assert len(lines) >= 2
    assert all(f"attempt {number} of 4 failed" in line for number, line in enumerate(lines, 1))
    assert all(f"{server.url}/a.bin, bytes 7 to 4,007" in line for line in lines)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_always_fails_ends_the_attempts(server: FileServer, fault: str) -> None:
    server.fault = lambda request: fault
    impatient = Patience(attempts=3, first_wait=0.01, timeout=0.2)
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=r"a\.bin, bytes 0 to 100 could not be read in 3 attempts: .*same command"):
        read_range(f"{server.url}/a.bin", 0, 100, impatient)
    assert time.monotonic() - begin < 2.5
    assert len([line for line in server.requests if line.startswith("GET")]) >= 3


def test_what_will_not_pass_is_not_tried_again(server: FileServer) -> None:
    with pytest.raises(RemoteError, match=r"none\.bin.* cannot be read: .*Check the address"):
        read_range(f"{server.url}/none.bin", 0, 10, QUICK)
    with pytest.raises(RemoteError, match=r"cannot be read: .*416.*became shorter"):
        read_range(f"{server.url}/a.bin", 20_000, 20_010, QUICK)
    assert len(server.requests) == 2
    server.ranges = False
    with pytest.raises(RemoteError, match="no requests for a part of a file"):
        read_range(f"{server.url}/a.bin", 0, 10, QUICK)
    assert len(server.requests) == 3


def test_waits_grow_and_are_bounded() -> None:
    patience = Patience(first_wait=1, longest_wait=8)
    waits = [patience.wait(failures) for failures in range(1, 8)]
    for wait, longest in zip(waits, (1, 2, 4, 8, 8, 8, 8), strict=True):
        assert longest / 2 <= wait <= longest


def test_urls_and_paths() -> None:
    assert [is_url(text) for text in ("https://h/x", "S3://b/k", "data/x", "C:/x", "ftp://h/x")] == [1, 1, 0, 0, 0]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RemoteError, match=r"gs://b/x needs fsspec, gcsfs: pip install 'phi-fast\[remote\]'"):
        read_range("gs://b/x", 0, 1)


def test_folders_are_not_listed_over_http(server: FileServer) -> None:
    with pytest.raises(RemoteError, match="only files can be read"):
        find(f"{server.url}/", QUICK)


@pytest.mark.parametrize("fault", FAULTS)
def test_s3_through_faults(s3: Proxy, fault: str) -> None:
    s3.fault = failing(fault, fault)
    impatient = Patience(attempts=4, first_wait=0.01, timeout=0.4)
    assert read_range("s3://bucket/folder/a.bin", 256, 5000, impatient) == CONTENT[256:5000]
    assert sum("folder/a.bin" in line for line in s3.requests) >= 3


def test_s3_folders_patterns_and_errors(s3: Proxy) -> None:
    s3.fault = failing("error", "drop", on="")
    files = find("s3://bucket/folder", QUICK)
    assert {url: found.size for url, found in files.items()} == {
        "s3://bucket/folder/a.bin": len(CONTENT),
        "s3://bucket/folder/b.bin": 1,
    }
    assert find("s3://bucket/*/b*", QUICK).keys() == {"s3://bucket/folder/b.bin"}
    assert stat("s3://bucket/folder", QUICK) is None
    with pytest.raises(RemoteError, match=r"s3://bucket/none.* cannot be read: FileNotFoundError"):
        read_range("s3://bucket/none", 0, 1, QUICK)
