"""Curation's steps as blocks: a judge looks at each document alone, a comparison takes three stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..curation.documents import Document, Drop
from ..curation.steps import Comparison, Judge, batch_size, batches
from ..errors import UsageError
from ..files import write_atomically
from ..json_files import read_object
from .block import PipelineStep, TheirDocument
from .texts import INPUT, PLACE, ours, theirs

MEMORY = 2**30
"""Default bytes of buffers for a comparison's decision."""


class JudgeBlock(PipelineStep):
    """Runs a curation step that looks at each document alone, such as `Rules`, behind any reader."""

    type = "🔻 - FILTER"

    def __init__(self, judge: Judge) -> None:
        """Raises UsageError for an object that is no judge."""
        if not isinstance(judge, Judge):
            raise UsageError(f"{type(judge).__name__} is no step that judges documents one by one: it has no `judge`")
        self.name = judge.name
        super().__init__()
        self.judge = judge

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Yield the documents that are kept, as the judge changed them; count all, kept, dropped and each reason."""
        for batch in batches(map(ours, data), batch_size(self.judge)):
            with self.track_time("batch"):
                drops = self.judge.judge(batch)
            for document, drop in zip(batch, drops, strict=True):
                yield from _count(self, document, drop)


def _count(block: PipelineStep, document: Document, drop: Drop | None) -> Iterator[TheirDocument]:
    """Count a decision; yield the document if it is kept."""
    block.stat_update("total")
    if drop is not None:
        block.stat_update("dropped", f"dropped_{drop.reason}")
        return
    block.stat_update("forwarded")
    kept = theirs(document)
    block.update_doc_stats(kept)
    yield kept


class SurveyBlock(PipelineStep):
    """First stage of a comparison: writes what must be known of each document of `ReadTexts`, one survey per input."""

    type = "🫂 - DEDUPS"

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.name = f"{comparison.name}: survey"
        super().__init__()
        self.comparison, self.folder = comparison, folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Write the surveys; yields nothing. Raises UsageError behind another reader than `ReadTexts`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, group in groupby(data, _input_of):
            rows: list[dict[str, np.ndarray[Any, Any]]] = []
            count = 0
            for batch in batches(map(ours, group)):
                rows.append(self.comparison.survey(batch))
                count += len(batch)
            path = survey_path(self.folder, number)
            self.comparison.write_survey(
                path, {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}
            )
            write_atomically(path.with_suffix(".json"), json.dumps({"documents": count}).encode())
            self.stat_update("total", value=count)
        yield from ()


class DecideBlock(PipelineStep):
    """Second stage, one task: decides which documents to drop, from the surveys of all tasks."""

    type = "🫂 - DEDUPS"

    def __init__(self, comparison: Comparison, folder: Path, memory: int = MEMORY) -> None:
        self.name = f"{comparison.name}: decide"
        super().__init__()
        self.comparison, self.folder, self.memory = comparison, folder, memory

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Write one file of dropped places per input; yields nothing. Raises UsageError for more than one task."""
        if world_size != 1:
            raise UsageError(
                f"{self.name} compares all documents with each other: run it as one task, not {world_size}"
            )
        found = sorted(self.folder.glob("survey-*.json"))
        counts = [read_object(path).whole("documents") for path in found]
        paths = [path.with_suffix("") for path in found]
        duplicates = self.comparison.decide(list(zip(paths, counts, strict=True)), self.memory)
        first = 0
        for path, count in zip(paths, counts, strict=True):
            places = sorted(duplicates.within(first, count))
            write_atomically(path.with_suffix(".drops"), np.array(places, "<i8").tobytes())
            first += count
        self.stat_update("total", value=first)
        self.stat_update("dropped", value=len(duplicates.dropped))
        yield from ()


class DropBlock(PipelineStep):
    """Third stage: drops what `DecideBlock` found, from the documents that `SurveyBlock` saw."""

    type = "🫂 - DEDUPS"

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.name = comparison.name
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Yield the documents that are kept. Raises UsageError if an input was not decided on."""
        for number, group in groupby(data, _input_of):
            path = survey_path(self.folder, number).with_suffix(".drops")
            if not path.exists():
                raise UsageError(f"{path} does not exist: run the stages {self.name}: survey and decide first")
            places = set(np.fromfile(path, "<i8").tolist())
            for document in group:
                drop = Drop(self.name) if document.metadata[PLACE] in places else None
                yield from _count(self, ours(document), drop)


def survey_path(folder: Path, number: int) -> Path:
    return folder / f"survey-{number:08d}"


def _input_of(document: TheirDocument) -> int:
    number = document.metadata.get(INPUT)
    if not isinstance(number, int):
        raise UsageError(f"document {document.id} was not read by ReadTexts, whose places a comparison needs")
    return number
