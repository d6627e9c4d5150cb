"""A figure for each group of subjects in a results document, with a panel per subject and a bar per row.

A bar shows the median time with its interquartile range or, in a group of `FIGURES`, the quantity named there.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.subjects import kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"ours": "#1f5fa8", "peer": "#a9c8e8", "bound": "#9a9a9a"}
INCHES_PER_BAR, INCHES_PER_TITLE, INCHES_PER_CAPTION, WIDTH = 0.26, 0.65, 0.3, 8.0
TIME = "ms: median, and its quartiles as a line"
FIGURES = {
    "peak memory of a step": ("peak MB", "MB at the peak of the process"),
    "stall share of a training step": ("waiting for data", "% of the step's time spent waiting for data"),
}
"""Groups that show another quantity than time: group -> (column of `Row.extra`, caption with its unit)."""


def group(name: str) -> str:
    """A subject's group: its name up to the first comma."""
    return name.split(",")[0]


def file_name(group_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", group_name.lower()).strip("-") + ".png"


def draw(document: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write a PNG into `folder` for every group that has a measured row. Returns group -> path. PNGs have no date."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, figure in figures(document).items():
        paths[name] = folder / file_name(name)
        figure.savefig(paths[name], dpi=100, metadata={"Software": None})
    return paths


def figures(document: dict[str, Any]) -> dict[str, Figure]:
    """The figure of every group that has a measured row."""
    groups: dict[str, list[tuple[str, list[dict[str, Any]]]]] = {}
    for subject in document["subjects"]:
        name = group(subject["name"])
        rows = [row for row in subject["rows"] if row["seconds"] and _has_figure(name, row)]
        if rows:
            groups.setdefault(name, []).append((subject["name"], rows))
    return {name: _figure(name, panels, document["machine"]["device"]) for name, panels in groups.items()}


def _has_figure(group_name: str, row: dict[str, Any]) -> bool:
    return group_name not in FIGURES or FIGURES[group_name][0] in row["extra"]


def _bar(group_name: str, row: dict[str, Any]) -> tuple[float, float, float]:
    """(value, lower quartile, upper quartile) of a row; all three are equal for a quantity that was measured once."""
    if group_name in FIGURES:
        value = float(str(row["extra"][FIGURES[group_name][0]]).removesuffix("%"))
        return value, value, value
    low, high = _quartiles(row["seconds"])
    return 1000 * statistics.median(row["seconds"]), 1000 * low, 1000 * high


def _figure(name: str, panels: list[tuple[str, list[dict[str, Any]]]], device: str) -> Figure:
    """Draw one panel below the other, each with its own scale. Agg needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [INCHES_PER_TITLE + INCHES_PER_BAR * len(rows) for _, rows in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + INCHES_PER_CAPTION), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (title, rows) in zip(axes, panels, strict=True):
        values, lows, highs = zip(*(_bar(name, row) for row in rows), strict=True)
        errors = [
            [value - low for value, low in zip(values, lows, strict=True)],
            [high - value for value, high in zip(values, highs, strict=True)],
        ]
        names = [row["name"] for row in rows]
        colors = [COLORS[kind(label)] for label in names]
        spread = {} if name in FIGURES else {"xerr": errors, "error_kw": {"lw": 0.8}}
        bars = axis.barh(range(len(rows)), values, color=colors, **spread)
        axis.bar_label(bars, [_label(value) for value in values], padding=3, fontsize=7)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    what = FIGURES[name][1] if name in FIGURES else TIME
    figure.supxlabel(f"{what}; {device}", fontsize=8)
    return figure


def _quartiles(seconds: list[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
