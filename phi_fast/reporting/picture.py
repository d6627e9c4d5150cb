"""The report as a PNG, with the page's curves and mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from .curves import X_LABEL, smoothed
from .mixture import draws
from .read import Curve, RunData
from .summary import Chart, charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
_DASHES = ("-", "--", ":", "-.")


def draw(runs: list[RunData], path: Path) -> None:
    """Write a PNG with every chart of the page that has a value, and the mixture."""
    figure(runs).savefig(path)


def figure(runs: list[RunData]) -> Figure:
    """Lay out the panels in rows of at most `COLUMNS`, without empty cells."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in charts(runs) if any(value is not None for s in one.series for value in s.curve[1])]
    mixed = any(draws(run) for run in runs)
    count = len(shown) + mixed
    rows = math.ceil(count / COLUMNS)
    found = Figure(figsize=(15, 4 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(found)
    axes: list[Axes] = []
    for row, part in enumerate(found.subfigures(rows, 1, squeeze=False)[:, 0]):
        width = count // rows + (row < count % rows)
        axes.extend(part.subplots(1, width, squeeze=False)[0])
    for axis, one in zip(axes, shown, strict=False):
        _curves(axis, one)
    if mixed:
        _mixture(axes[-1], runs)
    return found


def _curves(axis: Axes, one: Chart) -> None:
    for series in one.series:
        average = smoothed(series.curve) if series.smooth else None
        style, color = _DASHES[series.style % len(_DASHES)], f"C{series.color % 10}"
        if average is not None:
            axis.plot(average[0], _numbers(average), style, color=color, lw=1.8, zorder=3, label=series.label)
        width, opacity, label = (1.2, 1.0, series.label) if average is None else (0.8, 0.35, None)
        axis.plot(series.curve[0], _numbers(series.curve), style, color=color, lw=width, alpha=opacity, label=label)
    axis.set_title(one.title, fontsize=10)
    axis.set_xlabel(X_LABEL, fontsize=8)
    axis.set_yscale("log" if one.log else "linear")
    axis.grid(lw=0.3)
    axis.legend(fontsize=7)


def _numbers(curve: Curve) -> list[float]:
    return [float("nan") if value is None else value for value in curve[1]]


def _mixture(axis: Axes, runs: list[RunData]) -> None:
    found = [(run, draw) for run in runs for draw in draws(run)]
    labels = [f"{run.name}: {draw.corpus}" for run, draw in found]
    places = range(len(found))
    axis.barh(places, [100 * draw.share for _, draw in found], color="C0", label="drawn")
    axis.plot([100 * draw.intended for _, draw in found], places, "k|", ms=14, label="intended")
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_title("Mixture, drawn against intended", fontsize=10)
    axis.set_xlabel("% of rows", fontsize=8)
    axis.legend(fontsize=7)
