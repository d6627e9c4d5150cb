from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")

from matplotlib.container import BarContainer, ErrorbarContainer

from phi_fast import paper
from phi_fast.evaluation import plots


def check_images(paths, *words):
    png, svg = paths
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    ElementTree.parse(svg)
    comments = svg.read_text()  # matplotlib writes each text as a comment beside its outlines
    for word in words:
        assert f"<!-- {word} -->" in comments, word


def test_benchmarks_show_ours_beside_the_report(tmp_path):
    paths = plots.benchmarks({"arc_easy": 0.4, "boolq": 0.6, "humaneval": 0.1}, "mine", tmp_path)
    check_images(paths, "mine", "phi-1.5 (report)", "ARC-Easy", "BoolQ", "HumanEval", "Multi-step reasoning")
    assert "<!-- PIQA -->" not in paths[1].read_text()  # not measured


def test_bars_have_the_heights_of_the_scores():
    _, (axis,) = plots._subplots([2])
    spread = {"arc_easy": (0.05, 1200)}
    plots._grouped_bars(axis, {"arc_easy": 0.4, "boolq": 0.6}, "mine", ["arc_easy", "boolq"], spread)
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers if isinstance(c, BarContainer)}
    assert heights["mine"] == [0.4, 0.6]
    bars = [bar for bar in axis.containers if isinstance(bar, ErrorbarContainer)]
    [[segment]] = [bar[2][0].get_segments() for bar in bars]
    assert segment[:, 1].tolist() == pytest.approx([0.35, 0.45])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["ARC-Easy\nn = 1,200", "BoolQ"]
    lines = [y for c in axis.collections if c.get_linestyle()[0][1] for (_, y), _ in c.get_segments()]
    assert lines == [0.25, 0.5]  # four choices, and two
    assert heights["phi-1.5 (report)"] == [0.756, 0.758]
    bar_groups = [c for c in axis.containers if isinstance(c, BarContainer)]
    vicuna = next(c for c in bar_groups if c.get_label().startswith("Vicuna"))
    assert [bar.get_hatch() for bar in vicuna] == ["////", "////"]
    assert all(bar.get_hatch() is None for bar in bar_groups[0])


@pytest.mark.parametrize(
    "tasks",
    [("arc_easy",), ("piqa",), ("arc_easy", "piqa", "winogrande", "openbookqa"), ("gsm8k", "boolq"), paper.TASKS],
)
def test_everything_is_inside_the_figure(monkeypatch, tmp_path, tasks):
    """Labels fit even if few tasks were run: their panels are narrow, the legend is not."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, *_: drawn.append(figure))
    plots.benchmarks(dict.fromkeys(tasks, 0.5), "a run of a long name", tmp_path)
    (figure,) = drawn
    figure.canvas.draw()
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *(axis.title.get_window_extent() for axis in figure.axes)]
    labels = [label.get_window_extent() for axis in figure.axes for label in axis.get_xticklabels()]
    for box in [*boxes, *labels]:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, box
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, box
    assert all(label.y0 > boxes[0].y1 for label in labels)


def test_a_model_has_one_color_and_no_other_has_it(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, *_: drawn.append(figure))
    plots.benchmarks(dict.fromkeys(paper.TASKS, 0.5), "mine", tmp_path)
    colors = {(c.get_label(), bar.get_facecolor()) for axis in drawn[0].axes for c in axis.containers for bar in c}
    assert len(colors) == len({label for label, _ in colors}) == len({color for _, color in colors})
    (legend,) = drawn[0].legends
    shown = {
        (text.get_text(), patch.get_facecolor()) for text, patch in zip(legend.texts, legend.get_patches(), strict=True)
    }
    assert shown == colors


def test_safety_by_demographic(tmp_path):
    scores = {"mine": {"asian": 0.8, "women": 0.5}, "other": {"women": 0.4}}
    check_images(plots.safety(scores, tmp_path), "mine", "other", "asian", "women")


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of wikitext is a task"):
        plots.benchmarks({"wikitext": 0.4}, "mine", tmp_path)
    with pytest.raises(ValueError, match="run the toxigen task"):
        plots.safety({}, tmp_path)
