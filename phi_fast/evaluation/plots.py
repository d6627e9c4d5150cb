"""The report's Figure 1 (grouped bars by task) and its safety figure, with our results beside the report's tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The report's Figure 1: three panels, and the benchmarks in each.
PANELS = {
    "Common sense reasoning": ("winogrande", "arc_easy", "arc_challenge", "boolq", "social_iqa"),
    "Language understanding and knowledge": ("piqa", "hellaswag", "mmlu", "openbookqa", "squad"),
    "Multi-step reasoning": ("gsm8k", "humaneval", "mbpp"),
}
LABELS = {task: label for table in paper.TABLES for task, label in table.tasks.items()}
CHANCE = {
    **dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa", "hellaswag", "mmlu"), 1 / 4),
    **dict.fromkeys(("winogrande", "boolq", "piqa"), 1 / 2),
    "social_iqa": 1 / 3,
}
"""Accuracy of guessing, from the number of choices; the other tasks have no choices."""
COLORS = ("#0b6e4f", "#1f5fa8", "#5b9bd5", "#a9c8e8", "#7f7f7f", "#b5b5b5", "#d9a441", "#8c6bb1")
FORMATS = ("png", "svg")
LEGEND_INCHES = 1.9
"""Width of a legend's column: a mark and "phi-1.5-web-only (report)"."""
TITLE_INCHES = 0.1
"""Width of a title's character, with room to spare."""


def benchmarks(
    ours: Mapping[str, float],
    name: str,
    folder: Path,
    stem: str = "benchmarks",
    *,
    spread: Mapping[str, tuple[float, int]] | None = None,
) -> list[Path]:
    """Grouped bars, one group per task: our scores (fractions; tasks not measured are left out) beside the report's.

    spread: task -> (standard error, number of questions) of our scores, shown as error bar and under the task's name. A
    dotted line marks the accuracy of guessing. Uncertain figures of the report are hatched. Writes `stem`.png and
    `stem`.svg, and returns their paths.
    """
    from matplotlib.patches import Patch

    panels = {title: [task for task in tasks if task in ours] for title, tasks in PANELS.items()}
    panels = {title: tasks for title, tasks in panels.items() if tasks}
    if not panels:
        raise ValueError(f"none of {', '.join(ours) or 'no results'} is a task of the report's figure")
    figure, axes = _subplots([len(tasks) for tasks in panels.values()])
    width = figure.get_figwidth()
    for axis, (title, tasks) in zip(axes, panels.items(), strict=True):
        _grouped_bars(axis, ours, name, tasks, spread or {})
        panel_inches = width * len(tasks) / sum(map(len, panels.values()))
        axis.set_title(textwrap.fill(title, int(panel_inches / TITLE_INCHES)), fontsize=10)
    axes[0].set_ylabel("accuracy / pass@1")
    shown = {label for axis in axes for label in axis.get_legend_handles_labels()[1]}
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in _colors(name).items() if label in shown],
        loc="outside lower center",
        ncols=int(width / LEGEND_INCHES),
        fontsize=8,
        title=f"other models: {paper.SOURCE}; hatched: not checked against a primary source; dotted: chance",
        title_fontsize=6,
    )
    return _save(figure, folder, stem)


def safety(groups: Mapping[str, Mapping[str, float]], folder: Path, stem: str = "safety") -> list[Path]:
    """Bars of the ToxiGen safety score (0 to 1, higher is safer) by demographic: model -> demographic -> score.

    The report prints no numbers for its own figure, so only measured models appear.
    """
    demographics = sorted({group for scores in groups.values() for group in scores})
    if not demographics:
        raise ValueError("no safety scores to draw: run the toxigen task first")
    figure, (axis,) = _subplots([len(demographics)])
    width = 0.8 / len(groups)
    for i, (model, scores) in enumerate(groups.items()):
        at = [j + (i - (len(groups) - 1) / 2) * width for j, group in enumerate(demographics) if group in scores]
        values = [scores[group] for group in demographics if group in scores]
        axis.bar(at, values, width, label=model, color=COLORS[i % len(COLORS)])
    axis.set_xticks(range(len(demographics)), demographics, rotation=35, ha="right", fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("safety score (ToxiGen)")
    figure.legend(loc="outside upper right", fontsize=8)
    return _save(figure, folder, stem)


def _grouped_bars(
    axis: Axes, ours: Mapping[str, float], name: str, tasks: list[str], spread: Mapping[str, tuple[float, int]]
) -> None:
    series: dict[str, list[tuple[int, float, bool]]] = {name: [(j, ours[task], True) for j, task in enumerate(tasks)]}
    for model in paper.models():
        cells = [(j, paper.score(model, task)) for j, task in enumerate(tasks)]
        if any(cell for _, cell in cells):
            series[_label(model)] = [(j, cell.value, cell.certain) for j, cell in cells if cell]
    width, colors = 0.84 / len(series), _colors(name)
    for i, (label, cells_of_model) in enumerate(series.items()):
        places = [j + (i - (len(series) - 1) / 2) * width for j, _, _ in cells_of_model]
        values = [value for _, value, _ in cells_of_model]
        bars = axis.bar(places, values, width, label=label, color=colors[label], edgecolor="white", lw=0.3)
        for bar, (_, _, certain) in zip(bars, cells_of_model, strict=True):
            if not certain:
                bar.set_hatch("////")
    for j, task in enumerate(tasks):
        if task in spread:
            middle = j - (len(series) - 1) / 2 * width
            axis.errorbar([middle], [ours[task]], [spread[task][0]], color="black", lw=1, capsize=2)
        if task in CHANCE:
            axis.hlines(CHANCE[task], j - 0.45, j + 0.45, color="black", ls=":", lw=1)
    names = [LABELS[task] + (f"\nn = {spread[task][1]:,}" if task in spread else "") for task in tasks]
    axis.set_xticks(range(len(tasks)), names, rotation=20, ha="right", fontsize=8)
    axis.set_ylim(0, 1)
    axis.grid(axis="y", lw=0.3)
    axis.set_axisbelow(True)


def _label(model: str) -> str:
    return f"{model} (report)"


def _colors(name: str) -> dict[str, str]:
    """Label -> color. A model has the same color in every panel."""
    return dict(zip((name, *map(_label, paper.models())), COLORS, strict=True))


def _subplots(groups: list[int]) -> tuple[Figure, list[Axes]]:
    """One row of panels, their widths proportional to `groups`. The Agg canvas needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.1 * sum(groups) + 1.5), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), width_ratios=groups, squeeze=False)
    return figure, list(axes[0])


def _save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.{kind}" for kind in FORMATS]
    for path in paths:
        figure.savefig(path)
    return paths
