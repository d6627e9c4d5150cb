"""Finds near-duplicates by MinHash, and measures similarity by the same signatures.

Signatures and the index are rensa's. Two texts are compared by their sets of word 5-grams, as in the
deduplication of Cosmopedia and FineWeb.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from ..errors import UsageError

SHINGLE_WORDS = 5
PERMUTATIONS = 128
"""Length of a signature: the standard error of a similarity s is sqrt(s (1 - s) / 128), at most 0.045."""
LARGEST_MISS = 0.01

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The text's words, in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def shingles(text: str) -> set[str]:
    """The text's distinct word 5-grams; of a text with fewer words, the text. Empty for a text without words."""
    found = words(text)
    if len(found) < SHINGLE_WORDS:
        return {" ".join(found)} if found else set()
    return {" ".join(found[i : i + SHINGLE_WORDS]) for i in range(len(found) - SHINGLE_WORDS + 1)}


def signature(text: str) -> Any:
    """A text's `rensa.RMinHash`."""
    from rensa import RMinHash

    result = RMinHash(num_perm=PERMUTATIONS, seed=1)
    result.update(list(shingles(text)))
    return result


def require_rensa() -> None:
    """Raise UsageError if the package `rensa` is missing."""
    if importlib.util.find_spec("rensa") is None:
        raise UsageError("phi_fast.synthesize needs rensa: pip install 'phi-fast[synthesize]'")


def bands(similarity: float) -> tuple[int, int]:
    """(bands, rows per band) of the index: as many rows as miss at most 1% of the pairs of that similarity.

    A pair is missed if it differs in every band, with probability (1 - similarity^rows)^bands (Leskovec et al., Mining
    of Massive Datasets, section 3.4). More rows mean fewer candidates to compare.
    """
    for rows in (64, 32, 16, 8, 4, 2):  # rensa wants bands of one size
        count = PERMUTATIONS // rows
        if (1 - similarity**rows) ** count <= LARGEST_MISS:
            return count, rows
    return PERMUTATIONS, 1


class NearDuplicates:
    """The texts kept so far, and whether a new one is similar to one of them.

    It holds one signature and its index entries per kept text: about 4 kB.
    """

    def __init__(self, similarity: float) -> None:
        """similarity: the estimated Jaccard similarity of word 5-grams from which on a text is a duplicate, 0 to 1.

        Raises UsageError for another number, and if rensa is missing.
        """
        if not 0 < similarity <= 1:
            raise UsageError(f"--duplicate-similarity {similarity}: expected a similarity above 0, up to 1")
        require_rensa()
        from rensa import RMinHashLSH

        self.similarity = similarity
        self._index = RMinHashLSH(threshold=similarity, num_perm=PERMUTATIONS, num_bands=bands(similarity)[0])
        self._signatures: dict[int, Any] = {}

    def add(self, number: int, text: str) -> int | None:
        """Keep a text, unless it is a duplicate: then the number of the most similar text kept before is returned."""
        new = signature(text)
        candidates = sorted(self._index.query(new))
        similar = [(new.jaccard(self._signatures[other]), -other) for other in candidates]
        if similar and max(similar)[0] >= self.similarity:
            return -max(similar)[1]
        self._index.insert(number, new)
        self._signatures[number] = new
        return None
