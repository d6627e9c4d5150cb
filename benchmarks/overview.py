"""The README's picture: the loss of `make train`, and a training step beside its peers, from the newest results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plots import COLORS
from benchmarks.subjects import kind, paired_ratio
from phi_fast.json_files import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE = "make-train.jsonl"
"""File in the folder of results with lines of a run's metrics.jsonl; step, loss and val_loss are used."""
STEP = "training step, phi-small"
"""The names of the subjects that are drawn begin with this."""
SMOOTHING = 10
"""The smoothed loss is the mean of this many steps."""


def has_step(document: dict[str, Any]) -> bool:
    """Whether there is a subject to draw."""
    return any(subject["name"].startswith(STEP) for subject in document["subjects"])


def draw(results: Path, document: dict[str, Any], path: Path) -> None:
    """Write the picture as a PNG without a date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(results, document).savefig(path, dpi=110, metadata={"Software": None})


def figure(results: Path, document: dict[str, Any]) -> Figure:
    """Draw the loss curve on the left and the bars on the right. Agg needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(whole)
    left, right = whole.subplots(1, 2, width_ratios=[5, 6])
    if (results / CURVE).exists():
        _curve(left, [line for _, line in read_lines(results / CURVE)])
    _bars(right, document)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return whole


def _curve(axis: Axes, lines: list[Any]) -> None:
    steps, losses = zip(*((line["step"], line["loss"]) for line in lines if "loss" in line), strict=True)
    smooth = [statistics.mean(losses[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(losses))]
    axis.plot(steps, losses, color=COLORS["peer"], lw=0.8, label="training")
    axis.plot(steps, smooth, color=COLORS["ours"], lw=1.6, label=f"mean of {SMOOTHING} steps")
    validated = [line for line in lines if line.get("val_loss") is not None]
    points = [(line["step"], line["val_loss"]) for line in validated]
    axis.plot(*zip(*points, strict=True), "o", color="black", ms=4, label="validation")
    text = f"{points[-1][1]:.2f}"
    axis.annotate(text, points[-1], textcoords="offset points", xytext=(-4, 8), fontsize=8)
    axis.set_title("`make train`: 7 M parameters on Python's own library", fontsize=9, loc="left")
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.set_ylabel("loss, nats per token", fontsize=8)
    axis.legend(fontsize=8, frameon=False)


def _bars(axis: Axes, document: dict[str, Any]) -> None:
    """Draw each peer's time as a multiple of phi_fast's; the bound is left out."""
    names, ratios, colors = [], [], []
    for subject in document["subjects"]:
        rows = [row for row in subject["rows"] if row["seconds"] and kind(row["name"]) != "bound"]
        own = next((row for row in rows if kind(row["name"]) == "ours"), None)
        if not subject["name"].startswith(STEP) or own is None:
            continue
        dtype = subject["name"].rpartition(", ")[2]
        names += [f"{row['name']}, {dtype}" for row in rows]
        ratios += [paired_ratio(row["seconds"], own["seconds"]) for row in rows]
        colors += [COLORS[kind(row["name"])] for row in rows]
    bars = axis.barh(range(len(names)), ratios, color=colors)
    axis.bar_label(bars, [f"{ratio:.2f}×" for ratio in ratios], padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(f"{STEP}: time, phi_fast = 1", fontsize=9, loc="left")
    axis.set_xlabel(f"{document['machine']['device']}; no GPU measured yet", fontsize=8)
