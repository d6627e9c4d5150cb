"""Cuts inputs into tasks of about the same size; a worker reads and encodes each task.

Tasks depend only on the inputs and `unit_bytes`. Inputs that must be read in sequence (compressed files, long streams)
are read and cut here by the parent process; the workers parse them (`readers.py`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..vocabulary import END_OF_TEXT
from .containers import PrepareError, open_stream, read
from .inputs import Input, Kind

MAX_DOCUMENT_BYTES = 2**31
"""Maximum length of a document in a stream of text or lines."""


@dataclass(frozen=True)
class Task:
    """A part of the inputs."""

    kind: Kind
    paths: tuple[Path, ...]
    """Text without `data`: complete files. Otherwise the one file or dataset."""
    size: int
    """Number of bytes on disk that the task covers, for the progress bar."""
    data: bytes | None = None
    """Text, lines: a part of the stream."""
    first: int = 0
    """Lines: the number of `data`'s first line. Parquet: the row group. Dataset: the first row."""
    last: int = 0
    """Dataset: the row after the last."""

    def key(self, settings: bytes) -> bytes:
        """32 bytes that identify this task's documents, encoded with `settings`."""
        hashed = hashlib.blake2b(settings, digest_size=32)
        hashed.update(repr((self.kind, self.first, self.last)).encode())
        for path in self.paths:
            hashed.update(os.fsencode(path.absolute()) + b"\0")
            if self.data is None:
                files = sorted(path.glob("*")) if path.is_dir() else [path]
                stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
                hashed.update(repr(stamps).encode())
        hashed.update(self.data or b"")
        return hashed.digest()


def cut(inputs: list[Input], unit_bytes: int) -> Iterator[Task]:
    """Cut the inputs into tasks of about `unit_bytes` bytes of text each, in order.

    Raises PrepareError for a damaged file and for a document longer than MAX_DOCUMENT_BYTES.
    """
    pack: list[Input] = []  # small text files for one task
    packed = 0
    for entry in inputs:
        whole = entry.kind == "text" and not entry.compressed and entry.size <= unit_bytes
        if pack and (not whole or packed + entry.size > unit_bytes):
            yield _whole_files(pack)
            pack, packed = [], 0
        if whole:
            pack.append(entry)
            packed += entry.size
        else:
            yield from _CUTTERS[entry.kind](entry, unit_bytes)
    if pack:
        yield _whole_files(pack)


def _whole_files(files: list[Input]) -> Task:
    return Task("text", tuple(file.path for file in files), sum(file.size for file in files))


@lru_cache(maxsize=4)
def open_dataset(path: Path) -> Any:
    """Open a dataset that Hugging Face `datasets` saved, memory-mapped. Raises PrepareError if it cannot be read."""
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # whatever json, pyarrow and datasets raise for a damaged file
        raise PrepareError(
            f"{path} cannot be read as a dataset: {error}. Get it again, or save it with the `datasets` installed here"
        ) from error


def _cut_stream(entry: Input, unit_bytes: int) -> Iterator[Task]:
    find_end = _after_last_line if entry.kind == "lines" else _before_last_separator
    with entry.path.open("rb") as raw:
        stream = open_stream(raw, entry.path, entry.compression)
        pending, place, line = bytearray(), 0, 1
        while data := read(stream, unit_bytes, entry.path):
            searched = max(0, len(pending) - len(END_OF_TEXT))  # there is no complete delimiter before this
            pending += data
            end = find_end(pending, searched)
            if end > 0:
                yield Task(entry.kind, (entry.path,), raw.tell() - place, bytes(pending[:end]), line)
                line += pending.count(b"\n", 0, end)
                place = raw.tell()
                del pending[:end]
            elif len(pending) > MAX_DOCUMENT_BYTES:
                raise PrepareError(
                    f"{entry.path}: a document is longer than {MAX_DOCUMENT_BYTES} bytes. Put {END_OF_TEXT} between "
                    "documents, or give them as JSONL"
                )
        if pending:
            yield Task(entry.kind, (entry.path,), raw.tell() - place, bytes(pending), line)


def _after_last_line(data: bytearray, start: int) -> int:
    return data.rfind(b"\n", start) + 1


def _before_last_separator(data: bytearray, start: int) -> int:
    at = data.rfind(END_OF_TEXT.encode(), start)
    return at - 1 if at > 0 and data[at - 1 : at] == b"\n" else at


def _cut_row_groups(entry: Input, unit_bytes: int) -> Iterator[Task]:
    import pyarrow.parquet

    with entry.path.open("rb") as file:  # pyarrow does not accept a path that is not UTF-8
        groups = pyarrow.parquet.read_metadata(file).num_row_groups
    for group in range(groups):
        size = entry.size * (group + 1) // groups - entry.size * group // groups
        yield Task("parquet", (entry.path,), size, first=group)


def _cut_rows(entry: Input, unit_bytes: int) -> Iterator[Task]:
    rows = len(open_dataset(entry.path))
    step = max(1, rows * unit_bytes // entry.size)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        size = entry.size * last // rows - entry.size * first // rows
        yield Task("dataset", (entry.path,), size, first=first, last=last)


_CUTTERS = {"text": _cut_stream, "lines": _cut_stream, "parquet": _cut_row_groups, "dataset": _cut_rows}
