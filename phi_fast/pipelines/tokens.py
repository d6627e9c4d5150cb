"""This project's token format as blocks: many tasks encode the units of `phi_fast.prepare`, which then merges them.

A unit's bytes depend on its documents, its number and the settings, not on who encodes it. The first stage counts the
units of each input, so that every task knows the numbers of its units; the second encodes them into the folder in which
`prepare` keeps its work; the third is `prepare`, which finds every unit there and merges them. The corpus therefore has
the same bytes as one that `prepare` makes of the same inputs alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.preparation.containers import PrepareError
from ..data.preparation.inputs import Input, find_inputs
from ..data.preparation.pipeline import Settings, check_place, plan_encoding, plan_fields, prepare, unit_size
from ..data.preparation.plans import partial_of, record_plan, unit_settings
from ..data.preparation.readers import Reader, check_field
from ..data.preparation.tasks import Task, cut
from ..data.preparation.units import Encoding, Summary, completed, encode_unit
from ..errors import UsageError
from ..files import write_atomically
from ..json_files import read_object
from ..terminal import console
from .block import PipelineStep, TheirDocument


@dataclass(frozen=True)
class TokenJob:
    """What becomes a corpus, and how."""

    paths: tuple[Path, ...]
    """Inputs, as `prepare` takes them."""
    out: Path
    settings: Settings
    counts: Path
    """Folder for the numbers of units."""

    def check(self) -> None:
        """Raise PrepareError for what cannot work, before any stage runs. The inputs may not exist yet."""
        if self.settings.chat:
            raise PrepareError("conversations are prepared on one machine: python -m phi_fast.prepare --chat")
        plan_encoding(self.settings)
        check_place(self.out)

    @property
    def partial(self) -> Path:
        """The folder of `prepare`'s work in progress."""
        return partial_of(self.out)


@dataclass(frozen=True)
class Division:
    """The inputs, divided into groups that give the same units alone as together with the others."""

    inputs: list[Input]

    @staticmethod
    def of(job: TokenJob) -> Division:
        """Find the inputs. Raises PrepareError."""
        found = find_inputs(job.paths, job.settings.suffixes, job.settings.text_field).read
        check_field(found, job.settings.text_field)
        return Division(found)

    @cached_property
    def unit_bytes(self) -> int:
        return unit_size(self.inputs)

    @cached_property
    def groups(self) -> list[list[Input]]:
        """Small text files in a row share units, and stay together; every other input is a group."""
        groups: list[list[Input]] = []
        together = False
        for entry in self.inputs:
            small = entry.kind == "text" and not entry.compressed and entry.size <= self.unit_bytes
            if small and together:
                groups[-1].append(entry)
            else:
                groups.append([entry])
            together = small
        return groups

    def stamp(self, group: list[Input]) -> str:
        """A digest of the paths, sizes and times of a group's files and of the size of units."""
        stamps = [entry.local_stamp for entry in group]
        return hashlib.sha256(repr((self.unit_bytes, stamps)).encode()).hexdigest()


class CountUnits(PipelineStep):
    """First stage: counts the units of each group of inputs. It reads (and decompresses) them, and parses nothing."""

    type = "🔢 - TOKENIZER"
    name = "phi_fast units: count"

    def __init__(self, job: TokenJob) -> None:
        super().__init__()
        self.job = job

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Write one file per group; yields nothing. Raises PrepareError."""
        self.job.counts.mkdir(parents=True, exist_ok=True)
        division = Division.of(self.job)
        for number, group in list(enumerate(division.groups))[rank::world_size]:
            units = sum(1 for _ in cut(group, division.unit_bytes))
            count = {"units": units, "stamp": division.stamp(group)}
            write_atomically(_count_file(self.job, number), json.dumps(count).encode())
            self.stat_update("units", value=units)
        yield from ()


class EncodeUnits(PipelineStep):
    """Second stage: tokenizes. Finished units are kept when a task is run again."""

    type = "🔢 - TOKENIZER"
    name = "phi_fast units: encode"

    def __init__(self, job: TokenJob) -> None:
        super().__init__()
        self.job = job

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Write the task's units; yields nothing. Raises PrepareError, and UsageError if the inputs have changed."""
        job, division = self.job, Division.of(self.job)
        firsts = _first_units(job, division)
        encoder, encoding, _ = plan_encoding(job.settings)
        plan = plan_fields(job.settings, encoder)
        job.partial.mkdir(parents=True, exist_ok=True)
        record_plan(job.partial, plan)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the executor has a process per core
        for place, group in list(enumerate(division.groups))[rank::world_size]:
            for number, task in enumerate(cut(group, division.unit_bytes), firsts[place]):
                unit, key = job.partial / f"{number:07d}", task.key(unit_settings(plan))
                done = completed(unit, encoding.dtype, key)
                if done is None or (done.skipped and not job.settings.skip_malformed):
                    with self.track_time("unit"):
                        done = _encode(job.settings, unit, number, task, encoding, key)
                self.stat_update("units")
                self.stat_update("tokens", value=done.tokens)
                self.stat_update("malformed", value=done.skipped)
        yield from ()


def _encode(settings: Settings, unit: Path, number: int, task: Task, encoding: Encoding, key: bytes) -> Summary:
    reader = Reader(settings.text_field, settings.skip_malformed)
    return encode_unit(unit, number, reader.documents(task), encoding, key, lambda: reader.skipped)


class MergeCorpus(PipelineStep):
    """Third stage, one task: `prepare`, which finds every unit encoded, shuffles and merges them into the corpus."""

    type = "🔢 - TOKENIZER"
    name = "phi_fast corpus: merge"

    def __init__(self, job: TokenJob, workers: int | None = None) -> None:
        """workers: processes of the merge; None for one per core."""
        super().__init__()
        self.job, self.workers = job, workers

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """Write the corpus; yields nothing. Raises UsageError for units that are missing, and PrepareError."""
        if world_size != 1:
            raise UsageError(f"the merge is one task, not {world_size}")
        job, division = self.job, Division.of(self.job)
        units = _first_units(job, division)[-1]
        missing = [number for number in range(units) if not (job.partial / f"{number:07d}.index").exists()]
        if missing:
            raise UsageError(
                f"{len(missing):,} of {units:,} units are missing in {job.partial}, the first is {missing[0]:07d}: run "
                "the stage that encodes again, without datatrove's marks of its finished tasks if they are all there"
            )
        manifest = prepare(
            list(job.paths), job.out, job.settings, workers=self.workers, console=console(stderr=True, soft_wrap=True)
        )
        for name, split in manifest.splits.items():
            self.stat_update(f"{name} documents", value=split.documents)
            self.stat_update(f"{name} tokens", value=split.tokens)
        yield from ()


def _count_file(job: TokenJob, group: int) -> Path:
    return job.counts / f"group-{group:08d}.json"


def _first_units(job: TokenJob, division: Division) -> list[int]:
    """The number of each group's first unit, and after them that of all units."""
    firsts = [0]
    for number, group in enumerate(division.groups):
        path = _count_file(job, number)
        try:
            count = read_object(path)
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist: run the stage that counts units first") from None
        if count.text("stamp") != division.stamp(group):
            raise UsageError(
                f"{group[0].path} or a file beside it has changed since its units were counted: remove {job.counts}, "
                "and run all stages again"
            )
        firsts.append(firsts[-1] + count.whole("units"))
    return firsts
