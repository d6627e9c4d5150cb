"""The benchmarks' machinery: interleaved timing, results files, tables, plots, and the comparison of two runs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import machine, overview, peers, plots, report, summary, tables, timing
from benchmarks.harness import RESULTS, Results, compare
from benchmarks.ops import Op, agree
from benchmarks.subjects import Contender, Row, Subject, kind, spread

ROOT = Path(__file__).parents[1]
HERE = {"device": "A CPU 2 threads", "threads": 2, "cpu_capability": "AVX512", "isa": "avx512", "python": "3.11"}
HERE |= {"versions": {"torch": "2.13.0", "flash-attn": "not installed"}}


@pytest.fixture(autouse=True)
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "describe_machine", lambda: copy.deepcopy(HERE))


def subject(name: str, rows: dict[str, list[float] | None], **extra: Any) -> Subject:
    return Subject(name, {"rows": 8}, [Row(n, s, "" if s else "not installed", dict(extra)) for n, s in rows.items()])


def written(directory: Path, *subjects: Subject) -> Path:
    results = Results(directory)
    for one in subjects:
        results.add(one)
    assert results.path is not None
    return results.path


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    found = compare(
        "x", {"phi_fast": lambda: calls.append("a"), "peer": lambda: calls.append("b")}, config={}, repeats=3, warmup=2
    )
    assert calls == ["a", "b"] * 5  # the untimed first call is one of the two warm-up rounds
    assert [len(row.seconds or []) for row in found.rows] == [3, 3]


def test_a_peer_that_cannot_run_is_a_row_with_its_reason() -> None:
    def fails() -> None:
        raise RuntimeError("no driver\nand more")

    found = compare(
        "x", {"phi_fast": lambda: None, "peer": fails, "absent": "not installed: pip"}, config={}, repeats=1
    )
    assert [row.seconds is None for row in found.rows] == [False, True, True]
    assert found.rows[1].note == "does not run here: RuntimeError: no driver"
    assert found.rows[2].note == "not installed: pip"


def test_this_projects_own_failure_is_not_hidden() -> None:
    def fails() -> None:
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        compare("x", {"phi_fast cpp": fails}, config={}, repeats=1)


def test_a_budget_ends_the_rounds_after_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "timer", lambda where: lambda run: 1.0)
    found = compare("x", {"peer": lambda: None}, config={}, repeats=50, budget=0.0)
    assert len(found.rows[0].seconds or []) == 3


def test_share_of_the_bound_is_by_the_slower_of_copy_and_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"copy": 1.0, "matrix product": 2.0, "phi_fast": 8.0, "peer": 16.0}
    runs = {name: (lambda name=name: name) for name in seconds}
    monkeypatch.setattr(timing, "timer", lambda where: lambda run: seconds[run()])
    found = compare(
        "x",
        {
            "phi_fast": Contender(runs["phi_fast"], moved=400, flops=300),
            "peer": Contender(runs["peer"], moved=400, flops=300),
            "copy": Contender(runs["copy"], moved=100),
            "matrix product": Contender(runs["matrix product"], flops=100),
        },
        config={},
        repeats=2,
    )
    rows = {row.name: row for row in found.rows}
    assert rows["phi_fast"].of_bound == 6 / 8  # the copy allows 4 s, the product 6 s
    assert rows["peer"].of_bound == 6 / 16
    assert rows["copy"].of_bound is None


def test_kinds_and_spread() -> None:
    assert [kind(n) for n in ("phi_fast cpp", "torch eager", "copy", "matrix products and SDPA alone")] == [
        "ours",
        "peer",
        "bound",
        "bound",
    ]
    assert spread([1.0]) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(2 / 3)  # one outlier does not count


def test_events_enclose_the_run_after_the_cache_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 5.0  # ms

    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    sizes: list[int] = []

    def empty(size: int, **_: object) -> SimpleNamespace:
        sizes.append(size)
        return SimpleNamespace(zero_=lambda: log.append("flush"))

    monkeypatch.setattr(torch, "empty", empty)
    measure = timing.timer(torch.device("cuda"))
    assert measure(lambda: log.append("run")) == 0.005
    assert log == ["synchronize", "flush", "event", "run", "event", "wait"]
    assert sizes[0] >= 2 * properties.L2_cache_size


def test_each_subject_is_on_disk_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(subject("a", {"phi_fast": [1.0]}))
    first = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [s["name"] for s in first["subjects"]] == ["a"]
    results.add(subject("b", {"phi_fast": [1.0]}))
    results.add(subject("a", {"phi_fast": [2.0]}))
    (file,) = tmp_path.iterdir()  # no partial file is left
    document = json.loads(file.read_text())
    assert [(s["name"], s["rows"][0]["seconds"]) for s in document["subjects"]] == [("b", [1.0]), ("a", [2.0])]
    assert document["machine"] == HERE
    assert all(s["commit"] and s["measured"] for s in document["subjects"])


def test_other_versions_are_not_mixed_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(tmp_path, subject("a", {"phi_fast": [1.0]}))
    newer = HERE | {"versions": {"torch": "2.14.0"}}
    monkeypatch.setattr(machine, "describe_machine", lambda: newer)
    after = written(tmp_path, subject("a", {"phi_fast": [2.0]}))
    assert after.name == f"{before.stem}-2.json"
    assert json.loads(before.read_text())["subjects"][0]["rows"][0]["seconds"] == [1.0]


def test_nothing_is_written_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = Results()
    results.add(subject("a", {"phi_fast": [1.0]}))
    assert results.path is None
    assert not list(tmp_path.iterdir())


def test_cells_name_what_was_not_measured() -> None:
    document = {
        "rows": [
            {"name": "phi_fast", "seconds": [0.002, 0.002, 0.004], "note": "", "extra": {"GB/s": 3}, "of_bound": 0.8},
            {"name": "peer", "seconds": [0.004, 0.002, 0.008], "note": "", "extra": {}, "of_bound": 0.4},
            {"name": "absent", "seconds": None, "note": "not installed", "extra": {}, "of_bound": None},
        ]
    }
    header, body = tables.cells(document)
    assert header == ["", "median ms", "spread", "× phi_fast", "of bound", "GB/s", "note"]
    assert body[0] == ["phi_fast", "2.00", "50%", "1.00", "80%", "3", ""]
    assert body[1][3] == "2.00"  # repeat by repeat: 2, 1, 2; the medians' ratio is 2 as well, the means' is not
    assert body[2] == ["absent", "not measured", "", "", "", "", "not installed"]


def results_file(folder: Path, name: str, day: str, subjects: dict[str, float], **extra: Any) -> None:
    rows = [Row("phi_fast", [1.0]), Row("peer", [2.0])]
    measured = {"measured": f"{day}T10:00:00", "commit": name}
    found = [asdict(Subject(s, {}, [Row("phi_fast", [ms / 1000]), *rows[1:]])) | measured for s, ms in subjects.items()]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-{day}.json").write_text(json.dumps({"machine": HERE, "subjects": found, **extra}))


WHOLE = {"rotary, fp32, forward": 10.0, "adam, fp32": 20.0}


def in_short(root: Path) -> str:
    """The summary of docs/benchmarks.md."""
    text = (root / "docs" / "benchmarks.md").read_text()
    return text[text.index("## In short") :].split("\n## ")[0]


def test_a_part_never_replaces_a_whole_measurement(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, arguments = root / "results", ["--results", str(root / "results"), "--root", str(root)]
    results_file(results, "part", "2026-11-20", {"rotary, fp32, forward": 1.0}, whole=False)
    assert report.main(arguments) == 0
    assert "forward 1.0 ms" in in_short(root), "of a device without a whole one the part is shown"
    said = "part-2026-11-20 has only a part of the benchmarks: in the summary, since its device has no other"
    assert said in capsys.readouterr().out

    results_file(results, "old", "2026-11-21", WHOLE)  # of before the mark
    results_file(results, "part", "2026-11-25", {"rotary, fp32, forward": 3.0}, whole=False)
    assert report.main(arguments) == 0
    shown = in_short(root)
    assert "commit old" in shown and "forward 10.0 ms" in shown and "| adam | 20.0 ms" in shown
    assert "forward 3.0" not in shown
    assert "| phi_fast | 3.00 |" in (root / "docs" / "benchmarks.md").read_text()
    assert "part-2026-11-25 has only a part of the benchmarks: not in the summary" in capsys.readouterr().out

    results_file(results, "new", "2026-11-26", WHOLE | {"adam, fp32": 30.0}, whole=True)
    assert report.main(arguments) == 0
    shown = in_short(root)
    assert "commit new" in shown and "| adam | 30.0 ms" in shown


def test_a_file_is_whole_once_a_session_has_measured_all(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(subject("a", {"phi_fast": [1.0]}))
    assert results.path is not None
    assert json.loads(results.path.read_text())["whole"] is False
    results.finish()
    assert json.loads(results.path.read_text())["whole"] is True
    Results(tmp_path).add(subject("a", {"phi_fast": [2.0]}))  # a part of the same day, machine and versions
    document = json.loads(results.path.read_text())
    assert document["whole"] is True and document["subjects"][0]["rows"][0]["seconds"] == [2.0]


@pytest.mark.parametrize(
    ("arguments", "ends_whole"),
    [
        ([], True),
        (["test_one.py::test_one", "test_two.py"], False),
        *(pytest.param(words, False, marks=pytest.mark.slow) for words in (["-k", "one"], ["test_one.py"])),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_session_prints_its_tables_and_knows_whether_it_was_whole(
    tmp_path: Path, arguments: list[str], ends_whole: bool
) -> None:
    """The real conftest.py beside two benchmarks that take no time."""
    shutil.copy(Path(report.__file__).parent / "conftest.py", tmp_path)
    for name in ("one", "two"):
        row = f"Subject('{name}', {{}}, [Row('phi_fast', [0.001])])"
        text = f"from benchmarks.subjects import Row, Subject\ndef test_{name}(results): results.add({row})\n"
        (tmp_path / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark", "--results", "out", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("*.json")
    assert json.loads(file.read_text())["whole"] is ends_whole
    assert "one: " in done.stdout and "median ms" in done.stdout and "phi_fast" in done.stdout
    assert f"wrote out/{file.name}; python -m benchmarks.report" in done.stdout
    assert ("two: " in done.stdout) == (not arguments or (len(arguments) == 2 and arguments[0] != "-k"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a README that has the markers."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def test_report_writes_tables_and_plots_and_nothing_else_of_the_readme(root: Path) -> None:
    results = root / "results"
    step = subject("training step, phi-small, bf16", {"phi_fast": [0.1, 0.1], "transformers eager": [0.2, 0.3]})
    kernel = subject("rotary, fp32, forward", {"phi_fast cpp": [0.01], "torch eager": [0.03], "Liger-Kernel": None})
    path = written(results, step, kernel, subject("token loader, cold", {"phi_fast": [0.5]}))
    arguments = ["--results", str(results), "--root", str(root)]
    assert report.main(arguments) == 0
    readme, shown = (root / "README.md").read_text(), in_short(root)
    assert readme.startswith(f"before\n\n{report.BEGIN}\n![")
    assert readme.endswith(f"{report.END}\nafter\n")
    assert "(docs/plots/overview.png)" in readme
    assert (root / "docs" / "plots" / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert "| training step, phi-small, bf16 | 100.0 | 0 | transformers eager 2.50× |" in shown
    assert "| rotary | forward 10.0 ms, torch eager 3.00× |" in shown
    assert "old" not in readme
    assert "token loader" not in shown
    docs = (root / "docs" / "benchmarks.md").read_text()
    assert "| Liger-Kernel | not measured |" in docs
    for name in ("training-step", "rotary", "token-loader"):
        plot = root / "docs" / "plots" / path.stem / f"{name}.png"
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"(plots/{path.stem}/{name}.png)" in docs
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    assert report.main(arguments) == 0
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before


def figure_and_unit(name: str, row: dict[str, Any]) -> tuple[float, str]:
    """What the subject's name promises, from its row, and the unit that must be said."""
    if "memory" in name:
        return row["extra"]["peak MB"], "MB"
    if "share" in name:
        return float(row["extra"]["waiting for data"].rstrip("%")), "%"
    return float(np.median(row["seconds"])) * 1000, "ms"


COMMITTED = report.benchmark_files(RESULTS)
NEWEST = max(COMMITTED, key=lambda path: path.stem[-10:])


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[] if path == NEWEST else [pytest.mark.slow], id=path.stem) for path in COMMITTED]
)
def test_every_committed_plot_draws_what_its_name_says(path: Path) -> None:
    document = report.read(path)
    figures = plots.figures(document)
    panels = {axis.get_title(loc="left"): (axis, figure) for figure in figures.values() for axis in figure.axes}
    for subject in document["subjects"]:
        rows = [row for row in subject["rows"] if row["seconds"]]
        axis, figure = panels.pop(subject["name"])
        assert [label.get_text() for label in axis.get_yticklabels()] == [row["name"] for row in rows]
        expected, units = zip(*(figure_and_unit(subject["name"], row) for row in rows), strict=True)
        assert [bar.get_width() for bar in axis.patches] == pytest.approx(expected)
        assert [float(text.get_text().replace(",", "")) for text in axis.texts] == pytest.approx(expected, rel=0.006)
        caption = figure.get_supxlabel()
        assert caption.startswith(units[0]), subject["name"]
        assert document["machine"]["device"] in caption
    assert not panels
    for name, figure in figures.items():
        figure.canvas.draw()
        for axis in figure.axes:
            for text in (axis.title, axis._left_title, *axis.texts, *axis.get_yticklabels(), figure._supxlabel):
                box = text.get_window_extent()
                assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, (name, text.get_text())
        committed = ROOT / "docs" / "plots" / path.stem / plots.file_name(name)
        assert committed.is_file()


def test_the_picture_draws_the_committed_figures() -> None:
    """The loss of every step, and each row's time over phi_fast's, of the newest results."""
    document = report.read(NEWEST)
    drawn = overview.figure(RESULTS, document)
    curve, bars = drawn.axes
    lines = [json.loads(line) for line in (RESULTS / overview.CURVE).read_text().splitlines()]
    steps, losses = zip(*((line["step"], line["loss"]) for line in lines if "loss" in line), strict=True)
    assert list(curve.lines[0].get_xdata()) == list(steps) == list(range(1, 341))
    assert list(curve.lines[0].get_ydata()) == list(losses)
    assert curve.lines[1].get_ydata()[99] == pytest.approx(np.mean(losses[90:100]))
    validated = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    assert list(zip(*curve.lines[2].get_data(), strict=True)) == validated
    expected = {}
    for found in document["subjects"]:
        for row in found["rows"]:
            if found["name"].startswith("training step, phi-small") and row["seconds"] and "alone" not in row["name"]:
                ratios = np.array(row["seconds"]) / np.array(found["rows"][0]["seconds"])
                expected[f"{row['name']}, {found['name'].split(', ')[2]}"] = float(np.median(ratios))
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert dict(zip(labels, (bar.get_width() for bar in bars.patches), strict=True)) == pytest.approx(expected)
    drawn.canvas.draw()
    for text in (curve._left_title, bars._left_title, *bars.get_yticklabels(), *bars.texts, bars.xaxis.label):
        box = text.get_window_extent()
        assert drawn.bbox.x0 <= box.x0 <= box.x1 <= drawn.bbox.x1, text.get_text()


def test_the_summary_begins_with_what_was_measured_last(root: Path) -> None:
    results, files = root / "results", []
    for device, day in (("first", "2026-11-24"), ("last", "2026-11-26"), ("middle", "2026-11-25")):
        path = written(root / device, subject(f"training step, {device}, fp32", {"phi_fast": [0.1], "peer": [0.2]}))
        document = json.loads(path.read_text())
        document["machine"]["device"] = device
        document["subjects"][0] |= {"measured": f"{day}T10:00:00", "commit": f"c-{device}"}
        files.append(results / f"{device}-{day}.json")
        results.mkdir(exist_ok=True)
        files[-1].write_text(json.dumps(document))
    assert report.main(["--results", str(results), "--root", str(root)]) == 0
    shown = in_short(root)
    places = [shown.index(f"step, {device}, fp32") for device in ("last", "middle", "first")]
    assert places == sorted(places)
    assert "Measured on 2026-11-26, commit c-last, on last (" in shown


def test_report_reads_results_of_before_there_were_bounds(root: Path) -> None:
    results = root / "results"
    path = written(results, subject("training step, phi-tiny, fp32", {"phi_fast": [0.1], "peer": [0.2]}))
    document = json.loads(path.read_text())
    del document["machine"]["isa"]
    for row in document["subjects"][0]["rows"]:
        del row["moved"], row["flops"], row["of_bound"]
    path.write_text(json.dumps(document))
    assert report.main(["--results", str(results), "--root", str(root)]) == 0
    assert "peer 2.00×" in in_short(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "has no machine and subjects")],
)
def test_a_file_that_is_no_result_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert report.main(["--compare", str(path), str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_report_without_results_or_markers_is_an_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--results", str(root / "none"), "--root", str(root)]) == 2
    assert "make bench" in capsys.readouterr().err
    written(root / "results", subject("a", {"phi_fast": [1.0]}))
    (root / "README.md").write_text("no markers")
    assert report.main(["--results", str(root / "results"), "--root", str(root)]) == 2
    assert (root / "README.md").read_text() == "no markers"


def compared(tmp_path: Path, before: dict, after: dict) -> int:
    old = written(tmp_path / "old", subject("rotary, fp32", before))
    new = written(tmp_path / "new", subject("rotary, fp32", after))
    return report.main(["--compare", str(old), str(new)])


def test_slower_beyond_the_scatter_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, {"phi_fast": [1.0, 1.01, 0.99]}, {"phi_fast": [1.2, 1.21, 1.19]}) == 1
    output = capsys.readouterr().out
    assert "1.20" in output
    assert "1 rows in both: 1 slower, 0 faster, 0 the same" in output


def test_within_the_scatter_or_faster_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = {"phi_fast": [0.5, 1.0, 1.5, 2.0], "peer": [1.0, 1.0]}
    assert compared(tmp_path, noisy, {"phi_fast": [1.6, 1.5, 1.4, 1.5], "peer": [0.5, 0.5]}) == 0
    assert "2 rows in both: 0 slower, 1 faster, 1 the same" in capsys.readouterr().out


def test_rows_of_one_file_alone_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        compared(tmp_path, {"phi_fast": [1.0], "litgpt": [1.0]}, {"phi_fast": [1.0], "litgpt": None, "x": [1.0]}) == 0
    )
    output = capsys.readouterr().out
    assert "only before: rotary, fp32: litgpt" in output
    assert "only after: rotary, fp32: x" in output


def test_peers_that_are_not_there_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert all((peers.absent(name) or "").startswith("not installed: ") for name in peers.INSTALL)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers.absent("litgpt") is None
    assert "needs a GPU" in (peers.absent("liger_kernel") or "")


def test_back_ends_on_a_cpu_are_those_that_run_there() -> None:
    cpu = torch.device("cpu")
    assert peers.backends("rotary", cpu) == {"phi_fast cpp": "cpp"}
    attention = peers.backends("attention", cpu)
    assert attention["sdpa through phi_fast"] == "sdpa"
    assert not {"triton", "reference", "flash-attn", "apex"} & {*attention.values()}


def test_contenders_that_disagree_are_refused() -> None:
    x = torch.ones(4, requires_grad=True)
    agree({"phi_fast": lambda: 2 * x, "peer": lambda: x + x}, torch.float32)
    with pytest.raises(AssertionError, match="peer differs from the first contender by 5"):
        agree({"phi_fast": lambda: 2 * x, "peer": lambda: 3 * x}, torch.float32)


def test_a_backward_runs_again_and_again_on_one_graph() -> None:
    x = torch.ones(4, requires_grad=True)
    records: list[int] = []

    def run() -> torch.Tensor:
        records.append(1)
        return x * x

    again = Op(run, [x]).backward(torch.ones(4))
    for _ in range(3):
        (gradient,) = again()
        assert torch.equal(gradient, torch.full((4,), 2.0))
    assert records == [1]


def test_the_summary_takes_the_fastest_peer() -> None:
    rows = {"phi_fast cpp": [1.0], "phi_fast, in place": [0.1], "slow": [9.0], "quick": [2.0], "copy": [0.5]}
    one = {"name": "rotary, bf16, backward", "config": {}, "rows": []}
    one["rows"] = [{"name": n, "seconds": s, "note": "", "extra": {}, "of_bound": None} for n, s in rows.items()]
    assert "backward 1000.0 ms, quick 2.00×" in summary.tables({"subjects": [one]})
