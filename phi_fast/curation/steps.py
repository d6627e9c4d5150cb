"""What a step is: a judge of each document alone, or a comparison of all documents with each other.

Both work on plain lists of `Document`, without the command, so that another engine can call them; `apply` runs a judge
over any iterator of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .documents import Document, Drop

BATCH = 64
"""Documents that a judge sees at once."""
_MOST_CHARACTERS = 2**22
"""A batch ends after so many, however few documents they are."""


@runtime_checkable
class Judge(Protocol):
    """A step that looks at each document alone."""

    name: str
    """Name of the step, as on the command line."""

    def settings(self) -> dict[str, Any]:
        """Return everything that its decisions depend on, as JSON values: work begun with others is not resumed."""
        ...

    def judge(self, documents: Sequence[Document]) -> list[Drop | None]:
        """Decide on each document: None keeps it. May change the documents' texts and scores."""
        ...


@runtime_checkable
class Comparison(Protocol):
    """A step that compares every document with all others, in bounded memory: survey, decide, then drop."""

    name: str

    def settings(self) -> dict[str, Any]:
        """Return everything that its decisions depend on, as JSON values."""
        ...

    def survey(self, documents: Sequence[Document]) -> dict[str, np.ndarray[Any, Any]]:
        """Return what must be known of each document: arrays by name, the row i of each about document i."""
        ...

    def write_survey(self, path: Path, rows: dict[str, np.ndarray[Any, Any]]) -> None:
        """Write the rows of one shard's documents to files whose names begin with `path`."""
        ...

    def decide(self, surveys: Sequence[tuple[Path, int]], memory: int) -> Duplicates:
        """Find the documents to drop. surveys: (path, documents) of each shard. memory: bytes of buffers to use."""
        ...


class Duplicates:
    """Documents to drop, by their number in the order of all shards: 16 bytes for each."""

    def __init__(self, dropped: np.ndarray[Any, Any], of: np.ndarray[Any, Any], notes: dict[str, int]) -> None:
        """Take (n,) int64 numbers, ascending, and for each the (n,) int64 number of the document that it repeats.

        notes: counts for the report.
        """
        self.dropped, self.of, self.notes = dropped, of, notes

    def within(self, first: int, documents: int) -> dict[int, int]:
        """Map each dropped document in a shard, by its place in the shard, to the number of the one that is kept."""
        start, stop = np.searchsorted(self.dropped, [first, first + documents])
        places = (self.dropped[start:stop] - first).tolist()
        return dict(zip(places, self.of[start:stop].tolist(), strict=True))


def batch_size(judge: Judge) -> int:
    """Return how many documents a judge wants to see at once: its attribute `batch`, if it has one."""
    return getattr(judge, "batch", BATCH)


def batches(documents: Iterable[Document], size: int = BATCH) -> Iterator[list[Document]]:
    """Group documents by `size`, or fewer where they are long."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) >= size or characters >= _MOST_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def apply(
    judge: Judge, documents: Iterable[Document], dropped: Callable[[Document, Drop], None] | None = None
) -> Iterator[Document]:
    """Yield the documents that a judge keeps, in order. dropped: called with each that it does not."""
    for batch in batches(documents, batch_size(judge)):
        for document, drop in zip(batch, judge.judge(batch), strict=True):
            if drop is None:
                yield document
            elif dropped is not None:
                dropped(document, drop)
