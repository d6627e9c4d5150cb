"""Runs one step over its inputs: shard by shard, in order, so that a run that was killed goes on where it was.

`out`.partial/work holds what is known of each shard, `out`.partial/output what is written. Once all shards are there,
the report is written and the output renamed to `out`. Every file has its name only when it is complete, and depends on
the inputs and the settings alone: neither the number of workers nor an interruption changes a byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data.preparation.inputs import Input
from ..data.preparation.pipeline import available_cores
from ..data.preparation.plans import partial_of
from ..data.preparation.progress import Meter
from ..errors import UsageError
from ..files import Claim, replacing, sync_directory, write_atomically, writing
from ..json_files import JsonFileError, read_object
from . import surveys
from .documents import CurateError, Document, Drop
from .extras import require
from .shards import SHARD_BYTES, Malformed, Reading, Shard, cut, documents, find
from .steps import BATCH, Comparison, Duplicates, Judge, batch_size, batches
from .workers import Workers, workers
from .writing import Counts, filter_shard, read_counts

REPORT = "report.json"
VERSION = 1
"""Version of the layout of `out` and of its report."""


@dataclass(frozen=True)
class Running:
    """How a step is run; only `reading`, `shard_bytes` and `dropped_texts` affect what is written."""

    reading: Reading = field(default_factory=Reading)
    shard_bytes: int = SHARD_BYTES
    """Bytes of JSON lines per output file."""
    dropped_texts: bool = False
    """Whether dropped.log holds the texts of dropped documents."""
    workers: int | None = None
    """Number of processes; None: one per core."""
    memory: int = 2**28
    """Bytes of buffers for comparing documents with each other."""

    def check(self) -> None:
        """Raise CurateError for an invalid value."""
        for name, least in (("shard_bytes", 1), ("memory", 2**16)):
            if getattr(self, name) < least:
                raise CurateError(f"{name}={getattr(self, name)}: expected {least:,} or more")
        if self.workers is not None and self.workers < 1:
            raise CurateError(f"--workers {self.workers}: expected at least 1, or None for one per core")
        if self.reading.max_document_bytes < 1:
            raise CurateError(f"--max-document-bytes {self.reading.max_document_bytes}: expected at least 1")


@dataclass(frozen=True)
class Report:
    """What a step did; `to_json` is the file report.json."""

    step: str
    settings: dict[str, Any]
    inputs: list[dict[str, Any]]
    counts: Counts
    notes: dict[str, int]
    fingerprint: str
    """Hash of the step, its settings, and the inputs' names, sizes and times."""
    shards: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        counted = asdict(self.counts)
        examples = counted.pop("malformed_examples")
        return {
            "version": VERSION,
            "step": self.step,
            "settings": self.settings,
            "counts": {**counted, **({"notes": self.notes} if self.notes else {})},
            "malformed_examples": [{"place": place, "why": why} for place, why in examples],
            "inputs": self.inputs,
            "parts": self.shards,
            "fingerprint": self.fingerprint,
        }


def run(step: Judge | Comparison, paths: list[Path], out: Path, running: Running, console: Console) -> Report:
    """Filter the documents in `paths` into the new folder `out`, or take up where an interrupted run was.

    `out` gets part-NNNNN.jsonl.zst (the kept documents of each shard), dropped.log and malformed.log (one JSON object
    per line for each document left out, with its id or place, and why), and report.json. If `out` is complete already,
    its report is returned.

    Raises CurateError, PrepareError and OSError, before any work where possible.
    """
    running.check()
    require("zstandard", "curate")
    inputs = find(paths)
    plan = _plan(step, inputs, running)
    with writing(out, "free some space, or name another --out; the same command then goes on"):
        if (done := _finished(out, plan["fingerprint"])) is not None:
            shutil.rmtree(partial_of(out), ignore_errors=True)
            console.print(f"{out} is complete already")
            return done
        with _work(out, plan) as folder, workers(running.workers or available_cores(), step) as pool:
            size = sum(entry.size for entry in inputs)
            if isinstance(step, Comparison):
                duplicates, firsts = _compare(step, inputs, folder, running, pool, size, console)
            else:
                duplicates, firsts = None, []
            counts, shards = _filter(inputs, folder, running, pool, size, duplicates, firsts, console)
            notes = duplicates.notes if duplicates is not None else {}
            report = Report(step.name, plan["settings"], plan["inputs"], counts, notes, plan["fingerprint"], shards)
            _finish(folder, out, report)
    return report


def _plan(step: Judge | Comparison, inputs: list[Input], running: Running) -> dict[str, Any]:
    """Everything that determines the output, but for whether malformed records are an error."""
    settings = {
        **{f.name: getattr(running.reading, f.name) for f in fields(Reading) if f.name != "skip_malformed"},
        "shard_bytes": running.shard_bytes,
        "dropped_texts": running.dropped_texts,
        **step.settings(),
    }
    stamps = [entry.local_stamp for entry in inputs]
    plan = {
        "version": VERSION,
        "step": step.name,
        "settings": settings,
        "inputs": [{"path": str(entry.path), "bytes": entry.size} for entry in inputs],
    }
    hashed = hashlib.sha256(json.dumps([plan, stamps], sort_keys=True).encode("utf-8", "backslashreplace"))
    return {**plan, "fingerprint": hashed.hexdigest()}


def _finished(out: Path, fingerprint: str) -> Report | None:
    """Read the report of a complete run of the same step on the same inputs; None if `out` is free.

    Raises CurateError if something else is there.
    """
    if not out.exists() and not out.is_symlink():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    try:
        found = read_object(out / REPORT)
        if found.text("fingerprint") == fingerprint:
            counted = dict(found.inner("counts").values)
            notes = counted.pop("notes", {})
            examples = [[item["place"], item["why"]] for item in found.items("malformed_examples")]
            counts = Counts(**counted, malformed_examples=examples)
            settings, inputs = found.inner("settings").values, found.items("inputs")
            return Report(found.text("step"), settings, inputs, counts, notes, fingerprint, found.whole("parts"))
    except (OSError, JsonFileError, TypeError, KeyError):
        pass
    raise CurateError(
        f"{out} exists and holds something else, or another step's output: name another --out, or remove it"
    )


@contextmanager
def _work(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The locked folder of work in progress, kept if it is interrupted. Raises CurateError if another run has it."""
    partial = partial_of(out)
    (partial / "work").mkdir(parents=True, exist_ok=True)
    (partial / "output").mkdir(exist_ok=True)
    try:
        claim = Claim.take(partial / "lock", str(out), way_out="wait for it, or name another --out")
    except UsageError as error:
        raise CurateError(f"another curate is writing {out}: {error}") from None
    with claim:
        record = partial / "plan.json"
        try:
            before = read_object(record).values
        except FileNotFoundError:
            before = plan
        except (JsonFileError, OSError) as error:
            raise CurateError(f"{error}. Remove {partial} to begin anew") from error
        if before.get("fingerprint") != plan["fingerprint"] and any((partial / "work").iterdir()):
            changed = [name for name in ("step", "settings", "inputs") if before.get(name) != plan[name]]
            what = f"other {' and '.join(changed)}" if changed else "inputs that changed since"
            raise CurateError(
                f"{partial} holds work begun with {what}: "
                "run with those it was begun with to resume, or remove it to begin anew"
            )
        write_atomically(record, json.dumps(plan, indent=1).encode("utf-8", "backslashreplace"))
        yield partial
    # The output was renamed; what a kill leaves here is removed by the next run.
    shutil.rmtree(partial, ignore_errors=True)


def _survey_shard(step: Comparison, shard: Shard, running: Running, path: Path) -> int:
    """Survey one shard in a worker. Returns its number of documents."""
    found: list[dict[str, np.ndarray[Any, Any]]] = [step.survey([])]
    ids: list[str] = []
    for batch in batches(documents(shard, running.reading, Malformed(running.reading.skip_malformed))):
        found.append(step.survey(batch))
        ids += [document.id for document in batch]
    step.write_survey(path, {name: np.concatenate([part[name] for part in found]) for name in found[0]})
    surveys.save_ids(path, ids)
    return len(ids)


def _compare(
    step: Comparison, inputs: list[Input], folder: Path, running: Running, pool: Workers, size: int, console: Console
) -> tuple[Duplicates, list[tuple[Path, int, int]]]:
    """Survey all shards and decide. Returns the decision, and each shard's (survey, first document, documents)."""
    surveyed: dict[int, int] = {}

    with Meter("surveying", size, console) as meter:
        for shard in cut(inputs, running.reading, running.shard_bytes):
            path = folder / "work" / f"survey-{shard.number:05d}"
            if (known := surveys.count(path)) is not None:
                surveyed[shard.number] = known
                meter.advance(shard.size, before=True)
            else:

                def note(count: int, number: int = shard.number, done: int = shard.size) -> None:
                    surveyed[number] = count
                    meter.advance(done)

                pool.submit(_survey_shard, shard, running, path, then=note)
        pool.finish()
    paths = [folder / "work" / f"survey-{number:05d}" for number in range(len(surveyed))]
    counts = [surveyed[number] for number in range(len(surveyed))]
    firsts = np.cumsum([0, *counts]).tolist()
    console.print(f"comparing {firsts[-1]:,} documents")
    duplicates = step.decide(list(zip(paths, counts, strict=True)), running.memory)
    return duplicates, list(zip(paths, firsts, counts, strict=False))


def _filter_shard(
    step: Judge | Comparison, shard: Shard, running: Running, folder: Path, drops: dict[int, str] | None
) -> Counts:
    """Filter one shard in a worker. drops: place in the shard -> the id of the document that it repeats."""
    if drops is None:
        assert isinstance(step, Judge)
        decide, size = step.judge, batch_size(step)
    else:
        decide, size = _Drops(step.name, drops).decide, BATCH
    return filter_shard(shard, running.reading, decide, size, folder, texts=running.dropped_texts)


class _Drops:
    """Decides as a comparison did."""

    def __init__(self, reason: str, drops: dict[int, str]) -> None:
        self._reason, self._drops, self._place = reason, drops, 0

    def decide(self, documents: Sequence[Document]) -> list[Drop | None]:
        first = self._place
        self._place += len(documents)
        return [
            Drop(self._reason, {"repeats": self._drops[place]}) if place in self._drops else None
            for place in range(first, self._place)
        ]


def _filter(
    inputs: list[Input],
    folder: Path,
    running: Running,
    pool: Workers,
    size: int,
    duplicates: Duplicates | None,
    surveyed: list[tuple[Path, int, int]],
    console: Console,
) -> tuple[Counts, int]:
    """Write every shard that is not written yet. Returns all counts, and the number of shards."""
    counted: dict[int, Counts] = {}
    firsts = [first for _, first, _ in surveyed]
    with Meter("writing", size, console) as meter:
        for shard in cut(inputs, running.reading, running.shard_bytes):
            known = read_counts(folder / "work", shard.number)
            if known is not None and (running.reading.skip_malformed or not known.malformed):
                counted[shard.number] = known
                meter.advance(shard.size, before=True)
                continue
            drops = None
            if duplicates is not None:
                _, first, documents_ = surveyed[shard.number]
                drops = {
                    place: _id_of(number, surveyed, firsts)
                    for place, number in duplicates.within(first, documents_).items()
                }

            def note(counts: Counts, number: int = shard.number, done: int = shard.size) -> None:
                counted[number] = counts
                meter.advance(done)

            pool.submit(_filter_shard, shard, running, folder, drops, then=note)
        pool.finish()
    total = Counts()
    for number in range(len(counted)):
        total.add(counted[number])
    return total, len(counted)


def _id_of(number: int, surveyed: list[tuple[Path, int, int]], firsts: list[int]) -> str:
    shard = int(np.searchsorted(firsts, number, side="right")) - 1
    while surveyed[shard][2] == 0:  # an empty shard has the first document's number of the next one
        shard -= 1
    return surveys.read_id(surveyed[shard][0], number - surveyed[shard][1])


def _finish(folder: Path, out: Path, report: Report) -> None:
    """Join the lists, write the report, and rename the output to `out`."""
    for name in ("dropped", "malformed"):
        with replacing(folder / "output" / f"{name}.log") as file:
            for number in range(report.shards):
                with (folder / "work" / f"{name}-{number:05d}.log").open("rb") as part:
                    shutil.copyfileobj(part, file)
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    write_atomically(folder / "output" / REPORT, text.encode("utf-8", "backslashreplace") + b"\n")
    place = Path(os.path.realpath(out))
    if place.is_dir():
        place.rmdir()  # it is empty
    (folder / "output").rename(place)
    sync_directory(place.parent)
