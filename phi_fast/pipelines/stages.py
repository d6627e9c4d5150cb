"""What is to be done, as stages of blocks: each stage waits for the one before it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..curation.shards import Reading, find
from ..curation.steps import Comparison, Judge
from ..data.preparation.inputs import find_inputs
from ..data.preparation.pipeline import Settings, plan_encoding, plan_fields
from ..errors import UsageError
from ..files import check_begun
from .block import PipelineStep
from .judges import MEMORY, DecideBlock, DropBlock, JudgeBlock, SurveyBlock
from .texts import ReadTexts, WriteTexts
from .tokens import CountUnits, EncodeUnits, MergeCorpus, TokenJob


@dataclass(frozen=True)
class Stage:
    """A pipeline of datatrove that some number of tasks run, each on its part of the inputs."""

    name: str
    pipeline: tuple[PipelineStep, ...]
    tasks: int
    logging: Path
    """Folder of datatrove's logs, statistics and marks of finished tasks."""


def corpus_stages(
    inputs: Sequence[Path],
    work: Path,
    out: Path,
    settings: Settings,
    steps: Sequence[Judge | Comparison] = (),
    *,
    tasks: int = 1,
    reading: Reading = Reading(),  # noqa: B008
    memory: int = MEMORY,
    merge_workers: int | None = None,
) -> list[Stage]:
    """List the stages that curate `inputs` by `steps`, in order, and make a corpus of what is left.

    With steps, the corpus has the same bytes as `prepare` makes of the folder of texts that the last step
    leaves (`work`/texts-N); without, the same as `prepare` makes of `inputs`. Both hold for any number of tasks.

    inputs: files and folders on a file system that all machines share, as are `work` (kept until you remove it) and
    `out` (the corpus; it must not exist).
    tasks: of each stage, but for the decisions and the merge; an input is read by one of them.
    memory: bytes of buffers for a comparison's decision. merge_workers: processes of the merge; None for one per core.
    Raises UsageError for what cannot work, and for a `work` that was begun with other inputs, steps or settings.
    """
    if tasks < 1:
        raise UsageError(f"tasks={tasks}: expected at least 1")
    job = TokenJob(tuple(inputs), out, settings, work / "units")
    job.check()
    for step in steps:
        if not isinstance(step, Judge | Comparison):
            raise UsageError(f"{type(step).__name__} is no step of curation: it has neither `judge` nor `survey`")
    entries = find(list(inputs)) if steps else find_inputs(inputs, settings.suffixes, settings.text_field).read
    plan = {
        "inputs": [entry.local_stamp for entry in entries],
        "steps": [[step.name, step.settings()] for step in steps],
        "reading": asdict(reading) if steps else None,
        "settings": plan_fields(settings, plan_encoding(settings)[0]),
        "tasks": tasks,
    }
    work.mkdir(parents=True, exist_ok=True)
    as_json = json.loads(json.dumps(plan, default=str))
    check_begun(work / "plan.json", as_json, damaged=f"Remove {work} to begin anew", other="folder for the work")
    stages = _Stages(work, tasks)
    if steps:
        texts = _curate(stages, list(inputs), work, steps, reading, memory)
        # Written by WriteTexts: the text is in the field "text", and every record is whole.
        job = TokenJob((texts,), out, _of_texts(settings), work / "units")
    stages.add("count", CountUnits(job))
    stages.add("encode", EncodeUnits(job))
    stages.add("merge", MergeCorpus(job, merge_workers), tasks=1)
    return stages.listed


class _Stages:
    def __init__(self, work: Path, tasks: int) -> None:
        self.listed: list[Stage] = []
        self._work, self._tasks = work, tasks

    def add(self, name: str, *pipeline: PipelineStep, tasks: int | None = None) -> None:
        numbered = f"{len(self.listed) + 1:02d}-{name}"
        self.listed.append(Stage(numbered, pipeline, tasks or self._tasks, self._work / "logs" / numbered))


def _curate(
    stages: _Stages,
    inputs: list[Path],
    work: Path,
    steps: Sequence[Judge | Comparison],
    reading: Reading,
    memory: int,
) -> Path:
    """Add the stages of the steps; returns the folder of the texts that they leave."""
    waiting: list[PipelineStep] = []
    written = 0
    source = inputs

    def flush(name: str) -> None:
        nonlocal waiting, source, written
        folder = work / f"texts-{written}"
        stages.add(name, ReadTexts(source, reading if written == 0 else _WRITTEN, folder), *waiting, WriteTexts(folder))
        waiting, source, written = [], [folder], written + 1

    for number, step in enumerate(steps):
        if isinstance(step, Judge):
            waiting.append(JudgeBlock(step))
            continue
        if waiting or written == 0:
            flush("filter")
        folder = work / f"survey-{number}"
        stages.add(f"{step.name}-survey", ReadTexts(source, _WRITTEN), SurveyBlock(step, folder))
        stages.add(f"{step.name}-decide", DecideBlock(step, folder, memory), tasks=1)
        waiting.append(DropBlock(step, folder))
    if waiting:
        flush("filter")
    return source[0]


_WRITTEN = Reading(max_document_bytes=2**40)
"""How texts of WriteTexts are read."""


def _of_texts(settings: Settings) -> Settings:
    return replace(settings, text_field="text", skip_malformed=False)
