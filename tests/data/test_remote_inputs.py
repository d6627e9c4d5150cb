"""`prepare` reads files at URLs: the same corpus as from local copies, through faults and interruptions."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_servers import FileServer, failing, serving
from rich.console import Console

from phi_fast.data.preparation import pipeline, remote, streams
from phi_fast.data.preparation.containers import PrepareError
from phi_fast.data.preparation.inputs import find_inputs
from phi_fast.data.preparation.pipeline import Settings, prepare
from phi_fast.data.preparation.tasks import cut
from phi_fast.data.remote_files import Patience, RemoteError

pytest.importorskip("aiohttp")
QUIET = Console(quiet=True)
QUICK = Patience(attempts=5, first_wait=0.01, timeout=5)
TEXTS = [f"Document {i}, naïve 東京:\n{'lorem ipsum dolor ' * (i % 7)}\n\tend {i * i}\n" for i in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    file = io.BytesIO()
    table = pyarrow.table({"prompt": [str(i) * 100_000 for i in range(len(TEXTS))], "text": TEXTS})
    pytest.importorskip("pyarrow.parquet").write_table(
        table, file, row_group_size=17, compression="none", use_dictionary=False
    )
    return file.getvalue()


FILES = {
    "a.jsonl": lambda: LINES,
    "b.jsonl.gz": lambda: gzip.compress(LINES, mtime=0),
    "c.jsonl.bz2": lambda: bz2.compress(LINES),
    "d.json.xz": lambda: lzma.compress(LINES),
    "e.parquet": parquet,
    "f.txt": lambda: "\n<|endoftext|>\n".join(TEXTS).encode(),
    "g.md": lambda: TEXTS[6].encode(),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(pipeline, "MIN_UNIT_BYTES", 600)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)
    with serving(FileServer({f"/{name}": make() for name, make in FILES.items()})) as running:
        assert isinstance(running, FileServer)
        yield running


def digests(corpus: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in corpus.iterdir()}


def test_the_same_corpus_as_from_local_copies(tmp_path: Path, small_tokenizer: Path, server: FileServer) -> None:
    local: list[Path | str] = []
    for path, content in server.files.items():
        local.append(tmp_path / path.strip("/"))
        (tmp_path / path.strip("/")).write_bytes(content)
    chosen = Settings(str(small_tokenizer), validation=0.2)
    prepare(local, tmp_path / "local", chosen, workers=1, console=QUIET)
    urls: list[Path | str] = [f"{server.url}{path}?download=true" for path in server.files]
    busy = [None, None, "short", None, "agreed", "error", None, "drop"] * 4
    server.fault = failing(*busy)
    prepare(urls, tmp_path / "remote", chosen, workers=2, console=QUIET, patience=QUICK)
    assert digests(tmp_path / "remote") == digests(tmp_path / "local")
    sent = sum(end - start for start, end in ranges(server, "/e.parquet"))
    assert sent < len(server.files["/e.parquet"]) / 10, "of a Parquet file only the column of the text is requested"


def ranges(server: FileServer, path: str) -> list[tuple[int, int]]:
    """Byte ranges that were requested of a file."""
    asked = [line.rpartition("bytes=")[2].split("-") for line in server.requests if f"GET {path}" in line]
    return [(int(start), int(last) + 1) for start, last in asked]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_resumed_stream_has_the_same_parts(tmp_path: Path, server: FileServer, name: str, parts: int) -> None:
    def inputs() -> list:
        return find_inputs([f"{server.url}/{name}"], patience=QUICK).read

    expected = [task.loaded() for task in cut(inputs(), 600)]
    interrupted = cut(inputs(), 600, tmp_path)
    for _, task in zip(range(parts), interrupted, strict=False):
        task.loaded()
    interrupted.close()
    for journal in tmp_path.glob("cuts/*"):
        journal.write_bytes(journal.read_bytes() + b'{"start": 5')  # a line that a kill cut short
    resumed = list(cut(inputs(), 600, tmp_path))
    assert [task.key(b"") for task in resumed] == [task.key(b"") for task in expected]
    again = [task.loaded() for task in cut(inputs(), 600, tmp_path)]  # as if no unit had been kept
    assert [(task.data, task.first, task.size) for task in again] == [
        (task.data, task.first, task.size) for task in expected
    ]
    assert sum(task.size for task in again) == len(server.files[f"/{name}"])


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz"])
def test_what_is_done_is_not_requested_again(
    tmp_path: Path, small_tokenizer: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(remote, "AHEAD", 1)
    urls: list[Path | str] = [f"{server.url}/{name}", f"{server.url}/f.txt"]
    chosen = Settings(str(small_tokenizer), validation=0.2)
    prepare(urls, tmp_path / "whole", chosen, workers=1, console=QUIET, patience=QUICK)
    server.fault = lambda request: "error" if "/f.txt bytes=2000" in request else None
    impatient = Patience(attempts=2, first_wait=0.01)
    with pytest.raises(RemoteError, match=r"f\.txt, bytes 2,000 to .*what is done is kept"):
        prepare(urls, tmp_path / "out", chosen, workers=1, console=QUIET, patience=impatient)
    assert not (tmp_path / "out").exists()
    server.fault = lambda request: None
    server.requests.clear()
    prepare(urls, tmp_path / "out", chosen, workers=1, console=QUIET, patience=QUICK)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    head = 65536  # the beginning is looked at to recognise the format
    assert all(stop - start >= min(head, len(server.files[f"/{name}"])) for start, stop in ranges(server, f"/{name}"))
    assert len(ranges(server, f"/{name}")) <= 2


def test_a_changed_file_is_read_anew(tmp_path: Path, server: FileServer) -> None:
    def first() -> bytes:
        [entry] = find_inputs([f"{server.url}/a.jsonl"], patience=QUICK).read
        return next(iter(cut([entry], 600, tmp_path))).key(b"")

    before = first()
    assert first() == before
    server.files["/a.jsonl"] = LINES.replace(b"lorem", b"merol")
    assert first() != before


def test_a_file_that_cannot_be_read_is_refused(server: FileServer) -> None:
    server.files["/x.csv"] = b"a,b\n"
    with pytest.raises(PrepareError, match=r"x\.csv is a table of separated values"):
        find_inputs([f"{server.url}/x.csv"], patience=QUICK)
    with pytest.raises(RemoteError, match=r"none\.jsonl cannot be read: .*Check the address"):
        find_inputs([f"{server.url}/none.jsonl"], patience=QUICK)


def test_reading_ahead_is_bounded(server: FileServer) -> None:
    [entry] = find_inputs([f"{server.url}/a.jsonl"], patience=QUICK).read
    server.requests.clear()
    stream = streams.Stream(entry)
    stream.read(0, 10)
    stream.close()
    assert 1 <= len(server.requests) <= remote.AHEAD + 1


def test_no_attempt_is_waited_for_after_an_error(server: FileServer) -> None:
    [entry] = find_inputs([f"{server.url}/a.jsonl"], patience=Patience(attempts=9, first_wait=60, timeout=5)).read
    server.fault = lambda request: "error" if "bytes=2000" in request else None
    stream = streams.Stream(entry)
    stream.read(0, 10)
    while not any("bytes=2000" in request for request in server.requests):
        time.sleep(0.01)
    begin = time.monotonic()
    pool = stream._raw.raw._pool
    stream.close()
    pool.shutdown(wait=True)
    assert time.monotonic() - begin < 5
