"""Bars a subject, a figure a group of them: medians with their interquartile range, from a results document."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import kind

COLORS = {"ours": "#c0392b", "peer": "#5b9bd5", "bound": "#9a9a9a"}
INCHES_A_BAR, INCHES_A_TITLE, WIDTH = 0.26, 0.75, 8.0


def group(name: str) -> str:
    """A subject's group: its name up to the first comma."""
    return name.split(",")[0]


def file_name(group_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", group_name.lower()).strip("-") + ".png"


def draw(document: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Writes a PNG for every group with something measured into `folder`; group -> path."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for subject in document["subjects"]:
        if any(row["seconds"] for row in subject["rows"]):
            groups.setdefault(group(subject["name"]), []).append(subject)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / file_name(name) for name in groups}
    for name, subjects in groups.items():
        _figure(subjects, document["machine"]["device"], paths[name])
    return paths


def _figure(subjects: list[dict[str, Any]], device: str, path: Path) -> None:
    """One panel below the other, each with its own scale. Agg needs no display, and the file carries no date."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [[row for row in subject["rows"] if row["seconds"]] for subject in subjects]
    heights = [INCHES_A_TITLE + INCHES_A_BAR * len(rows) for rows in measured]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(subjects), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, subject, rows in zip(axes, subjects, measured, strict=True):
        medians = [1000 * statistics.median(row["seconds"]) for row in rows]
        lows, highs = zip(*(_quartiles(row["seconds"]) for row in rows), strict=True)
        errors = [
            [median - 1000 * low for median, low in zip(medians, lows, strict=True)],
            [1000 * high - median for median, high in zip(medians, highs, strict=True)],
        ]
        names = [row["name"] for row in rows]
        colors = [COLORS[kind(name)] for name in names]
        bars = axis.barh(range(len(rows)), medians, xerr=errors, color=colors, error_kw={"lw": 0.8})
        axis.bar_label(bars, [_label(median) for median in medians], padding=3, fontsize=7)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{subject['name']} — ms, {device}", fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _quartiles(seconds: list[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def _label(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
