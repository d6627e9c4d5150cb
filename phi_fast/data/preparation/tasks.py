"""Cuts inputs into tasks of about the same size; a worker reads and encodes each task.

Tasks depend only on the inputs and `unit_bytes`. Inputs that must be read in sequence (compressed files, long streams)
are read and cut by the parent process (`streams.py`); the workers parse them (`readers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from .containers import PrepareError
from .inputs import Input
from .remote import AnyPath, RemotePath
from .streams import cut_stream
from .task import Task


def cut(inputs: list[Input], unit_bytes: int, work: Path | None = None) -> Iterator[Task]:
    """Cut the inputs into tasks of about `unit_bytes` bytes of text each, in order.

    work: directory that keeps the cuts of remote inputs, so that parts that are done are not read again; None: none.

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
            yield from _CUTTERS[entry.kind](entry, unit_bytes, work)
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


def parquet_metadata(path: AnyPath) -> Any:
    """A Parquet file's metadata; that of a remote file is requested once. Raises what pyarrow raises."""
    return _remote_metadata(path) if isinstance(path, RemotePath) else _metadata(path)


def _metadata(path: AnyPath) -> Any:
    import pyarrow.parquet

    with path.open("rb") as file:  # pyarrow does not accept a path that is not UTF-8
        return pyarrow.parquet.read_metadata(file)


_remote_metadata = lru_cache(maxsize=2048)(_metadata)


def _cut_row_groups(entry: Input, unit_bytes: int, work: Path | None) -> Iterator[Task]:
    groups = parquet_metadata(entry.path).num_row_groups
    for group in range(groups):
        size = entry.size * (group + 1) // groups - entry.size * group // groups
        yield Task("parquet", (entry.path,), size, first=group)


def _cut_rows(entry: Input, unit_bytes: int, work: Path | None) -> Iterator[Task]:
    assert isinstance(entry.path, Path)
    rows = len(open_dataset(entry.path))
    step = max(1, rows * unit_bytes // entry.size)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        size = entry.size * last // rows - entry.size * first // rows
        yield Task("dataset", (entry.path,), size, first=first, last=last)


_CUTTERS = {"text": cut_stream, "lines": cut_stream, "parquet": _cut_row_groups, "dataset": _cut_rows}
