"""Words and word n-grams as 64-bit numbers, computed by numpy from the bytes of a text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..data.splitmix import mix

_Array = np.ndarray[Any, Any]

BASE = 0x9E3779B97F4A7C15
"""Base of the polynomial hash, odd, so that it has an inverse modulo 2^64: the fraction of the golden ratio."""
_SPACE = 32
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|[^\W_]+")
"""A word of text that is not ASCII. Scripts without spaces (kana, Han, Thai, Lao, Burmese, Khmer): each character."""


def normalize(text: str) -> bytes:
    """Lower-case a text, and leave one space or more between its words: letters and digits, without punctuation."""
    lowered = text.lower()
    if lowered.isascii():
        return lowered.encode().translate(_letters())
    return " ".join(_WORD.findall(lowered)).encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Words:
    """The words of a normalized text."""

    data: bytes
    starts: _Array
    """(words,) int64: where each begins in `data`."""
    stops: _Array
    """(words,) int64."""
    hashes: _Array
    """(words,) uint64, equal for equal words."""

    def run(self, first: int, count: int) -> bytes:
        """Return `count` words from number `first` on, with one space between two."""
        return b" ".join(self.data[self.starts[first] : self.stops[first + count - 1]].split())


def words_of(text: str) -> Words:
    """Find and hash a text's words. Texts that differ in case, spaces and punctuation only have equal hashes.

    A text is hashed in blocks of 1 MiB, so that the arrays stay below 50 MiB for any length; a word of more than 1 MiB
    is cut."""
    data = normalize(text)
    if len(data) <= _BLOCK:
        return Words(data, *_block(data))
    parts: list[tuple[_Array, _Array, _Array]] = []
    first = 0
    while first < len(data):
        stop = min(first + _BLOCK, len(data))
        if stop < len(data):
            space = data.rfind(b" ", first + 1, stop)
            stop = space if space > first else stop
        starts, stops, hashes = _block(data[first:stop])
        parts.append((starts + first, stops + first, hashes))
        first = stop
    starts, stops, hashes = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Words(data, starts, stops, hashes)


def _block(data: bytes) -> tuple[_Array, _Array, _Array]:
    """Find and hash the words of at most `_BLOCK` bytes.

    The hash of bytes b is Σ (b_i + 1) · base^i modulo 2^64, taken from the running sum over the block, divided by the
    power at the word's start, then mixed.
    """
    bytes_ = np.frombuffer(data, np.uint8)
    inside = np.zeros(len(bytes_) + 2, bool)
    inside[1:-1] = bytes_ != _SPACE
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, stops = edges[0::2], edges[1::2]
    powers, inverses = _powers()
    sums = np.zeros(len(bytes_) + 1, np.uint64)
    np.cumsum((bytes_.astype(np.uint64) + np.uint64(1)) * powers[: len(bytes_)], out=sums[1:])
    return starts, stops, mix((sums[stops] - sums[starts]) * inverses[starts])


def ngrams(words: _Array, n: int) -> _Array:
    """Hash each run of `n` words: (words - n + 1,) uint64; a text with fewer words is one run; none has none."""
    if len(words) == 0:
        return words
    n = min(n, len(words))
    count = len(words) - n + 1
    total = np.full(count, n, np.uint64)
    for i in range(n):
        total = total * np.uint64(BASE) + words[i : i + count]
    return mix(total)


@cache
def _letters() -> bytes:
    """Make the table that turns every ASCII byte that is neither letter nor digit into a space."""
    return bytes(byte if chr(byte).isalnum() and byte < 128 else _SPACE for byte in range(256))


_BLOCK = 2**20
"""Bytes of text hashed at once."""


@cache
def _powers() -> tuple[_Array, _Array]:
    """Compute base^i and base^-i modulo 2^64 for i up to `_BLOCK`: two arrays of 8 MiB."""
    powers = []
    for base in (BASE, pow(BASE, -1, 2**64)):
        factors = np.full(_BLOCK + 1, base, np.uint64)
        factors[0] = 1
        powers.append(np.multiply.accumulate(factors))
    return powers[0], powers[1]
