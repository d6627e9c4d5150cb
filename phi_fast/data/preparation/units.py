"""Units: encoded documents on disk, sorted in the order of the corpus.

Every document has a 64-bit key: the top bit is set for validation, the other bits are its place in the shuffle. A
unit's documents are sorted by key, so the final corpus is a merge of the units by ranges of keys (`merge.py`), which
needs memory for one range at a time. A unit's content depends only on its documents, its number and the seed, not on
the worker that encoded it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from ...files import replacing
from ..plain_reads import CutShortError, open_regular, read_array
from ..splitmix import GAMMA, mix

_Array = np.ndarray[Any, Any]

VALIDATION_KEY = 1 << 63
"""The first key of a validation document."""

LONG_DOCUMENT = 1 << 20
"""Number of characters encoded in one call, for which the tokenizer needs some 50 times as much memory. Longer
documents are cut at line breaks between words, where byte-level BPE starts a new word anyway."""

_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class Encoding:
    """How documents are encoded, shuffled and split."""

    tokenizer: Tokenizer
    delimiter: int | None
    """Id written after every document; None for none."""
    dtype: np.dtype[Any]
    seed: int = 0
    """Random seed for the shuffle and the validation split."""
    validation: float = 0.0
    """Share of documents in the validation split, 0…1, by a hash of their text: equal documents stay together."""

    def encode(self, texts: list[str]) -> Iterator[_Array]:
        """Yield the tokens of each document, including its delimiter.

        Names of special tokens in a document are encoded as ordinary text, so that a delimiter in the corpus is always
        between documents.
        """
        self.tokenizer.encode_special_tokens = True
        tail = np.array([] if self.delimiter is None else [self.delimiter], self.dtype)
        short = [text for text in texts if len(text) <= LONG_DOCUMENT]
        encoded = iter(self.tokenizer.encode_batch_fast(short, add_special_tokens=False))
        for text in texts:
            parts = [next(encoded)] if len(text) <= LONG_DOCUMENT else _encode_long(text, self.tokenizer)
            yield np.concatenate([*(np.array(part.ids, self.dtype) for part in parts), tail])


@dataclass(frozen=True)
class Summary:
    """The end of a unit's index."""

    key: bytes
    """`tasks.Task.key` of its task: 32 bytes."""
    skipped: int
    """Number of malformed records left out."""
    least_hash: int
    """The smallest of its documents' hashes, which choose validation documents; 2^64 - 1 if it has no documents."""
    tokens: int = 0


def encode_unit(
    path: Path,
    number: int,
    documents: Iterable[str],
    encoding: Encoding,
    key: bytes = bytes(32),
    skipped: Callable[[], int] = lambda: 0,
) -> Summary:
    """Encode the documents of unit `number` into `path`.tokens and `path`.index.

    key: the summary's key. skipped: called after all documents were read; returns the number of records left out.

    The index is renamed into place last: a unit that has one is complete.
    """
    encoded: list[_Array] = []
    hashes: list[int] = []
    for batch in _batches(documents):
        encoded += encoding.encode(batch)
        hashes += [_hash(text, encoding) for text in batch]
    held_out = np.array([hashed < encoding.validation * 2**64 for hashed in hashes], np.uint64)
    keys = shuffle_keys(number, len(encoded), encoding.seed) | (held_out << np.uint64(63))
    order = np.argsort(keys, kind="stable")
    ordered = [encoded[i] for i in order]
    ends = np.cumsum([len(tokens) for tokens in ordered], dtype="<u8")
    _write(path.with_suffix(".tokens"), ordered)
    summary = Summary(key, skipped(), min(hashes, default=2**64 - 1), int(ends[-1]) if len(ends) else 0)
    tail = np.array([*np.frombuffer(key, "<u8"), summary.skipped, summary.least_hash, len(encoded)], "<u8")
    _write(path.with_suffix(".index"), [keys[order].astype("<u8"), ends, tail])
    return summary


class Unit:
    """An encoded unit on disk. Files are closed after each call: a merge has thousands of units."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype

    def range(self, start: int, stop: int) -> tuple[_Array, list[_Array]]:
        """Documents with start <= key < stop: their keys (documents,), and each document's tokens."""
        with self._open() as index:
            first, last = index.find([start, stop])
            keys, ends = index.keys(first, last), index.ends(first, last)
            begin = index.end(first)
        end = int(ends[-1]) if len(ends) else begin
        tokens = read_array(self.path.with_suffix(".tokens"), self.dtype, end - begin, begin * self.dtype.itemsize)
        return keys, np.split(tokens, ends.astype(np.int64) - begin)[:-1]

    def counts(self, bounds: Sequence[int]) -> tuple[_Array, _Array]:
        """Number of documents and of tokens below each key in `bounds`: two (len(bounds),) int64 arrays."""
        with self._open() as index:
            documents = index.find(bounds)
            return np.array(documents, np.int64), np.array([index.end(count) for count in documents], np.int64)

    @contextmanager
    def _open(self) -> Iterator[_Index]:
        with open_regular(self.path.with_suffix(".index")) as file:
            yield _Index(file)


class _Index:
    """A unit's index: the keys, the cumulative token counts, and the summary, each read when needed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.documents = max(0, (file.seek(0, os.SEEK_END) // 8 - _TAIL) // 2)
        if int(self._numbers(2 * self.documents, 2 * self.documents + _TAIL)[-1]) != self.documents:
            raise CutShortError(f"{file.name} was cut short or changed: the same command makes it anew")

    def keys(self, first: int, last: int) -> _Array:
        return self._numbers(first, last)

    def ends(self, first: int, last: int) -> _Array:
        return self._numbers(self.documents + first, self.documents + last)

    def end(self, documents: int) -> int:
        """Number of tokens in the first `documents` documents."""
        return int(self.ends(documents - 1, documents)[0]) if documents else 0

    def find(self, bounds: Sequence[int]) -> list[int]:
        """For each of `bounds`, the number of documents with a smaller key."""
        keys = self.keys(0, self.documents)
        return [len(keys) if key > 2**64 - 1 else int(np.searchsorted(keys, np.uint64(key))) for key in bounds]

    def summary(self) -> Summary:
        tail = self._numbers(2 * self.documents, 2 * self.documents + _TAIL)
        return Summary(tail[:4].tobytes(), int(tail[4]), int(tail[5]), self.end(self.documents))

    def _numbers(self, first: int, last: int) -> _Array:
        return read_array(self._file, "<u8", last - first, 8 * first)


_TAIL = 7
"""Count of numbers after the keys and ends: the task's key (four), records left out, the least hash, documents."""


def completed(path: Path, dtype: np.dtype[Any], key: bytes) -> Summary | None:
    """The summary of a complete unit for the task with this key; None if there is no such unit."""
    stored = path.with_suffix(".tokens")
    try:
        with open_regular(path.with_suffix(".index")) as file:
            summary = _Index(file).summary()
        whole = stored.stat().st_size == summary.tokens * dtype.itemsize
    except (FileNotFoundError, CutShortError):
        return None
    return summary if whole and summary.key == key else None


def _encode_long(text: str, tokenizer: Tokenizer) -> Iterator[Any]:
    start = 0
    while start < len(text):
        cut = _LINE_BREAK.search(text, start + LONG_DOCUMENT)
        end = cut.end() if cut else len(text)
        yield tokenizer.encode_batch_fast([text[start:end]], add_special_tokens=False)[0]
        start = end


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= LONG_DOCUMENT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _hash(text: str, encoding: Encoding) -> int:
    """A 64-bit hash, equal for equal documents. Documents with a hash below the share of validation belong to it."""
    hashed = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8, salt=encoding.seed.to_bytes(8, "little")
    )
    return int.from_bytes(hashed.digest(), "little")


def shuffle_keys(unit: int, documents: int, seed: int) -> _Array:
    """(documents,) uint64 below 2^63: SplitMix64 of each document's place and the seed."""
    place = (np.uint64(unit) << np.uint64(32)) + np.arange(documents, dtype=np.uint64)
    return mix((place ^ mix(np.full(1, seed, np.uint64) + GAMMA)) + GAMMA) >> np.uint64(1)


def _write(path: Path, arrays: Iterable[_Array]) -> None:
    with replacing(path) as file:
        for array in arrays:
            file.write(array.data)
