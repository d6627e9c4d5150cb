"""Drops documents that hold a part of a benchmark, by n-grams, syntax and embeddings (phi-1, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .benchmarks import Item, digest, read_items
from .documents import CurateError, Document, Drop
from .embeddings import HASHING
from .extras import require
from .neighbours import LEAST_WORDS, Neighbours, units
from .ngrams import KnownNgrams
from .syntax import Shapes, functions
from .words import words_of


@dataclass(frozen=True)
class ContaminationSettings:
    """What counts as a part of a benchmark."""

    benchmarks: tuple[Path, ...]
    """JSON lines or Parquet files of any layout, such as HumanEval's, MBPP's or GSM8K's."""
    benchmark_fields: tuple[str, ...] = ()
    """Fields of the benchmarks' records that count; none: all texts."""
    ngram: int = 13
    """Words in a row that a document must share with a benchmark; 0: n-grams do not count."""
    shortest: int = 8
    """A benchmark's text with fewer words than `ngram`, but at least so many, counts as a whole."""
    match_rate: float = 0.95
    """Least match rate of syntax trees with a benchmark's Python functions; 0: syntax does not count."""
    least_nodes: int = 25
    """Functions with smaller syntax trees are not compared: too many are equal by chance."""
    embedding: str = HASHING
    """"hashing", "model2vec:NAME" or "sentence-transformers:NAME"."""
    embedding_distance: float = 0.0
    """L2 distance between embeddings below which a part of a document counts; 0: embeddings do not count."""

    def check(self) -> None:
        """Raise CurateError for an invalid value."""
        if not self.benchmarks:
            raise CurateError("name the files of at least one benchmark with --benchmarks")
        for file in self.benchmarks:
            if not file.is_file():
                raise CurateError(f"{file} is not a file: name a benchmark's JSON lines or Parquet")
        if self.ngram < 0 or self.shortest < 1 or self.least_nodes < 1:
            raise CurateError("ngram must be at least 0, shortest and least_nodes at least 1")
        if not 0 <= self.match_rate <= 1:
            raise CurateError(f"match_rate={self.match_rate}: expected a rate above 0 and at most 1, or 0 for none")
        if not 0 <= self.embedding_distance < 2:
            raise CurateError(
                f"embedding_distance={self.embedding_distance}: expected a distance below 2, or 0 for none"
            )
        if not (self.ngram or self.match_rate or self.embedding_distance):
            raise CurateError("ngram, match_rate and embedding_distance are all 0: nothing would be looked for")
        if self.match_rate:
            require("rapidfuzz", "the comparison of syntax trees")


class Decontamination:
    """Drops documents that hold a part of a benchmark; the evidence names the benchmark's record and what was found."""

    name = "decontaminate"

    def __init__(self, settings: ContaminationSettings) -> None:
        """Read the benchmarks. Raises CurateError for invalid settings and for files that cannot be read."""
        settings.check()
        self._settings = settings
        items = read_items(settings.benchmarks, settings.benchmark_fields)
        texts = [(item.name, text) for item in items for text in item.texts]
        self._digest = digest(settings.benchmarks)
        self._ngrams = KnownNgrams(texts, settings.ngram, settings.shortest) if settings.ngram else None
        self._shapes = (
            Shapes(_shapes(items, settings.least_nodes), settings.match_rate) if settings.match_rate else None
        )
        self._neighbours = None
        if settings.embedding_distance:
            known = [pair for pair in [*texts, *_programs(items)] if len(words_of(pair[1]).hashes) >= LEAST_WORDS]
            if not known:
                raise CurateError(
                    f"the benchmarks hold no text of {LEAST_WORDS} words, which embeddings are compared for"
                )
            self._neighbours = Neighbours(known, settings.embedding, settings.embedding_distance)
        self.summary = ", ".join(
            f"{len(part):,} {name}"
            for part, name in (
                (self._ngrams, "n-grams"),
                (self._shapes, "Python functions"),
                (self._neighbours, "texts to embed"),
            )
            if part is not None
        )
        """What is looked for, in one line."""

    def settings(self) -> dict[str, Any]:
        found = asdict(self._settings)
        found["benchmarks"] = [str(file) for file in self._settings.benchmarks]
        return {**found, "benchmarks_sha256": self._digest}

    def judge(self, documents: Sequence[Document]) -> list[Drop | None]:
        """Look for n-grams first, then for syntax, then for near embeddings; the first find drops a document."""
        drops = [self._by_ngram(document) or self._by_syntax(document) for document in documents]
        if self._neighbours is not None:
            self._by_embedding(documents, drops)
        return drops

    def _by_ngram(self, document: Document) -> Drop | None:
        if self._ngrams is None or (found := self._ngrams.find(document.text)) is None:
            return None
        return Drop("benchmark n-gram", {"benchmark": found[0], "found": found[1]})

    def _by_syntax(self, document: Document) -> Drop | None:
        if not self._shapes:
            return None
        for function in functions(document.text, self._settings.least_nodes):
            if (near := self._shapes.nearest(function.shape)) is not None:
                evidence = {"benchmark": near[0], "match_rate": round(near[1], 4), "found": function.name}
                return Drop("benchmark syntax", evidence)
        return None

    def _by_embedding(self, documents: Sequence[Document], drops: list[Drop | None]) -> None:
        assert self._neighbours is not None
        parts: list[str] = []
        owners: list[int] = []
        for place, (document, drop) in enumerate(zip(documents, drops, strict=True)):
            if drop is None:
                own = [function.source for function in functions(document.text, 1)] or units(document.text)
                parts += own
                owners += [place] * len(own)
        for place, part, near in zip(owners, parts, self._neighbours.nearest(parts), strict=True):
            if near is not None and drops[place] is None:
                evidence = {"benchmark": near[0], "distance": round(near[1], 4), "found": part[:200]}
                drops[place] = Drop("benchmark embedding", evidence)


def _programs(items: Sequence[Item]) -> list[tuple[str, str]]:
    return [(item.name, program) for item in items for program in item.programs]


def _shapes(items: Sequence[Item], least_nodes: int) -> list[tuple[str, str]]:
    """List (record, shape) of the benchmarks' functions, each shape once."""
    shapes: dict[str, str] = {}
    for name, program in _programs(items):
        for function in functions(program, least_nodes):
            shapes.setdefault(function.shape, name)
    return [(name, shape) for shape, name in shapes.items()]
