"""The report: reading of runs, curves and pictures, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from phi_fast.data import Mixture, TokenLoader
from phi_fast.errors import UsageError
from phi_fast.report import main
from phi_fast.reporting.curves import MOST, Scale, smoothed, thin
from phi_fast.reporting.mixture import draws
from phi_fast.reporting.picture import figure
from phi_fast.reporting.read import RunData, read_runs
from phi_fast.training.metrics import MetricsLog, StepRecord
from phi_fast.training.options import parse, plain

HOSTILE = "</pre><script>document.title = 'taken'</script>\"'&"
METRICS = ["loss", "val_loss", "grad_norm", "loss_scale", "tokens_per_s", "lr", "tasks"]


def write_run(path: Path, steps: int = 12, sample: str = "The module", **options: Any) -> Path:
    """Write a run directory with the trainer's own code; step 3 is skipped, every fourth step has a validation."""
    path.mkdir(parents=True)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    (path / "config.json").write_text(json.dumps(plain(asdict(parse(words)))))
    log = MetricsLog(path, 0)
    for step in range(1, steps + 1):
        validated = step % 4 == 0
        record = StepRecord(
            step=step,
            tokens=step * 2048,
            loss=9.0 / step,
            lr=1e-3,
            grad_norm=None if step == 3 else 1.0 + step,
            loss_scale=65536.0,
            skipped=step == 3,
            tokens_per_s=1000.0 + step,
            step_ms=2048.0,
            mfu=None,
            val_loss=8.0 / step if validated else None,
            val_losses={"docs": 7.0 / step, "code": 9.0 / step} if validated else None,
            tasks={"piqa": 0.5 + step / 100} if validated else None,
        )
        log.write(record)
    log.text("sample", sample, steps)
    log.close()
    return path


class Page(HTMLParser):
    """Collects curves, text and everything that could load something from the page's source or a browser's DOM."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.curves: dict[tuple[str, str], tuple[list[int], list[float | None]]] = {}
        self.bars: dict[tuple[str, str], tuple[float, float]] = {}
        self.tags: list[str] = []
        self.root: dict[str, str | None] = {}
        self.references: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.references += [str(found[name]) for name in ("src", "href", "action", "data") if name in found]
        if tag == "html":
            self.root = found
        if tag == "g" and (found.get("class") or "").startswith("series"):
            steps = [int(word) for word in str(found["data-steps"]).split(",")]
            values = [float(word) if word else None for word in str(found["data-values"]).split(",")]
            self.curves[str(found["data-metric"]), str(found["data-label"])] = steps, values
        if "data-intended" in found:
            shares = float(str(found["data-intended"])), float(str(found["data-drawn"]))
            self.bars[str(found["data-run"]), str(found["data-corpus"])] = shares

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the page of two different runs, one of which sampled hostile text."""
    base = tmp_path_factory.mktemp("report")
    first, second = write_run(base / "a<b>"), write_run(base / "b", sample=HOSTILE, learning_rate=3e-4, seed=7)
    assert main([str(first), str(second), "--out", str(base / "page.html"), "--png", str(base / "page.png")]) == 0
    yield base / "page.html"


def check_curves(found: Page) -> None:
    assert {metric for metric, _ in found.curves} == set(METRICS)
    steps, values = found.curves["loss", "a<b>"]
    assert steps == list(range(1, 13))
    assert values == [9.0 / step for step in steps]
    steps, values = found.curves["grad_norm", "b"]
    assert values[2] is None
    assert values[3] == 5.0
    assert found.curves["val_loss", "b"] == ([4, 8, 12], [8.0 / step for step in (4, 8, 12)])
    assert found.curves["val_loss", "b: code"] == ([4, 8, 12], [9.0 / step for step in (4, 8, 12)])
    assert found.curves["tasks", "b: piqa"] == ([4, 8, 12], [0.54, 0.58, 0.62])
    assert found.curves["loss_scale", "b"][1] == [65536.0] * 12


def test_the_page_holds_every_curve_and_reaches_for_nothing(report: Path) -> None:
    source = report.read_text(encoding="utf-8")
    found = Page(source)
    check_curves(found)
    assert found.references == []
    assert not any(word in source for word in ("http:", "https:", "@import", "url("))
    assert found.tags.count("script") == 1
    assert not {"link", "img", "iframe"} & set(found.tags)


def test_text_is_escaped_and_shown(report: Path) -> None:
    found = Page(report.read_text(encoding="utf-8"))
    assert HOSTILE in found.text
    assert "a<b>" in found.text
    words = "".join(found.text)
    assert "learning_rate" in words
    assert "0.0003" in words
    assert "every option" in words


def test_a_curve_lies_where_its_values_are(report: Path) -> None:
    """The line's highest point is the largest loss, and the line falls from left to right."""
    source = report.read_text(encoding="utf-8")
    svg = source[source.index('id="chart-loss"') :]
    points = svg.split('points="')[1].split('"')[0].split()
    x, y = zip(*([float(number) for number in point.split(",")] for point in points), strict=True)
    assert list(x) == sorted(x)
    assert list(y) == sorted(y)
    scale = Scale(0.0, 10.0, 100.0, 0.0)
    assert (scale(0), scale(5), scale(10)) == (100, 50, 0)
    assert Scale(1.0, 100.0, 0.0, 10.0, log=True)(10.0) == pytest.approx(5)


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no chromium, chromium-browser or google-chrome on this machine")
def test_chromium_draws_the_curves(report: Path, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'user'}"]
    command = [str(browser()), *flags, "--dump-dom", report.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = Page(dom)
    check_curves(found)
    assert found.root["data-curves"] == str(len(found.curves))  # written by the page's script
    assert "taken" not in dom.split("</title>")[0]  # and not by the sample's


def test_the_picture_is_drawn(report: Path) -> None:
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_draws_the_records_with_labels_and_no_empty_cell(report: Path) -> None:
    pytest.importorskip("matplotlib")
    for names in (["b"], ["a<b>", "b"]):
        found = figure(read_runs([report.parent / name for name in names]))
        assert len(found.axes) == len(METRICS) + 1  # and the mixture
        assert all(axis.has_data() and axis.get_xlabel() and axis.get_title() for axis in found.axes)
        lines = {(axis.get_title(), line.get_label()): line for axis in found.axes for line in axis.lines}
        loss = lines["Loss, nats per token", "b"]
        assert (list(loss.get_xdata()), list(loss.get_ydata())) == (list(range(1, 13)), [9.0 / n for n in range(1, 13)])
        assert list(lines["Accuracy by task (--eval-every)", "b: piqa"].get_ydata()) == [0.54, 0.58, 0.62]
        code = next(text.get_text() for text in found.axes[-1].get_yticklabels() if text.get_text() == "b: code")
        at = [text.get_text() for text in found.axes[-1].get_yticklabels()].index(code)
        assert found.axes[-1].patches[at].get_width() == pytest.approx(20, abs=1)
        found.canvas.draw()
        for axis in found.axes:
            box = axis.title.get_window_extent()
            assert found.bbox.x0 <= box.x0 < box.x1 <= found.bbox.x1


def test_every_chart_says_that_its_x_is_steps(report: Path) -> None:
    source = report.read_text(encoding="utf-8")
    assert source.count('<svg class="chart"') == source.count(">optimizer step</text>") == len(METRICS)


def test_the_validation_before_the_first_step_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    before = '{"step": 0, "tokens": 0, "val_loss": 9.5, "val_losses": {"docs": 9.25, "code": 9.75}}\n'
    (run / "metrics.jsonl").write_text(before + (run / "metrics.jsonl").read_text())
    assert main([str(run)]) == 0
    found = Page((run / "report.html").read_text(encoding="utf-8"))
    assert found.curves["val_loss", "run"] == ([0, 4], [9.5, 2.0])
    assert found.curves["val_loss", "run: docs"] == ([0, 4], [9.25, 1.75])
    assert found.curves["loss", "run"][0] == [1, 2, 3, 4]
    (run / "metrics.jsonl").write_text(before)  # killed within the first step
    assert main([str(run), "--png", str(tmp_path / "page.png")]) == 0
    found = Page((run / "report.html").read_text(encoding="utf-8"))
    assert found.curves["val_loss", "run"] == ([0], [9.5])


def test_a_loss_scale_that_never_moved_has_no_card(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)  # step 3 is the one skipped
    assert main([str(run)]) == 0
    assert "Loss scale" not in (run / "report.html").read_text(encoding="utf-8")
    assert "Loss scale" not in {axis.get_title() for axis in figure(read_runs([run])).axes}


def test_the_loss_is_smoothed_over_the_raw_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=160)
    assert main([str(run)]) == 0
    source = (run / "report.html").read_text(encoding="utf-8")
    loss = source[source.index('id="chart-loss"') : source.index('id="chart-val_loss"')]
    assert loss.index('<g class="raw">') < loss.index('<g class="smooth">')
    steps = list(range(400))
    average = smoothed((steps, [1.0, None] * 200))  # the average of ones is 1, although values are missing
    assert average is not None
    assert average[1][::2] == pytest.approx([1.0] * 200)
    assert average[1][1::2] == [None] * 200
    average = smoothed((steps, [float(step % 2) for step in steps]))
    assert average is not None
    weights = [0.9**age for age in range(400)]  # 400 steps ÷ 40: over about 10
    by_hand = sum(w * ((399 - age) % 2) for age, w in enumerate(weights)) / sum(weights)
    assert average[1][399] == pytest.approx(by_hand)
    assert smoothed((steps[:20], [1.0] * 20)) is None


def test_draws_are_the_loaders(stdlib: Path, report: Path) -> None:
    mixture = Mixture.of({"docs": (stdlib / "docs", 80), "code": (stdlib / "code", 20)})
    with TokenLoader(mixture, sequence_length=32, batch=8, rank=0, world_size=1, seed=1337) as loader:
        batches = [next(loader).components.tolist() for _ in range(12)]
    rows = [index for batch in batches for index in batch]
    [run] = read_runs([report.parent / "a<b>"])
    docs, code = draws(run)
    assert (docs.drawn, code.drawn, docs.rows) == (rows.count(0), rows.count(1), 96)
    assert (docs.intended, code.intended) == (0.8, 0.2)
    distance = max(abs(rows[: 8 * n].count(1) - 0.2 * 8 * n) for n in range(1, 13))
    assert code.worst == pytest.approx(distance)
    assert docs.worst < 1
    assert Page(report.read_text(encoding="utf-8")).bars["b", "docs"] == pytest.approx((0.8, docs.drawn / 96), abs=1e-5)


def test_draws_of_a_mixture_with_stages_are_the_loaders(stdlib: Path) -> None:
    stages = [(3, {"code": 1}), (7, {"docs": 1, "code": 3})]
    corpora = {"docs": (stdlib / "docs", 3), "code": (stdlib / "code", 1)}
    mixture = Mixture.of(corpora, stages=[(step * 8, weights) for step, weights in stages])
    with TokenLoader(mixture, sequence_length=32, batch=8) as loader:
        rows = [next(loader).components.tolist() for _ in range(10)]
    config = {"mixture.docs": 3, "mixture.code": 1, "mixture_stages": stages, "global_batch_size": 8}
    for steps in (2, 5, 10):
        found = draws(RunData("x", Path(), config, [{"step": step + 1} for step in range(steps)], []))
        drawn = [index for batch in rows[:steps] for index in batch]
        assert [draw.drawn for draw in found] == [drawn.count(0), drawn.count(1)]
    docs = 3 * 8 * 0.75 + 3 * 8 * 0.25
    assert [draw.intended for draw in found] == pytest.approx([docs / 80, 1 - docs / 80])


def test_draws_follow_other_weights() -> None:
    config = {"mixture.web": 40, "mixture.code": 20, "mixture.none": 0, "mixture.synthetic": 40, "global_batch_size": 7}
    found = draws(RunData("x", Path(), config, [{"step": 1}, {"step": 100}], []))
    assert [draw.corpus for draw in found] == ["web", "code", "synthetic"]
    assert sum(draw.drawn for draw in found) == 700
    assert all(abs(draw.drawn - draw.intended * 700) < 1 for draw in found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"loss": 2.0}', "step is missing, expected an integer of at least 0"),
        ('{"step": true}', "step is True, expected an integer"),
        ('{"step": 2, "loss": "x"}', "loss is 'x', expected a finite number"),
        ('{"step": 2, "val_losses": {"a": "x"}}', "val_losses.a is 'x', expected a finite number"),
        ('{"step": 2, "loss": NaN}', "NaN is not JSON"),
        ("[1]", "holds a JSON list, expected an object"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    """A bad last line with a line feed is an error, too, because it is complete; blank lines are skipped."""
    run = write_run(tmp_path / "run", steps=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"\n  \n{line}\n")
    with pytest.raises(UsageError, match=rf"metrics.jsonl:4.*{re.escape(message)}"):
        read_runs([run])


def test_long_curves_are_thinned_and_keep_their_extremes() -> None:
    values: list[float | None] = [float(i % 17) for i in range(36_000)]
    values[20_000], values[30_000], values[100] = 1e6, -5.0, None
    steps, thinned = thin((list(range(36_000)), values))
    assert len(steps) <= MOST + 2
    assert (steps[0], steps[-1]) == (0, 35_999)
    assert {1e6, -5.0} <= set(thinned)
    assert steps == sorted(steps)


def test_one_run_has_its_page_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    assert main([str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    source = (run / "report.html").read_text(encoding="utf-8")
    assert Page(source).curves["loss", "run"][0] == [1, 2, 3]
    assert "not measured" in source  # no validation yet
    assert 'id="differences"' not in source


def test_what_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err

    run = write_run(tmp_path / "run", steps=2)
    assert "is not a run directory" in refused(str(tmp_path / "nothing"))
    assert "given twice" in refused(str(run), str(run))
    assert "give at least one run directory" in refused()
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text()
    metrics.write_text("broken\n" + lines)
    assert f"{metrics}:1 is not JSON" in refused(str(run))
    metrics.write_bytes(b"\xac\xff\n" + lines.encode())
    assert f"{metrics}:1 is not JSON" in refused(str(run))
    metrics.write_text('{"step": 1, "loss": "<b>"}\n' + lines)
    assert "loss is '<b>', expected a finite number" in refused(str(run))
    metrics.write_text("")
    assert "has no step yet" in refused(str(run))
    metrics.write_text(lines)
    assert "error: " in refused(str(run), "--out", str(tmp_path / "no" / "page.html"))
    (run / "config.json").write_text("[]")
    assert "config.json holds a JSON list, expected an object" in refused(str(run))
    for fields, message in (
        ({"mixture": {"a": "x"}, "global_batch_size": 8}, "mixture.a is 'x', expected an integer"),
        ({"mixture": {"a": 1}}, "global_batch_size is missing, expected an integer of at least 1"),
        ({"mixture": {"a": 2**20, "b": 1}, "global_batch_size": 8}, "add up to more than 2^20"),
        ({"mixture": {"a": 1}, "global_batch_size": 2**62}, "is 2^63 rows or more"),
    ):
        (run / "config.json").write_text(json.dumps(fields))
        assert message in refused(str(run))
