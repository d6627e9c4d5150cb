"""All scores of one name, and the documents to look at: those nearest to a threshold, and some from each side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappush, heappushpop

import numpy as np

from .documents import Document

EXCERPT = 1200
"""Characters of a document that are shown."""


@dataclass(order=True)
class Sample:
    """A document to look at."""

    rank: float
    """Documents with the greatest ranks are kept."""
    id: str
    score: float = field(compare=False)
    excerpt: str = field(compare=False)
    characters: int = field(compare=False)


class _Few:
    """The few documents with the greatest ranks."""

    def __init__(self, count: int) -> None:
        self._count, self._kept = count, list[Sample]()

    def offer(self, rank: float, document: Document, score: float) -> None:
        if len(self._kept) < self._count or rank > self._kept[0].rank:
            sample = Sample(rank, document.id, score, document.text[:EXCERPT], len(document.text))
            (heappush if len(self._kept) < self._count else heappushpop)(self._kept, sample)

    def by_score(self) -> list[Sample]:
        return sorted(self._kept, key=lambda sample: (sample.score, sample.id))


@dataclass
class Scores:
    """What a page about one score shows."""

    name: str
    at_least: float
    values: np.ndarray[tuple[int], np.dtype[np.float32]]
    """(documents,) float32, in their order: 4 bytes for each."""
    missing: int
    """Documents without the score."""
    nearest_below: list[Sample]
    nearest_above: list[Sample]
    any_below: list[Sample]
    """Documents chosen by a hash of their ids: the same ones for the same documents in any order."""
    any_above: list[Sample]


def gather(documents: Iterable[Document], name: str, at_least: float, samples: int) -> Scores:
    """Read every document once. samples: how many of each kind to keep."""
    values = np.empty(1024, np.float32)
    count = missing = 0
    near, some = [_Few(samples), _Few(samples)], [_Few(samples), _Few(samples)]
    for document in documents:
        score = document.scores.get(name)
        if score is None:
            missing += 1
            continue
        if count == len(values):
            values = np.concatenate([values, np.empty(len(values), np.float32)])
        values[count] = score
        count += 1
        above = int(score >= at_least)
        near[above].offer(-abs(score - at_least), document, score)
        some[above].offer(_chance(document.id), document, score)
    found = values[:count].copy()
    return Scores(
        name, at_least, found, missing, near[0].by_score(), near[1].by_score(), some[0].by_score(), some[1].by_score()
    )


def _chance(name: str) -> float:
    hashed = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(hashed, "little") / 2**48
