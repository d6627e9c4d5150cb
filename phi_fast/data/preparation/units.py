"""A unit: some documents encoded, and kept on disk in the order in which the corpus wants them.

Every document has a 64-bit key: its top bit says whether it goes to validation, the others are its place in the
shuffle. A unit's documents lie sorted by key, so the final corpus is a merge of units by ranges of keys (`merge.py`),
in memory of one range. What a unit holds is a function of its documents, its number and the seed alone: not of who
encoded it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_Array = np.ndarray[Any, Any]

VALIDATION_KEY = 1 << 63
"""The first key of a validation document."""

LONG_DOCUMENT = 1 << 20
"""Characters encoded in one call: the tokenizer's own memory is some 50 times that. Longer documents are cut at line
breaks between words, where byte-level BPE starts a new word anyway."""

_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class Encoding:
    """What makes tokens of documents, and says where each goes."""

    tokenizer: Tokenizer
    delimiter: int | None
    """Id written after every document; None for none."""
    dtype: np.dtype[Any]
    seed: int = 0
    """Of the shuffle and of the validation split."""
    validation: float = 0.0
    """Share of documents in the validation split, 0…1, by a hash of their text: equal documents stay together."""


def encode_unit(path: Path, number: int, documents: Iterable[str], encoding: Encoding) -> int:
    """Encode the documents of unit `number` into `path`.tokens and `path`.index. Returns tokens written.

    Special tokens' names in a document are encoded as the text they are: a delimiter in the corpus is always one that
    stands between documents. The index is renamed into place last: a unit that has one is complete.
    """
    encoding.tokenizer.encode_special_tokens = True
    encoded: list[_Array] = []
    held_out: list[bool] = []
    for batch in _batches(documents):
        encoded += _encode(batch, encoding)
        held_out += [_is_validation(text, encoding) for text in batch]
    keys = _shuffle_keys(number, len(encoded), encoding.seed) | (np.array(held_out, np.uint64) << np.uint64(63))
    order = np.argsort(keys, kind="stable")
    ordered = [encoded[i] for i in order]
    ends = np.cumsum([len(tokens) for tokens in ordered], dtype="<u8")
    _write(path.with_suffix(".tokens"), ordered)
    _write(path.with_suffix(".index"), [keys[order].astype("<u8"), ends])
    return int(ends[-1]) if len(ends) else 0


class Unit:
    """An encoded unit on disk. Nothing stays open between calls: a merge has thousands of units."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype

    def range(self, start: int, stop: int) -> tuple[_Array, list[_Array]]:
        """Documents with start <= key < stop: their keys (documents,), and the tokens of each."""
        keys, ends = self._index()
        first, last = _find(keys, start), _find(keys, stop)
        begin, end = (int(ends[at - 1]) if at else 0 for at in (first, last))
        stored, width = self.path.with_suffix(".tokens"), self.dtype.itemsize
        tokens = np.fromfile(stored, self.dtype, end - begin, offset=begin * width)
        return np.array(keys[first:last]), np.split(tokens, ends[first:last].astype(np.int64) - begin)[:-1]

    def counts(self, bounds: Sequence[int]) -> tuple[_Array, _Array]:
        """Documents and tokens below each key of `bounds`: two (len(bounds),) int64 arrays."""
        keys, ends = self._index()
        documents = np.array([_find(keys, bound) for bound in bounds], np.int64)
        return documents, np.concatenate([[0], ends]).astype(np.int64)[documents]

    def _index(self) -> tuple[_Array, _Array]:
        """Keys and cumulative token counts, (documents,) uint64 each, mapped."""
        index = _map(self.path.with_suffix(".index"), np.dtype("<u8"))
        return index[: len(index) // 2], index[len(index) // 2 :]


def _find(keys: _Array, key: int) -> int:
    return len(keys) if key > 2**64 - 1 else int(np.searchsorted(keys, np.uint64(key)))


def is_complete(path: Path, dtype: np.dtype[Any]) -> bool:
    """Whether a unit was encoded to its end; sizes are checked against each other."""
    if not path.with_suffix(".index").exists():
        return False
    index = _map(path.with_suffix(".index"), np.dtype("<u8"))
    tokens = int(index[-1]) if len(index) else 0
    stored = path.with_suffix(".tokens")
    return stored.exists() and stored.stat().st_size == tokens * dtype.itemsize


def _encode(texts: list[str], encoding: Encoding) -> Iterator[_Array]:
    """The tokens of each document, its delimiter included."""
    tokenizer = encoding.tokenizer
    tail = np.array([] if encoding.delimiter is None else [encoding.delimiter], encoding.dtype)
    short = [text for text in texts if len(text) <= LONG_DOCUMENT]
    encoded = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    for text in texts:
        parts = [next(encoded)] if len(text) <= LONG_DOCUMENT else _encode_long(text, tokenizer)
        yield np.concatenate([*(np.array(part.ids, encoding.dtype) for part in parts), tail])


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


def _is_validation(text: str, encoding: Encoding) -> bool:
    hashed = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8, salt=encoding.seed.to_bytes(8, "little")
    )
    return int.from_bytes(hashed.digest(), "little") < encoding.validation * 2**64


def _shuffle_keys(unit: int, documents: int, seed: int) -> _Array:
    """(documents,) uint64 below 2^63: SplitMix64 (Steele, Lea, Flood 2014) of each document's place and the seed."""
    place = (np.uint64(unit) << np.uint64(32)) + np.arange(documents, dtype=np.uint64)
    return _mix(place ^ _mix(np.full(1, seed, np.uint64))) >> np.uint64(1)


def _mix(x: _Array) -> _Array:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _map(path: Path, dtype: np.dtype[Any]) -> _Array:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _write(path: Path, arrays: Iterable[_Array]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        for array in arrays:
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
