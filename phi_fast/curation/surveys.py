"""The files in which a comparison keeps what it knows of a shard's documents, and the ids that name them in reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..data.plain_reads import open_regular, read_array
from ..files import replacing, sync_directory

_Array = np.ndarray[Any, Any]


def save(path: Path, array: _Array) -> None:
    """Write an array's bytes to a file that has its name only once it is complete and on disk."""
    with replacing(path) as file:
        file.write(np.ascontiguousarray(array).data)


def save_ids(path: Path, ids: Sequence[str]) -> None:
    """Write the ids of a shard's documents: `path`.ids, then `path`.ends, whose presence shows that both are whole."""
    encoded = [name.encode("utf-8", "backslashreplace") for name in ids]
    ends = np.cumsum([0, *map(len, encoded)], dtype="<u8")
    save(path.with_suffix(".ids"), np.frombuffer(b"".join(encoded), np.uint8))
    save(path.with_suffix(".ends"), ends)
    sync_directory(path.parent)


def count(path: Path) -> int | None:
    """Count the documents of a surveyed shard; None for one that is not surveyed."""
    try:
        return path.with_suffix(".ends").stat().st_size // 8 - 1
    except FileNotFoundError:
        return None


def read_id(path: Path, number: int) -> str:
    """Read the id of document `number` of a surveyed shard."""
    start, stop = read_array(path.with_suffix(".ends"), "<u8", 2, 8 * number).tolist()
    return read_array(path.with_suffix(".ids"), "u1", stop - start, start).tobytes().decode()


def partitions(files: Sequence[tuple[Path, int]], dtype: np.dtype[Any], memory: int) -> Iterator[_Array]:
    """Gather the rows of many files by ranges of their first field `key`, a uniform uint64 by which each file is
    sorted.

    files: (path, number of the shard's first document). dtype: of the rows; the field `document` (int64, the last)
    holds the place in the shard on disk, and the number among all documents in what is yielded. Each array has at most
    some `memory` bytes, and the ranges ascend. Equal keys are in one array."""
    rows = sum(path.stat().st_size // dtype.itemsize for path, _ in files)
    parts = max(1, -(-rows * dtype.itemsize // max(memory, 1)))
    bounds = [(part << 64) // parts for part in range(parts + 1)]
    for low, high in pairwise(bounds):
        gathered = []
        for path, first in files:
            found = _between(path, dtype, low, high)
            found["document"] += first
            gathered.append(found)
        if gathered and sum(map(len, gathered)):
            yield np.concatenate(gathered)


def _between(path: Path, dtype: np.dtype[Any], low: int, high: int) -> _Array:
    """Read the rows of one file with low <= key < high, which are found by bisection."""
    rows = path.stat().st_size // dtype.itemsize
    with open_regular(path) as file:

        def below(bound: int) -> int:
            first, last = 0, rows
            while first < last:
                middle = (first + last) // 2
                if int(read_array(file, "<u8", 1, middle * dtype.itemsize)[0]) < bound:
                    first = middle + 1
                else:
                    last = middle
            return first

        start = below(low) if low else 0
        stop = below(high) if high < 2**64 else rows
        return read_array(file, dtype, stop - start, start * dtype.itemsize)
