"""The nearest text of a benchmark by L2 distance between embeddings of length 1 (phi-1, section 5.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .embeddings import HASHING, check, hashing, normalized, pretrained

_Array = np.ndarray[Any, Any]
_FEATURES = 2**20
_COMMON = 0.05
"""Words and pairs in more than this share of the benchmarks' texts do not count: they say little and cost most."""
_UNITS = 256
"""Texts compared at once."""
_PARAGRAPHS = re.compile(r"\n\s*\n")
_WORDS = re.compile(r"\S+")
LEAST_WORDS = 8
_MOST_WORDS = 200


def units(text: str) -> list[str]:
    """Cut a text into what is compared: its paragraphs of at least 8 words, long ones in pieces of 200 words."""
    found = []
    for paragraph in _PARAGRAPHS.split(text):
        words = _WORDS.findall(paragraph)
        for first in range(0, len(words), _MOST_WORDS):
            piece = words[first : first + _MOST_WORDS]
            if len(piece) >= LEAST_WORDS:
                found.append(" ".join(piece))
    return found


class Neighbours:
    """The texts of benchmarks, to find the nearest one to others.

    embedding "hashing": counts of words and pairs of words, weighted by how rare they are in the benchmarks (TF-IDF).
    It needs no weights, and finds texts with the same words in another order or with some replaced; a pretrained model
    finds paraphrases."""

    def __init__(self, texts: Sequence[tuple[str, str]], embedding: str, distance: float) -> None:
        """Take (name, text) pairs, the embedding's name, and the distance below which a text is a neighbour."""
        check(embedding)
        self._names = [name for name, _ in texts]
        self._texts = [text for _, text in texts]
        self._embedding, self._distance = embedding, distance

    def __len__(self) -> int:
        return len(self._texts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_model"}  # each worker makes its own

    def nearest(self, texts: Sequence[str]) -> list[tuple[str, float] | None]:
        """Find each text's nearest neighbour: (name, distance); None if the nearest is not near enough."""
        found: list[tuple[str, float] | None] = []
        for first in range(0, len(texts), _UNITS):
            some = texts[first : first + _UNITS]
            similar = self._similarities(some)
            best = similar.argmax(1)
            distances = np.sqrt(np.maximum(2 - 2 * similar[np.arange(len(some)), best], 0))
            found += [
                (self._names[i], float(distance)) if distance < self._distance else None
                for i, distance in zip(best.tolist(), distances.tolist(), strict=True)
            ]
        return found

    def _similarities(self, texts: Sequence[str]) -> _Array:
        """Compute the cosine of each text with each of the benchmarks': (texts, benchmarks' texts)."""
        if self._embedding == HASHING:
            vectorize, known = self._model
            dense: _Array = (vectorize(texts) @ known.T).toarray()
            return dense
        model, known = self._model
        product: _Array = normalized(model.embed(texts)) @ known.T
        return product

    @cached_property
    def _model(self) -> Any:
        if self._embedding != HASHING:
            model = pretrained(self._embedding)
            return model, normalized(model.embed(self._texts))
        from scipy.sparse import csr_matrix, diags_array
        from sklearn.preprocessing import normalize

        counter = hashing(_FEATURES)
        counts = csr_matrix(counter.transform(self._texts))
        frequency = np.bincount(counts.indices, minlength=_FEATURES)
        weights = np.log((1 + len(self._texts)) / (1 + frequency)) + 1
        weights[frequency > max(_COMMON * len(self._texts), 1)] = 0
        scale = diags_array(weights)

        def vectorize(texts: Sequence[str]) -> Any:
            return normalize(counter.transform(texts) @ scale)

        return vectorize, normalize(counts @ scale)
