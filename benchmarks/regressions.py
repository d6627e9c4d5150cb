"""Comparison of two results files row by row: which rows changed by more than their repeats scatter."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.subjects import spread

FLOOR = 0.02
"""A relative change below this does not count, even if the repeats scatter less."""

Verdict = Literal["slower", "faster", "same"]


@dataclass(frozen=True)
class Change:
    """One row that both files measured."""

    subject: str
    row: str
    ratio: float
    """Median after ÷ median before."""
    scatter: float
    """The larger of the two spreads (interquartile range ÷ median), at least `FLOOR`."""

    @property
    def verdict(self) -> Verdict:
        if self.ratio > 1 + self.scatter:
            return "slower"
        return "faster" if 1 / self.ratio > 1 + self.scatter else "same"


@dataclass(frozen=True)
class Comparison:
    """The rows that two results files have in common, and those that only one of them has."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    devices: tuple[str, str]

    @property
    def regressed(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """before, after: results documents (`harness.Results`). Rows that did not run in one count as missing there."""
    old, new = _measured(before), _measured(after)
    changes = [
        Change(*key, median(new[key]) / median(old[key]), max(spread(old[key]), spread(new[key]), FLOOR))
        for key in old
        if key in new
    ]
    return Comparison(
        changes,
        [": ".join(key) for key in old if key not in new],
        [": ".join(key) for key in new if key not in old],
        (before["machine"]["device"], after["machine"]["device"]),
    )


def show(comparison: Comparison, console: Console) -> None:
    """Print what changed, what is in only one file, and a summary line."""
    before, after = comparison.devices
    if before != after:
        console.print(f"note: measured on different devices, {before} and {after}")
    table = Table()
    for column in ("", "", "after ÷ before", "scatter", "verdict"):
        table.add_column(column, justify="right" if "÷" in column or column == "scatter" else "left")
    for change in comparison.changes:
        if change.verdict != "same":
            cells = (f"{change.ratio:.2f}", f"{100 * change.scatter:.0f}%", change.verdict)
            table.add_row(change.subject, change.row, *cells)
    if table.row_count:
        console.print(table)
    for title, names in (("only before", comparison.only_before), ("only after", comparison.only_after)):
        for name in names:
            console.print(f"{title}: {name}")
    verdicts = [change.verdict for change in comparison.changes]
    console.print(
        f"{len(verdicts)} rows in both: {verdicts.count('slower')} slower, {verdicts.count('faster')} faster, "
        f"{verdicts.count('same')} the same within their scatter"
    )


def _measured(document: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """(subject, row) -> seconds."""
    found = {}
    for subject in document["subjects"]:
        for row in subject["rows"]:
            if row["seconds"]:
                found[subject["name"], row["name"]] = row["seconds"]
    return found
