"""Word n-grams of benchmarks in documents, as for GPT-3 (arXiv 2005.14165, appendix C) and phi-1 (section 5.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..data.splitmix import mix
from .words import BASE, Words, words_of

_Array = np.ndarray[Any, Any]
_FILTER_BITS = 24
_LEAST_DISTINCT = 5
"""Distinct words in an n-gram, and half of its words must hold a letter: runs of numbers or of one word say little."""


class KnownNgrams:
    """The n-grams of texts. A shorter text counts as a whole, if it has at least `shortest` words.

    Each n-gram takes 20 bytes, and there are 16 MiB in which most n-grams of documents are looked up.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], n: int, shortest: int) -> None:
        """Take (name, text) pairs; of several texts with one n-gram, the first gives its name."""
        self._names: list[str] = []
        self._texts: list[bytes] = []
        found: dict[int, list[tuple[_Array, _Array]]] = {length: [] for length in range(min(shortest, n), n + 1)}
        for name, text in texts:
            if len(text) < 2 * shortest - 1:
                continue  # it cannot have so many words
            words = words_of(text)
            length = min(len(words.hashes), n)
            if length in found:
                grams = next(grams for size, grams in _grams(words.hashes, length) if size == length)
                telling = _telling(words, length)
                place = np.stack([np.full(len(grams), len(self._names)), words.starts[: len(grams)]], axis=1)
                found[length].append((grams[telling], place[telling].astype(np.uint32)))
                self._names.append(name)
                self._texts.append(words.data)
        self._known = {length: _first_of_each(parts) for length, parts in found.items() if parts}
        self._filters = {}
        for length, (keys, _) in self._known.items():
            self._filters[length] = np.zeros(2**_FILTER_BITS // 8, np.uint8)
            np.bitwise_or.at(self._filters[length], *_bit(keys))

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._known.values())

    def find(self, text: str) -> tuple[str, str] | None:
        """Find an n-gram of a text that a benchmark has, the longest and first: (name, its words); None if there is
        none.

        The words are compared, too, so that no two hashes that are equal by chance count.
        """
        words = words_of(text)
        found = None
        for length, grams in _grams(words.hashes, max(self._known, default=0)):
            if length in self._known:
                found = self._first(words, length, grams) or found
        return found

    def _first(self, words: Words, length: int, grams: _Array) -> tuple[str, str] | None:
        byte, bit = _bit(grams)
        maybe = np.flatnonzero(self._filters[length][byte] & bit)
        keys, places = self._known[length]
        at = np.minimum(np.searchsorted(keys, grams[maybe]), len(keys) - 1)
        equal = keys[at] == grams[maybe]
        for first, (record, start) in zip(maybe[equal].tolist(), places[at[equal]].tolist(), strict=True):
            run = words.run(first, length)
            known = self._texts[record][start : start + 2 * len(run) + 64].split()[:length]
            if known == run.split():
                return self._names[record], run.decode("utf-8", "replace")
        return None


def _grams(hashes: _Array, longest: int) -> Iterator[tuple[int, _Array]]:
    """Hash the n-grams of every length up to `longest`, the shortest first: (length, (n-grams,) uint64)."""
    total = np.zeros(len(hashes), np.uint64)
    for length in range(1, longest + 1):
        if len(hashes) < length:
            return
        total = total[: len(hashes) - length + 1] * np.uint64(BASE) + hashes[length - 1 :]
        yield length, total


def _bit(grams: _Array) -> tuple[_Array, _Array]:
    """Place n-grams in a filter: (byte, bit in it)."""
    place = mix(grams) >> np.uint64(64 - _FILTER_BITS)
    return (place >> np.uint64(3)).astype(np.int64), np.left_shift(1, place & np.uint64(7), dtype=np.uint64).astype(
        np.uint8
    )


def _telling(words: Words, length: int) -> _Array:
    """Tell which n-grams say something: enough distinct words, and letters in half of them."""
    letters = np.concatenate(([0], np.cumsum(np.frombuffer(words.data, np.uint8) > ord("9"))))
    lettered = (letters[words.stops] - letters[words.starts]) > 0
    window = np.lib.stride_tricks.sliding_window_view
    ordered = np.sort(window(words.hashes, length), axis=1)
    distinct = 1 + (np.diff(ordered, axis=1) != 0).sum(1)
    telling: _Array = (distinct >= min(_LEAST_DISTINCT, length)) & (2 * window(lettered, length).sum(1) >= length)
    return telling


def _first_of_each(parts: list[tuple[_Array, _Array]]) -> tuple[_Array, _Array]:
    """Join n-grams and sort them; of equal ones, the first counts."""
    keys, first = np.unique(np.concatenate([keys for keys, _ in parts]), return_index=True)
    return keys, np.concatenate([places for _, places in parts])[first]
