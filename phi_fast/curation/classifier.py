"""phi-1's classifier of educational value (section 2.1): a random forest on embeddings, trained on a few thousand
labels.

The default embedding counts words and pairs of words and reduces the counts to a few dimensions by a singular value
decomposition, all by scikit-learn, so that neither a GPU nor a download is needed. The file is skops', which, unlike a
pickle, runs no code when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..files import sha256_of, write_atomically, writing
from .documents import CurateError, Document, Drop
from .embeddings import HASHING, check, hashing, pretrained
from .extras import require

_Array = np.ndarray[Any, Any]
_FEATURES = 2**18
FORMAT = "phi_fast.curate classifier 1"
_TRUSTED = ("sklearn.tree._tree.Tree",)
"""Types that skops does not trust, and that `_sound` checks."""
MOST_CLASSES = 20
"""Distinct labels; more are rounded to whole numbers."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a classifier is trained."""

    embedding: str = HASHING
    """"hashing", "model2vec:NAME" or "sentence-transformers:NAME"."""
    dimensions: int = 128
    """Dimensions that "hashing" is reduced to."""
    trees: int = 200
    """Trees of the forest."""
    held_out: float = 0.2
    """Share of the samples that the classifier is judged on, not trained on."""
    good: float = 3.0
    """Score from which on a document counts as good, in the precision and recall that are reported."""
    seed: int = 0
    """Random seed of the split, the reduction and the forest."""

    def check(self) -> None:
        """Raise CurateError for an invalid value, and for a package that is missing."""
        if self.dimensions < 2 or self.trees < 1:
            raise CurateError("dimensions must be at least 2, and trees at least 1")
        if not 0 < self.held_out < 1:
            raise CurateError(f"held_out={self.held_out}: expected a share between 0 and 1")
        for module in ("sklearn", "skops"):
            require(module, "the classifier")
        check(self.embedding)


class Classifier:
    """Scores texts: the expected label of a forest, the sum of each label times its probability."""

    def __init__(self, embedding: str, reduction: Any, forest: Any) -> None:
        """Take the embedding's name, a fitted TruncatedSVD for "hashing" (else None), and a fitted forest."""
        self.embedding, self._reduction, self._forest = embedding, reduction, forest

    @cached_property
    def _embed(self) -> Any:
        if self.embedding != HASHING:
            return pretrained(self.embedding).embed
        counter = hashing(_FEATURES)
        return lambda texts: self._reduction.transform(counter.transform(texts)).astype(np.float32)

    def score(self, texts: Sequence[str]) -> _Array:
        """Return (texts,) float64."""
        if not len(texts):
            return np.empty(0)
        probabilities = self._forest.predict_proba(self._embed(texts))
        scores: _Array = probabilities @ np.asarray(self._forest.classes_, np.float64)
        return scores

    def save(self, file: Path) -> None:
        """Write the classifier. Raises CurateError if it cannot be written."""
        import skops.io

        state = {"format": FORMAT, "embedding": self.embedding, "reduction": self._reduction, "forest": self._forest}
        with writing(file, "free some space, or name another --out"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, skops.io.dumps(state))

    @staticmethod
    def load(file: Path) -> Classifier:
        """Read a classifier. Raises CurateError for any other file, and for one that holds other types."""
        for module in ("sklearn", "skops"):
            require(module, "the classifier")
        import skops.io

        try:
            data = file.read_bytes()
        except OSError as error:
            raise CurateError(f"{file} cannot be read: {error.strerror}") from error
        try:
            strange = sorted(set(skops.io.get_untrusted_types(data=data)) - set(_TRUSTED))
            state = skops.io.loads(data, trusted=list(_TRUSTED)) if not strange else None
        except Exception as error:  # whatever zipfile, json and skops raise
            raise CurateError(f"{file} is no classifier: {str(error)[:200]}. Make one with train-classifier") from error
        if strange:
            raise CurateError(f"{file} holds {', '.join(strange)[:200]}, which no classifier of this program holds")
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CurateError(f"{file} is no classifier of this program: make one with train-classifier")
        made = Classifier(state["embedding"], state["reduction"], state["forest"])
        if not _sound(made._forest):
            raise CurateError(f"{file} is damaged: its trees do not fit together. Make one with train-classifier")
        made._forest.n_jobs = 1  # there is one process per core already
        return made


def _sound(forest: Any) -> bool:
    """Check a forest from a file: scikit-learn follows a tree's links, and reads its features, without checking them."""
    from sklearn.ensemble import RandomForestClassifier

    if not isinstance(forest, RandomForestClassifier) or not np.issubdtype(forest.classes_.dtype, np.floating):
        return False
    for tree in (estimator.tree_ for estimator in forest.estimators_):
        number = np.arange(tree.node_count)
        inner = tree.children_left != -1
        for children in (tree.children_left, tree.children_right):
            if not np.all((children[inner] > number[inner]) & (children[inner] < tree.node_count)):
                return False
        features = tree.feature[inner]
        if np.any((features < 0) | (features >= forest.n_features_in_)) or tree.n_features != forest.n_features_in_:
            return False
        if tree.value.shape != (tree.node_count, 1, len(forest.classes_)):
            return False
    return True


def train(
    texts: Sequence[str], labels: Sequence[float], settings: TrainingSettings
) -> tuple[Classifier, dict[str, Any]]:
    """Train a classifier. Returns it, and what it scores on the samples held out.

    Raises CurateError for too few samples, or labels that are all equal.
    """
    settings.check()
    from sklearn.decomposition import TruncatedSVD
    from sklearn.ensemble import RandomForestClassifier

    values = np.asarray(labels, np.float64)
    if len(np.unique(values)) > MOST_CLASSES:
        values = np.round(values)
    order = np.random.default_rng(settings.seed).permutation(len(values))
    held_out = max(1, round(settings.held_out * len(values)))
    test, kept = order[:held_out], order[held_out:]
    if len(kept) < 10 or len(np.unique(values[kept])) < 2:
        raise CurateError(
            f"{len(values):,} samples with {len(np.unique(values)):,} different labels: a classifier needs some "
            "hundred samples at least, with labels that differ"
        )
    if settings.embedding == HASHING:
        counts = hashing(_FEATURES).transform([texts[i] for i in kept])
        reduction = TruncatedSVD(min(settings.dimensions, len(kept) - 1), random_state=settings.seed)
        vectors = reduction.fit_transform(counts).astype(np.float32)
    else:
        reduction = None
        vectors = pretrained(settings.embedding).embed([texts[i] for i in kept])
    forest = RandomForestClassifier(settings.trees, n_jobs=-1, random_state=settings.seed, min_samples_leaf=2)
    forest.fit(vectors, values[kept])
    made = Classifier(settings.embedding, reduction, forest)
    return made, {"samples": len(values), **judge(made.score([texts[i] for i in test]), values[test], settings.good)}


def judge(scores: _Array, labels: _Array, good: float) -> dict[str, Any]:
    """Compare scores with labels: absolute error, rank correlation, precision and recall of "at least good"."""
    from scipy.stats import spearmanr

    said, true = scores >= good, labels >= good
    both = int((said & true).sum())
    ranks = spearmanr(scores, labels).statistic if len(np.unique(labels)) > 1 and len(np.unique(scores)) > 1 else None
    return {
        "held_out": len(labels),
        "mean_absolute_error": round(float(np.abs(scores - labels).mean()), 4),
        "rank_correlation": None if ranks is None else round(float(ranks), 4),
        "good": good,
        "precision": round(both / int(said.sum()), 4) if said.any() else None,
        "recall": round(both / int(true.sum()), 4) if true.any() else None,
    }


class ForestScore:
    """Adds a classifier's score to each document; drops none."""

    name = "score"

    def __init__(self, file: Path, score: str) -> None:
        """Take the classifier's file and the score's name. Raises CurateError for a file that is no classifier."""
        self._file, self._score = file, score
        self._digest = sha256_of(file) if file.is_file() else ""
        self._classifier = Classifier.load(file)

    def settings(self) -> dict[str, Any]:
        return {"classifier": str(self._file), "classifier_sha256": self._digest, "score": self._score}

    def judge(self, documents: Sequence[Document]) -> list[Drop | None]:
        """Add the score to every document."""
        for document, score in zip(documents, self._classifier.score([one.text for one in documents]), strict=True):
            document.scores[self._score] = round(float(score), 4)
        return [None] * len(documents)
