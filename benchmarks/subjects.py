"""What a benchmark measures: contenders, and a row of seconds for each, in one subject.

Rows whose name begins with "phi_fast" are this project's, "copy", "matrix product" and what says "alone" are bounds,
all others are peers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One implementation, and what the operation costs at least, whoever does it."""

    run: Callable[[], object]
    moved: int = 0
    """Bytes that must be read and written once."""
    flops: int = 0
    """Floating-point operations of its matrix products."""
    note: str = ""
    """What it does differently."""


@dataclass
class Row:
    """One contender of a subject."""

    name: str
    seconds: list[float] | None
    """One per repeat; None where it could not run here."""
    note: str = ""
    """Why it could not run, or what it does differently."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further figures, by the column's name."""
    moved: int = 0
    flops: int = 0
    of_bound: float | None = None
    """The least time that the subject's bounds allow ÷ the median; None where no bound was measured beside it."""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Interquartile range ÷ median: how far repeats lie apart, whatever single ones did."""
        return spread(self.seconds) if self.seconds else None


def spread(seconds: list[float]) -> float:
    """Interquartile range ÷ median; 0 of a single repeat."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


@dataclass
class Subject:
    """Contenders timed side by side."""

    name: str
    """What is measured, comma, dtype, comma, direction: up to the first comma it is the group that a plot shows."""
    config: dict[str, Any]
    rows: list[Row]

    def ratio(self, slower: str, faster: str) -> float:
        """Median of `slower` ÷ median of `faster`, taken repeat by repeat: noise that both shared cancels."""
        pairs = zip(self._seconds(slower), self._seconds(faster), strict=True)
        return statistics.median(a / b for a, b in pairs)

    def _seconds(self, name: str) -> list[float]:
        return next(row.seconds for row in self.rows if row.name == name and row.seconds)


def kind(name: str) -> str:
    """ "ours", "peer" or "bound", by a row's name."""
    if name.startswith("phi_fast"):
        return "ours"
    return "bound" if name in ("copy", "matrix product") or name.endswith("alone") else "peer"


def paired_ratio(slower: list[float], faster: list[float]) -> float:
    """The median of the ratios repeat by repeat: noise that both shared cancels. Of the medians where the two were not
    repeated alike."""
    if len(slower) != len(faster):
        return statistics.median(slower) / statistics.median(faster)
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
