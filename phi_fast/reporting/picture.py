"""The report as a PNG: the same curves, and the mixture."""

from __future__ import annotations

from pathlib import Path

from .mixture import draws
from .read import RunData
from .summary import charts

_DASHES = ("-", "--", ":", "-.")


def draw(runs: list[RunData], path: Path) -> None:
    """Writes a PNG of every chart of the page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 4).flat)
    shown = charts(runs)
    last = axes[len(shown)]
    for axis, one in zip(axes, shown, strict=False):
        for series in one.series:
            steps, values = series.curve
            if any(value is not None for value in values):
                numbers = [float("nan") if value is None else value for value in values]
                style = _DASHES[series.style % len(_DASHES)]
                axis.plot(steps, numbers, style, color=f"C{series.color % 10}", label=series.label, lw=1.2)
        axis.set_title(one.title, fontsize=10)
        axis.grid(lw=0.3)
        if axis.lines:
            axis.set_yscale("log" if one.log else "linear")
            axis.legend(fontsize=7)
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    labels, intended, drawn = [], [], []
    for run in runs:
        for one_draw in draws(run):
            labels.append(f"{run.name}: {one_draw.corpus}")
            intended.append(100 * one_draw.intended)
            drawn.append(100 * one_draw.share)
    last.barh(labels, drawn, color="C0", label="drawn")
    last.plot(intended, labels, "k|", ms=14, label="intended")
    last.set_title("Mixture, % of rows", fontsize=10)
    last.legend(fontsize=7)
    for axis in axes[len(shown) + 1 :]:
        axis.axis("off")
    figure.savefig(path)
