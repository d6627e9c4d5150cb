"""Measures how diverse a set of texts is.

- distinct-n (Li et al. 2016, arXiv 1510.03055): distinct word n-grams divided by all word n-grams. It falls as a set
  grows, so compare sets of equal size only; the number of words is reported beside it.
- self-similarity: the mean and the largest Jaccard similarity of word 5-grams over pairs of texts, by MinHash.
- compression ratio (Shaib et al. 2024, arXiv 2403.00553): bytes of all texts divided by their bytes after gzip. A
  set that repeats itself compresses better, so lower is more diverse.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .duplicates import signature, words

LARGEST_SAMPLE = 1000
"""Maximum number of texts measured: all pairs of them are compared."""
DISTINCT = (1, 2, 3, 4)


def evenly(count: int, most: int = LARGEST_SAMPLE) -> list[int]:
    """At most `most` of the numbers 0…count-1, evenly spaced."""
    return [count * i // min(count, most) for i in range(min(count, most))]


def diversity(texts: Sequence[str]) -> dict[str, Any]:
    """Measure texts; a value is None where there are too few of them for it."""
    return {
        "texts": len(texts),
        **_distinct(texts),
        "self_similarity": _self_similarity(texts),
        "compression_ratio": _compression_ratio(texts),
    }


def _distinct(texts: Sequence[str]) -> dict[str, Any]:
    found: list[set[tuple[str, ...]]] = [set() for _ in DISTINCT]
    totals = [0 for _ in DISTINCT]
    for text in texts:
        split = words(text)
        for place, length in enumerate(DISTINCT):
            grams = [tuple(split[i : i + length]) for i in range(len(split) - length + 1)]
            found[place].update(grams)
            totals[place] += len(grams)
    ratios = {
        f"distinct_{length}": len(grams) / total if total else None
        for length, grams, total in zip(DISTINCT, found, totals, strict=True)
    }
    return {"words": totals[0], **ratios}


def _self_similarity(texts: Sequence[str]) -> dict[str, Any] | None:
    signatures = [signature(text) for text in texts if words(text)]
    if len(signatures) < 2:
        return None
    values = np.array([each.digest() for each in signatures])  # (texts, permutations)
    nearest = np.zeros(len(values))
    total = 0.0
    for i in range(1, len(values)):
        similar = (values[:i] == values[i]).mean(1)  # (i,)
        total += float(similar.sum())
        nearest[i] = max(nearest[i], similar.max())
        nearest[:i] = np.maximum(nearest[:i], similar)
    return {
        "mean": total / (len(values) * (len(values) - 1) / 2),
        "mean_of_nearest": float(nearest.mean()),
        "largest": float(nearest.max()),
    }


def _compression_ratio(texts: Sequence[str]) -> float | None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)  # gzip's format
    before = after = 0
    for text in texts:
        data = text.encode("utf-8", "surrogatepass") + b"\n"
        before += len(data)
        after += len(packer.compress(data))
    return before / (after + len(packer.flush())) if texts else None
