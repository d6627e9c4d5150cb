"""Merges units into a corpus: gathers the documents of one range of keys at a time, and writes them at their place.

Reads are contiguous slices of the units, and writes are complete ranges. A worker holds one range in memory, so the
corpus may be far larger than memory. (This is an external sort with uniform keys, so that ranges need no sampling.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...files import sync_directory, sync_file
from ..manifest import BLOCK_BYTES, Split
from .units import VALIDATION_KEY, Unit

RANGE_BYTES = 128 * 2**20
"""Bytes of tokens that a worker gathers at once. It holds them twice."""

KEYS = {"train": (0, VALIDATION_KEY), "validation": (VALIDATION_KEY, 2 * VALIDATION_KEY)}
"""Split -> its first key, and the key after its last."""

Map = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]
"""`map`, or a pool's `map`: results in order."""


@dataclass(frozen=True)
class _Range:
    """One task of the merge: keys start ≤ key < stop, and the token and document index where they are written."""

    start: int
    stop: int
    token: int
    document: int


def merge(units: list[Path], directory: Path, dtype: np.dtype[Any], run: Map = map) -> dict[str, Split]:
    """Write `directory`/{train,validation}.{bin,ends} from the units, and sync. Returns the splits with documents."""
    splits = {}
    for name, (first, last) in KEYS.items():
        documents, tokens = (part[1] - part[0] for part in _counts(units, dtype, [first, last]))
        if not documents:
            continue
        ranges = -(-int(tokens) * dtype.itemsize // RANGE_BYTES)
        bounds = [first + (last - first) * i // ranges for i in range(ranges + 1)]
        before = _counts(units, dtype, bounds)
        places = [
            _Range(start, stop, int(token - before[1][0]), int(document - before[0][0]))
            for (start, stop), document, token in zip(pairwise(bounds), *before, strict=False)
        ]
        splits[name] = _merge_split(name, units, directory, dtype, places, (int(documents), int(tokens)), run)
    sync_directory(directory)
    return splits


def _merge_split(
    name: str,
    units: list[Path],
    directory: Path,
    dtype: np.dtype[Any],
    places: list[_Range],
    total: tuple[int, int],
    run: Map,
) -> Split:
    documents, tokens = total
    file, ends = directory / f"{name}.bin", directory / f"{name}.ends"
    for path, size in ((file, tokens * dtype.itemsize), (ends, documents * 8)):
        with path.open("wb") as new:
            new.truncate(size)
    for _ in run(partial(_merge_range, units, file, ends, dtype), places):
        pass
    for path in (file, ends):
        sync_file(path)
    blocks = list(run(partial(check_block, file, dtype), range(0, tokens * dtype.itemsize, BLOCK_BYTES)))
    return Split(
        file=file.name,
        ends=ends.name,
        tokens=tokens,
        documents=documents,
        max_id=max(largest for _, largest in blocks),
        sha256=tuple(checksum for checksum, _ in blocks),
    )


def _counts(units: list[Path], dtype: np.dtype[Any], bounds: list[int]) -> tuple[np.ndarray[Any, Any], ...]:
    """Number of documents and tokens below each key in `bounds`, over all units."""
    documents, tokens = np.zeros(len(bounds), np.int64), np.zeros(len(bounds), np.int64)
    for path in units:
        unit_documents, unit_tokens = Unit(path, dtype).counts(bounds)
        documents += unit_documents
        tokens += unit_tokens
    return documents, tokens


def _merge_range(units: list[Path], file: Path, ends: Path, dtype: np.dtype[Any], place: _Range) -> None:
    parts = [Unit(path, dtype).range(place.start, place.stop) for path in units]
    order = np.argsort(np.concatenate([keys for keys, _ in parts]), kind="stable")
    if not len(order):
        return
    unordered = [document for _, documents in parts for document in documents]
    documents = [unordered[i] for i in order]
    new_ends = place.token + np.cumsum([len(document) for document in documents])
    for path, offset, array in (
        (file, place.token * dtype.itemsize, np.concatenate(documents)),
        (ends, place.document * 8, new_ends.astype("<u8")),
    ):
        with path.open("r+b") as out:
            out.seek(offset)
            out.write(array.data)


def check_block(file: Path, dtype: np.dtype[Any], offset: int) -> tuple[str, int]:
    """Hex sha256 and largest id of the block of BLOCK_BYTES at byte `offset`."""
    with file.open("rb") as tokens:
        tokens.seek(offset)
        data = tokens.read(BLOCK_BYTES)
    return hashlib.sha256(data).hexdigest(), int(np.frombuffer(data, dtype).max())
