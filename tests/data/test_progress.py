from __future__ import annotations

import io

import pytest
from rich.console import Console

from phi_fast.data.preparation import progress
from phi_fast.data.preparation.progress import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("phi_fast.data.preparation.progress.time.monotonic", lambda: now[0])
    return now


def test_rate_and_time_left_count_what_this_run_did(clock: list[float]) -> None:
    meter = Meter("encoding", 100_000_000, Console(quiet=True))
    meter.advance(40_000_000, 9_000_000, before=True)  # from an interrupted run
    clock[0] += 10
    meter.advance(20_000_000, 5_000_000)
    assert meter.status() == "60.0 of 100.0 MB, 2.0 MB/s, 14,000,000 tokens, ETA 0:00:20"
    clock[0] += 30
    meter.advance(40_000_000)
    assert meter.status() == "100.0 of 100.0 MB, 1.5 MB/s, 14,000,000 tokens, 0:00:40"


def test_plain_lines_where_piped(clock: list[float]) -> None:
    output = io.StringIO()
    with Meter("encoding", 30, Console(file=output, width=20)) as meter:
        for _ in range(3):
            clock[0] += progress._LINE_EVERY + 1
            meter.advance(10, 1)
    lines = output.getvalue().splitlines()
    assert len(lines) == 4
    assert all(line.startswith("encoding: 0.0 of 0.0 MB, ") for line in lines)
    assert "ETA 0:00:12" in lines[0]
    assert "\x1b" not in output.getvalue()


def test_a_bar_on_a_terminal() -> None:
    output = io.StringIO()
    with Meter("encoding", 2_000_000, Console(file=output, force_terminal=True, width=100)) as meter:
        meter.advance(1_000_000, 5)
        meter._bar.refresh()
    assert "━" in output.getvalue()
    assert "1.0 of 2.0 MB" in output.getvalue()


def test_an_error_is_not_a_result() -> None:
    output = io.StringIO()
    with pytest.raises(ValueError, match="stop"), Meter("encoding", 2, Console(file=output)):
        raise ValueError("stop")
    assert output.getvalue() == ""
