"""The filtered corpus: exact and near duplicates, the rules of Gopher, and a classifier of teaching text.

The steps are those of FineWeb-Edu in small: deduplication (rensa's MinHash), the repetition and quality rules of Gopher
(arXiv 2112.11446, by datatrove), then a random forest on embeddings of the text, as phi-1 (arXiv 2306.11644, section
2.1). phi-1's labels came from GPT-4, and its embeddings from a code model. Here the positive labels are documents of
manuals and tutorials that no corpus trains on, the negative ones random documents of the raw text, and the embeddings
are latent semantic analysis (TF-IDF, then a truncated singular value decomposition).
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np

from phi_fast.data.preparation.pipeline import available_cores
from phi_fast.errors import UsageError

from .documents import Document

KEEP = 0.5
"""Share of the bytes that pass the rules that the filtered corpus keeps: those with the best scores."""
NEAR = 0.8
"""Least estimated Jaccard similarity, of sets of 5 words in a row, of near duplicates."""
LETTERS = 0.7
"""Least share of words with a letter. Gopher has 0.8, for web text; datatrove counts punctuation as words, and nine
tenths of the exemplars' documents have 0.68 or more."""
LABELS = 600
"""Documents of each class, at most, that the classifier is trained on."""
EXCERPT = 3000
"""Characters from the start of a document that the classifier reads."""
SEED = 17


@dataclass(frozen=True)
class Filtered:
    """What the filters kept, and why they dropped the rest."""

    documents: list[Document]
    dropped: dict[str, dict[str, int]]
    """Reason -> number of documents and of bytes."""
    scores: list[float]
    """The classifier's probability that a kept document teaches."""
    threshold: float
    """The least of them."""
    accuracy: float
    """Share of the labelled documents that the classifier puts into their class, out of bag."""


def require(name: str) -> Any:
    """Import a package of the extra "textbooks". Raises UsageError naming the extra if it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} is not installed ({error}): pip install 'phi-fast[textbooks]'") from error


def filtered(raw: Sequence[Document], exemplars: Sequence[Document], *, keep: float = KEEP) -> Filtered:
    """Filter the raw text. The result depends only on the documents and their order.

    Raises UsageError if a library is absent, or no document passes the rules.
    """
    documents, dropped = _report({}, raw, "exact duplicate", exact_duplicates(raw))
    documents, dropped = _report(dropped, documents, "near duplicate", near_duplicates(documents))
    documents, dropped = _report(dropped, documents, "", gopher(documents))
    if not documents:
        raise UsageError(f"none of {len(raw)} raw documents passes the rules: give more raw text")
    probabilities, accuracy = teaching(documents, exemplars)
    order = sorted(range(len(documents)), key=lambda i: (-probabilities[i], i))
    room, best = keep * sum(document.size for document in documents), []
    for i in order:
        if room <= 0:
            break
        best.append(i)
        room -= documents[i].size
    low = dict.fromkeys(set(range(len(documents))) - set(best), "classifier")
    _, dropped = _report(dropped, documents, "", low)
    best.sort()
    scores = [float(probabilities[i]) for i in best]
    return Filtered([documents[i] for i in best], dropped, scores, min(scores), accuracy)


def _report(
    dropped: dict[str, dict[str, int]], documents: Sequence[Document], name: str, reasons: dict[int, str]
) -> tuple[list[Document], dict[str, dict[str, int]]]:
    """Remove the documents that `reasons` names, and count them."""
    documents_by, bytes_by = Counter[str](), Counter[str]()
    for index, reason in reasons.items():
        documents_by[name or reason] += 1
        bytes_by[name or reason] += documents[index].size
    counts = {reason: {"documents": documents_by[reason], "bytes": bytes_by[reason]} for reason in sorted(documents_by)}
    return [document for i, document in enumerate(documents) if i not in reasons], dropped | counts


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def exact_duplicates(documents: Sequence[Document]) -> dict[int, str]:
    """Find the documents whose words repeat an earlier one's."""
    seen: set[bytes] = set()
    repeated = {}
    for i, document in enumerate(documents):
        key = hashlib.sha256(" ".join(words_of(document.text)).encode()).digest()
        if key in seen:
            repeated[i] = document.path
        seen.add(key)
    return repeated


def near_duplicates(documents: Sequence[Document], *, threshold: float = NEAR) -> dict[int, str]:
    """Find the documents whose MinHash signature (128 hashes, 16 bands) is near that of an earlier, kept one."""
    rensa = require("rensa")
    index = rensa.RMinHashLSH(threshold=threshold, num_perm=128, num_bands=16)
    kept: dict[int, Any] = {}
    repeated = {}
    for i, document in enumerate(documents):
        signature = rensa.RMinHash(num_perm=128, seed=SEED)
        words = words_of(document.text)
        signature.update([" ".join(words[at : at + 5]) for at in range(max(1, len(words) - 4))])
        if any(kept[other].jaccard(signature) >= threshold for other in index.query(signature)):
            repeated[i] = document.path
        else:
            kept[i] = signature
            index.insert(i, signature)
    return repeated


def gopher(documents: Sequence[Document], *, workers: int | None = None) -> dict[int, str]:
    """Find the documents that Gopher's rules of repetition and quality drop, each with the rule's name in datatrove.

    workers: number of processes; None: one per core. The result does not depend on it.
    """
    for name in ("datatrove.data", "datatrove.pipeline.filters", "spacy"):  # datatrove splits words with spaCy
        require(name)
    workers = workers or available_cores()
    texts = [document.text for document in documents]
    if workers == 1:
        answers = list(map(broken_rule, texts))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            answers = list(pool.map(broken_rule, texts, chunksize=50))
    return {i: answer for i, answer in enumerate(answers) if answer}


@cache
def _rules() -> tuple[Any, ...]:
    rules = require("datatrove.pipeline.filters")
    return rules.GopherQualityFilter(max_non_alpha_words_ratio=LETTERS), rules.GopherRepetitionFilter()


def broken_rule(text: str) -> str:
    """Return the first of Gopher's rules that a text breaks, by its name in datatrove; "" if there is none."""
    document = require("datatrove.data").Document(text=text, id="")
    for rule in _rules():
        answer = rule.filter(document)
        if answer is not True:
            return answer[1] if isinstance(answer, tuple) else "gopher"
    return ""


def teaching(
    documents: Sequence[Document], exemplars: Sequence[Document], *, labels: int = LABELS
) -> tuple[np.ndarray[Any, Any], float]:
    """Train the classifier, and score the documents.

    labels: documents of each class, at most; the negative ones are random documents of `documents`. Returns the
    probability that each document is teaching text, and the forest's accuracy on the labelled documents. The scores of
    negative examples, and the accuracy, are out of bag: only by the trees that were not trained on the document, since
    the others know its label.
    """
    require("sklearn")
    from sklearn.decomposition import TruncatedSVD
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    rng = np.random.default_rng(SEED)
    positive = rng.permutation(len(exemplars))[:labels]
    negative = rng.permutation(len(documents))[:labels]
    texts = [document.text[:EXCERPT] for document in documents]
    labelled = [exemplars[i].text[:EXCERPT] for i in positive] + [texts[i] for i in negative]
    classes = np.array([1] * len(positive) + [0] * len(negative))
    embedding = make_pipeline(
        TfidfVectorizer(max_features=20_000, sublinear_tf=True, min_df=2), TruncatedSVD(64, random_state=SEED)
    )
    forest = RandomForestClassifier(300, random_state=SEED, min_samples_leaf=3, oob_score=True)
    forest.fit(embedding.fit_transform(labelled), classes)
    probabilities = forest.predict_proba(embedding.transform(texts))[:, 1]
    probabilities[negative] = forest.oob_decision_function_[len(positive) :, 1]
    return probabilities, float(forest.oob_score_)
