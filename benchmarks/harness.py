"""Interleaved timing, the table of a benchmark, and the JSON that every published figure comes from."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "liger-kernel",
    "litgpt",
    "flash-attn",
    "numpy",
    "tokenizers",
)


@dataclass
class Row:
    """One contender of a subject."""

    name: str
    seconds: list[float] | None
    """One a repeat; None where it could not run here."""
    note: str = ""
    """Why it could not run, or what it does differently."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further figures, by the column's name."""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Subject:
    """Contenders timed side by side."""

    name: str
    config: dict[str, Any]
    rows: list[Row]

    def ratio(self, slower: str, faster: str) -> float:
        """Median of `slower` ÷ median of `faster`, taken repeat by repeat: noise that both shared cancels."""
        pairs = zip(self._seconds(slower), self._seconds(faster), strict=True)
        return statistics.median(a / b for a, b in pairs)

    def _seconds(self, name: str) -> list[float]:
        return next(row.seconds for row in self.rows if row.name == name and row.seconds)


def compare(
    name: str,
    contenders: Mapping[str, Callable[[], object] | str],
    *,
    config: dict[str, Any],
    repeats: int,
    warmup: int = 1,
) -> Subject:
    """Time every contender once a round, in turn, for `repeats` rounds: a drift of the machine meets all alike.

    A contender that is a string could not be set up; the string says why.
    """
    runnable = {label: run for label, run in contenders.items() if not isinstance(run, str)}
    times: dict[str, list[float]] = {label: [] for label in runnable}
    for round_ in range(warmup + repeats):
        for label, run in runnable.items():
            gc.collect()
            _synchronise()
            start = time.perf_counter()
            run()
            _synchronise()
            if round_ >= warmup:
                times[label].append(time.perf_counter() - start)
    rows = [Row(label, times.get(label), run if isinstance(run, str) else "") for label, run in contenders.items()]
    return Subject(name, config, rows)


class Results:
    """The subjects of one session."""

    def __init__(self) -> None:
        self.subjects: list[Subject] = []

    def add(self, subject: Subject) -> None:
        self.subjects.append(subject)
        show(subject)

    def write(self) -> Path:
        """benchmarks/results/DEVICE-DATE.json; a second run on the same day adds to it, subject by subject."""
        machine = describe_machine()
        RESULTS.mkdir(exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
        path = RESULTS / f"{slug}-{datetime.date.today().isoformat()}.json"
        kept = json.loads(path.read_text())["subjects"] if path.exists() else []
        new = {subject.name for subject in self.subjects}
        subjects = [s for s in kept if s["name"] not in new] + [asdict(subject) for subject in self.subjects]
        path.write_text(json.dumps({"machine": machine, "subjects": subjects}, indent=1) + "\n")
        return path


def show(subject: Subject) -> None:
    """The subject as a table, ratios to its fastest contender."""
    config = ", ".join(f"{key} {value}" for key, value in subject.config.items())
    extras = sorted({key for row in subject.rows for key in row.extra})
    table = Table(title=f"{subject.name}: {config}")
    for column in ("", "median ms", "spread", "× fastest", *extras, ""):
        table.add_column(column, justify="left" if column == "" else "right")
    medians = [row.median for row in subject.rows if row.median is not None]
    for row in subject.rows:
        cells = ["not measured", "", ""]
        if row.seconds and row.median is not None:
            spread = (max(row.seconds) - min(row.seconds)) / row.median
            cells = [f"{1000 * row.median:.2f}", f"{100 * spread:.0f}%", f"{row.median / min(medians):.2f}"]
        table.add_row(row.name, *cells, *(str(row.extra.get(key, "")) for key in extras), row.note)
    Console(width=150).print(table)


def describe_machine() -> dict[str, Any]:
    """Device, cores, instruction set, versions: what a reader needs to place a figure."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_cpu_name()} {torch.get_num_threads()} threads"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*: (.*)", info.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
