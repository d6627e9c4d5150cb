"""What a benchmark measures: a subject has contenders and, for each of them, a row of seconds.

Rows whose name begins with "phi_fast" are this project's. "copy", "matrix product" and names that end in "alone" are
bounds. All others are peers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One implementation, and the least that the operation costs in any implementation."""

    run: Callable[[], object]
    moved: int = 0
    """Bytes that must be read or written, each once."""
    flops: int = 0
    """Floating-point operations of its matrix products."""
    note: str = ""
    """How it differs from the others."""


@dataclass
class Row:
    """One contender of a subject."""

    name: str
    seconds: list[float] | None
    """One per repeat; None if it could not run here."""
    note: str = ""
    """Why it could not run, or how it differs from the others."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further figures, by the column's name."""
    moved: int = 0
    flops: int = 0
    of_bound: float | None = None
    """The least time that the subject's bounds allow ÷ the median; None if no bound was measured with it."""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Interquartile range ÷ median: how far the repeats scatter. Single outliers do not change it."""
        return spread(self.seconds) if self.seconds else None


def spread(seconds: list[float]) -> float:
    """Interquartile range ÷ median; 0 for a single repeat."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


@dataclass
class Subject:
    """Contenders timed in the same rounds."""

    name: str
    """What is measured, the dtype and the direction, separated by commas. A plot shows all subjects with the same text
    before the first comma."""
    config: dict[str, Any]
    rows: list[Row]

    def ratio(self, slower: str, faster: str) -> float:
        """The time of `slower` as a multiple of that of `faster` (`paired_ratio`)."""
        return paired_ratio(self._seconds(slower), self._seconds(faster))

    def _seconds(self, name: str) -> list[float]:
        return next(row.seconds for row in self.rows if row.name == name and row.seconds)


def kind(name: str) -> str:
    """Classifies a row by its name as "ours", "peer" or "bound"."""
    if name.startswith("phi_fast"):
        return "ours"
    return "bound" if name in ("copy", "matrix product") or name.endswith("alone") else "peer"


def paired_ratio(slower: list[float], faster: list[float]) -> float:
    """The median of the ratios of each repeat, in which noise that both shared cancels; the ratio of the medians if the
    two have different numbers of repeats."""
    if len(slower) != len(faster):
        return statistics.median(slower) / statistics.median(faster)
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
