"""Every reader of metrics.jsonl names a bad line and leaves out only a last line that was cut short."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from phi_fast.errors import UsageError
from phi_fast.reporting.read import read_runs
from phi_fast.step_records import read_records
from phi_fast.training.metrics import MetricsLog

GOOD = {"step": 1, "tokens": 8, "loss": 3.5, "skipped": False, "val_loss": None, "val_losses": {"a": 3.0, "b": None}}
BAD = {
    "step missing": ('{"loss": 3.0}', "step is missing, expected an integer of at least 0"),
    "step a flag": ('{"step": true}', "step is True, expected an integer"),
    "step a fraction": ('{"step": 1.5}', "step is 1.5, expected an integer"),
    "step below 0": ('{"step": -1}', "step is -1, expected an integer of at least 0"),
    "loss a text": ('{"step": 1, "loss": "x"}', "loss is 'x', expected a finite number"),
    "loss a flag": ('{"step": 1, "loss": true}', "loss is True, expected a finite number"),
    "loss without end": ('{"step": 1, "loss": 1e400}', "loss is inf, expected a finite number"),
    "loss not finite": ('{"step": 1, "loss": NaN}', "NaN is not JSON"),
    "skipped a number": ('{"step": 1, "skipped": 1}', "skipped is 1, expected true or false"),
    "tokens a text": ('{"step": 1, "tokens": "8"}', "tokens is '8', expected an integer"),
    "group a number": ('{"step": 1, "val_losses": 3.0}', "val_losses is 3.0, expected an object"),
    "group of texts": ('{"step": 1, "val_losses": {"a": "x"}}', "val_losses.a is 'x', expected a finite number"),
    "group of groups": ('{"step": 1, "tasks": {"a": {}}}', "tasks.a is {}, expected a finite number"),
    "no object": ("[1]", "holds a JSON list, expected an object"),
    "no JSON": ("{", "is not JSON"),
    "binary": ("\0\ufffd", "is not JSON"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "records": lambda run: read_records(run / "metrics.jsonl"),
    "report": lambda run: read_runs([run]),
    "resume": lambda run: MetricsLog(run, 3),
}


def make(run: Path, *lines: str, end: str = "\n") -> Path:
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")
    return run


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [1, 3])
def test_a_line_that_is_no_record_is_named_wherever_it_stands(
    tmp_path: Path, reader: str, bad: str, place: int
) -> None:
    line, message = BAD[bad]
    good = json.dumps(GOOD)
    run = make(tmp_path, *([line, good, good] if place == 1 else [good, good, line]))
    with pytest.raises(UsageError) as caught:
        READERS[reader](run)
    assert f"metrics.jsonl:{place}" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("reader", ["records", "report"])
def test_blank_lines_are_passed_over_and_a_torn_last_line_is_left_out(tmp_path: Path, reader: str) -> None:
    run = make(tmp_path, json.dumps(GOOD), "", json.dumps({"step": 2}), '{"step": 3, "lo', end="")
    found = READERS[reader](run)
    records = found if reader == "records" else found[0].records  # type: ignore[index]
    assert records == [GOOD, {"step": 2}]


def test_a_whole_last_line_without_its_line_feed_is_a_record_or_an_error(tmp_path: Path) -> None:
    assert read_records(make(tmp_path, json.dumps(GOOD), end="") / "metrics.jsonl") == [GOOD]
    with pytest.raises(UsageError, match="step is missing"):
        read_records(make(tmp_path, json.dumps(GOOD), '{"loss": 3.0}', end="") / "metrics.jsonl")
