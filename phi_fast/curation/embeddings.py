"""Texts as vectors: word statistics by scikit-learn, which need no weights, or a pretrained model by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .documents import CurateError
from .extras import require

_Array = np.ndarray[Any, Any]
HASHING = "hashing"
KINDS = ("model2vec", "sentence-transformers")
"""Libraries of pretrained models: "KIND:NAME", where NAME is a folder or a name on the Hugging Face hub."""


class Embedding(Protocol):
    """Turns texts into vectors."""

    def embed(self, texts: Sequence[str]) -> _Array:
        """Return (texts, dimensions) float32."""
        ...


def check(name: str) -> None:
    """Raise CurateError for a name that is no embedding, and for a package that is missing."""
    kind, _, model = name.partition(":")
    if name == HASHING:
        require("sklearn", "the embedding 'hashing'")
    elif kind in KINDS and model:
        require(kind.replace("-", "_"), f"the embedding {name!r}", package=kind)
    else:
        raise CurateError(
            f"there is no embedding {name!r}: choose {HASHING}, {' or '.join(f'{kind}:NAME' for kind in KINDS)}"
        )


def pretrained(name: str) -> Embedding:
    """Load "model2vec:NAME" or "sentence-transformers:NAME". Raises CurateError if it cannot be loaded."""
    check(name)
    kind, _, model = name.partition(":")
    try:
        if kind == "model2vec":
            from model2vec import StaticModel

            return _Model2Vec(StaticModel.from_pretrained(model))
        from sentence_transformers import SentenceTransformer

        return _SentenceTransformer(SentenceTransformer(model))
    except Exception as error:  # whatever the library, the hub and its files raise
        raise CurateError(
            f"{name} cannot be loaded: {str(error)[:300]}. Name a folder with the model, or one on the hub"
        ) from error


class _Model2Vec:
    def __init__(self, model: Any) -> None:
        self._model = model

    def embed(self, texts: Sequence[str]) -> _Array:
        return np.asarray(self._model.encode(list(texts)), np.float32)


class _SentenceTransformer:
    def __init__(self, model: Any) -> None:
        self._model = model

    def embed(self, texts: Sequence[str]) -> _Array:
        found = self._model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(found, np.float32)


def normalized(vectors: _Array) -> _Array:
    """Scale each row to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: _Array = vectors / np.where(lengths == 0, 1, lengths)
    return scaled


def hashing(features: int) -> Any:
    """Make scikit-learn's stateless counter of words and pairs of words, in `features` columns; rows of length 1."""
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(
        n_features=features, ngram_range=(1, 2), alternate_sign=False, norm="l2", token_pattern=r"\w+"
    )
