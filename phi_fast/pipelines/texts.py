"""Documents between this project's files and datatrove's pipelines: a reader, and a writer of JSON lines.

Every input file is read by one task and becomes one file of output, whatever the number of tasks, so that the files in
the order of their names hold the documents in the order of the inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..curation.documents import SCORES, Document, MalformedError, to_line
from ..curation.shards import Malformed, Reading, cut, documents, find
from ..curation.writing import LEVEL
from ..data.preparation.inputs import Input
from ..errors import UsageError
from ..files import replacing
from .block import PipelineStep, TheirDocument

INPUT, PLACE = "phi_fast_input", "phi_fast_place"
"""Metadata of a document that `ReadTexts` read: the number of its input, and its own number in that input."""


def ours(document: TheirDocument) -> Document:
    """Convert one of datatrove's documents; its metadata "scores" become the document's scores. Nothing is copied."""
    metadata = dict(document.metadata)
    scores = metadata.pop(SCORES, {})
    return Document(document.text, document.id, scores, metadata)


def theirs(document: Document) -> TheirDocument:
    """Convert a document to datatrove's."""
    metadata = {**document.metadata, SCORES: document.scores} if document.scores else document.metadata
    return TheirDocument(document.text, document.id, metadata=metadata)


def part_name(number: int) -> str:
    """Name the file of the documents of one input."""
    return f"part-{number:08d}.jsonl.zst"


class ReadTexts(PipelineStep):
    """Reads JSON lines and Parquet as `phi_fast.curate` does; task r of n reads the inputs r, r + n, r + 2n, …

    Malformed records stop the task, or are counted as the statistic "malformed" with `reading.skip_malformed`.
    """

    type = "📖 - READER"
    name = "phi_fast texts"

    def __init__(self, paths: Iterable[Path], reading: Reading = Reading(), done: Path | None = None) -> None:  # noqa: B008
        """paths: files and folders. done: folder of WriteTexts; inputs whose file is there are not read again."""
        super().__init__()
        self.paths, self.reading, self.done = list(paths), reading, done

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Yield the task's documents. Raises CurateError and PrepareError."""
        if data:
            yield from data
        for number, entry in list(enumerate(find(self.paths)))[rank::world_size]:
            if self.done is None or not (self.done / part_name(number)).exists():
                yield from self._documents(number, entry)

    def _documents(self, number: int, entry: Input) -> Iterator[TheirDocument]:
        malformed = Malformed(self.reading.skip_malformed)
        place = 0
        for shard in cut([entry], self.reading):
            for document in documents(shard, self.reading, malformed):
                converted = theirs(document)
                converted.metadata |= {INPUT: number, PLACE: place}
                place += 1
                self.update_doc_stats(converted)
                yield converted
        if malformed.found:
            self.stat_update("malformed", value=len(malformed.found))


@dataclass(frozen=True)
class _Run:
    """Documents in a row that come from one input."""

    number: int
    documents: Iterator[TheirDocument]


class WriteTexts(PipelineStep):
    """Writes documents as JSON lines, one file per input of `ReadTexts`; behind another reader, one file per task.

    A file has its name only when it is complete and on disk. Behind another reader than `ReadTexts`, the order of all
    documents depends on the number of tasks.
    """

    type = "💽 - WRITER"
    name = "phi_fast texts"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Write and yield each document. Raises UsageError for metadata that JSON cannot hold, and OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, group in groupby(data, lambda document: document.metadata.get(INPUT, rank)):
            yield from self._write(_Run(number, group))

    def _write(self, run: _Run) -> Iterator[TheirDocument]:
        import zstandard

        with (
            replacing(self.folder / part_name(run.number), f"{os.getpid()}.partial") as raw,
            zstandard.ZstdCompressor(level=LEVEL).stream_writer(raw, closefd=False) as file,
        ):
            for document in run.documents:
                file.write(self._line(document))
                self.update_doc_stats(document)
                yield document

    def _line(self, document: TheirDocument) -> bytes:
        own = ours(document)
        for name in (INPUT, PLACE):
            own.metadata.pop(name, None)
        try:
            return to_line(own)
        except MalformedError as error:
            raise UsageError(f"document {own.id} cannot be written: {error}") from None
