"""Interleaved timing of contenders, and the JSON file that every published figure comes from.

A benchmark passes its contenders by name to `compare`, and the subject that this returns to `Results.add`.
"""

from __future__ import annotations

import datetime
import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, timing
from benchmarks.subjects import Contender, Row, Subject, kind
from phi_fast.files import write_atomically

RESULTS = Path(__file__).parent / "results"
SLOW_START = 2.0
"""A first call that takes longer than this many seconds is reported, since it probably ran a compiler."""


def compare(
    name: str,
    contenders: Mapping[str, Contender | Callable[[], object] | str],
    *,
    config: dict[str, Any],
    repeats: int,
    warmup: int = 1,
    budget: float | None = None,
    kernels: bool = False,
) -> Subject:
    """Time every contender once per round, in turn, for `repeats` rounds, so that a drift of the machine affects all.

    A contender that is a string could not be set up; the string says why. A peer that raises in its first, untimed call
    also becomes a row without times; an exception from this project's own contenders is passed on. budget: seconds
    after which no further round begins, once three are done. kernels: the contenders are single kernels, and the time
    that Python takes to launch them is no part of what is measured on a GPU.
    """
    where = timing.device()
    measure = timing.kernel_timer(where) if kernels else timing.timer(where)
    rows = {label: _row(label, contender) for label, contender in contenders.items()}
    present = {label: c for label, c in contenders.items() if not isinstance(c, str)}
    running = {label: c if isinstance(c, Contender) else Contender(c) for label, c in present.items()}
    with timing.on_stream(measure):
        for label, contender in list(running.items()):
            if not _first_call(rows[label], contender, where):
                del running[label]
            elif isinstance(measure, timing.KernelTimer) and not measure.replayed(contender.run):
                rows[label].extra["launched from"] = "Python"
        for _ in range(warmup - 1):
            for contender in running.values():
                measure(contender.run)
        times: dict[str, list[float]] = {label: [] for label in running}
        begin = time.perf_counter()
        for done in range(repeats):
            if budget is not None and done >= 3 and time.perf_counter() - begin > budget:
                break
            for label, contender in running.items():
                times[label].append(measure(contender.run))
    for label, seconds in times.items():
        rows[label].seconds = seconds
    subject = Subject(name, config, list(rows.values()))
    _hold_against_bounds(subject)
    return subject


def compare_apart(
    name: str, makers: Mapping[str, Callable[[], Contender | str]], *, config: dict[str, Any], **options: Any
) -> Subject:
    """As `compare`, one contender after the other: each is made when its turn comes and freed after it, for those that
    do not fit into a GPU's memory together."""
    rows = []
    for label, make in makers.items():
        rows += compare(name, {label: _made(label, make)}, config=config, **options).rows
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    subject = Subject(name, config, rows)
    _hold_against_bounds(subject)
    return subject


def _made(label: str, make: Callable[[], Contender | str]) -> Contender | str:
    """A contender, or why there is none: a peer may not fit into the memory that this project's leaves free."""
    try:
        with timing.device():  # a model's weights are drawn there, not on one core
            return make()
    except Exception as error:  # as in `_first_call`: what a peer raised is its row
        if kind(label) == "ours":
            raise
        return f"cannot be set up here: {_said(error)}"


def _said(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line[:120]}"


def _row(label: str, contender: Contender | Callable[[], object] | str) -> Row:
    if isinstance(contender, Contender):
        return Row(label, None, contender.note, moved=contender.moved, flops=contender.flops)
    return Row(label, None, contender if isinstance(contender, str) else "")


def _first_call(row: Row, contender: Contender, where: torch.device) -> bool:
    """Call the contender once, untimed. Returns False, with the reason in the row, if it is a peer and cannot run."""
    begin = time.perf_counter()
    try:
        contender.run()
        if where.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # a peer's compiler or driver may raise anything; the row shows what it raised
        if kind(row.name) == "ours":
            raise
        row.note = f"does not run here: {_said(error)}"
        return False
    seconds = time.perf_counter() - begin
    if seconds > SLOW_START:
        row.extra["first call s"] = round(seconds, 1)
    if where.type == "cuda":
        row.extra |= timing.launches(contender.run)
    return True


def _hold_against_bounds(subject: Subject) -> None:
    """Add GB/s, GFLOP/s, and the least time that the copy and the product of these rounds allow ÷ the row's median."""
    bounds = {row.name: row for row in subject.rows if row.seconds}
    copy, product = bounds.get("copy"), bounds.get("matrix product")
    for row in subject.rows:
        if not row.median:
            continue
        if row.moved:
            row.extra["GB/s"] = round(row.moved / row.median / 1e9, 1)
        if row.flops:
            row.extra["GFLOP/s"] = round(row.flops / row.median / 1e9, 1)
        times = []
        if row.moved and copy and copy.median:
            times.append(row.moved * copy.median / copy.moved)
        if row.flops and product and product.median:
            times.append(row.flops * product.median / product.flops)
        if times and kind(row.name) != "bound":
            row.of_bound = max(times) / row.median


class Results:
    """The subjects of one session, each written as soon as it is measured, so that an interrupted run keeps them.

    directory: where DEVICE-DATE.json is written; None writes nothing. The file says "whole": false until a session has
    measured every benchmark into it (`finish`), because a partial file must not replace a whole one in the README.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.subjects: list[Subject] = []
        self.directory = directory
        self.path: Path | None = None

    def add(self, subject: Subject) -> None:
        """Add a subject and write it."""
        self.subjects.append(subject)
        if self.directory is not None:
            self.path = self._write(subject, self.directory)

    def finish(self) -> None:
        """Mark the file as whole: this session has measured every benchmark."""
        if self.path is not None:
            _replace(self.path, json.loads(self.path.read_text()) | {"whole": True})

    def _write(self, subject: Subject, directory: Path) -> Path:
        """Write into this machine's file of the day, replacing an earlier subject of the same name."""
        here = machine.describe_machine()
        directory.mkdir(parents=True, exist_ok=True)
        path, whole, kept = _day_file(here, directory)
        measured = {"measured": datetime.datetime.now().isoformat(timespec="seconds"), "commit": machine.commit()}
        subjects = [s for s in kept if s["name"] != subject.name] + [asdict(subject) | measured]
        _replace(path, {"machine": here, "whole": whole, "subjects": subjects})
        return path


def whole(document: dict[str, Any]) -> bool:
    """Whether a results document has every benchmark; files from before this was recorded count as whole."""
    return bool(document.get("whole", True))


def _replace(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, f"{json.dumps(document, indent=1)}\n".encode())


def _day_file(here: dict[str, Any], directory: Path) -> tuple[Path, bool, list[dict[str, Any]]]:
    """(today's file, whether it is whole, its subjects). If a file of other versions or settings has that name, the
    name gets a number."""
    stem = f"{machine.slug(here)}-{datetime.date.today().isoformat()}"
    number = 1
    while True:
        path = directory / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            return path, False, []
        document = json.loads(path.read_text())
        if document["machine"] == here:
            return path, whole(document), document["subjects"]
        number += 1
