"""The live line, the plain lines and the summary of a run."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
import tyro
from rich.console import Console
from step_records import at

from phi_fast import report
from phi_fast.convert import ConvertOptions
from phi_fast.generate import GenerateOptions
from phi_fast.training.display import Display, back_ends, show
from phi_fast.training.metrics import StepRecord


def shown(records: list[StepRecord], *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160)
    with Display(console, steps=100, done=0, every=10) as display:
        for record in records:
            display.step(record, seconds_left=75.0)
    return stream.getvalue()


def test_plain_lines_in_a_pipe() -> None:
    output = shown(
        [at(step) for step in range(1, 21)] + [at(21, grad_norm=None, skipped=True, loss_scale=512.0)], terminal=False
    )
    assert output.splitlines() == [
        "step   1/100 | loss 9.0100 | lr 1.00e-03 | norm 2.500 | 4,000 tok/s | 512 ms | eta 1:15",
        "step  10/100 | loss 9.0100 | lr 1.00e-03 | norm 2.500 | 4,000 tok/s | 512 ms | eta 1:15",
        "step  20/100 | loss 9.0100 | lr 1.00e-03 | norm 2.500 | 4,000 tok/s | 512 ms | eta 1:15",
        "step  21/100 | loss 9.0100 | lr 1.00e-03 | overflow, skipped | scale 512 | 4,000 tok/s | 512 ms | eta 1:15",
    ]


def test_a_bar_on_a_terminal() -> None:
    output = shown([at(step) for step in range(1, 21)] + [at(21, val_loss=8.25)], terminal=True)
    assert "21/100" in output
    assert "val 8.2500" in output
    assert output.count("step  20/100 |") == 0  # in the bar, not as a line


def live_line(width: int, record: StepRecord) -> str:
    """Return the terminal's line after `record`, step 3 of 20000."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    display = Display(console, steps=20000, done=0, every=10)
    display.step(record, seconds_left=3675.0)
    console.print(display._line())
    return stream.getvalue().rstrip("\n")


@pytest.mark.parametrize(
    ("width", "status"),
    [
        (40, "loss 9.0100 | 1:01:15"),
        (50, "loss 9.0100 | 1:01:15"),
        (60, "loss 9.0100 | 4,000 tok/s | 1:01:15"),
        (80, "loss 9.0100 | norm 2.500 | 4,000 tok/s | 1:01:15"),
        (120, "loss 9.0100 | lr 1.00e-03 | norm 2.500 | 4,000 tok/s | 512 ms | 1:01:15"),
    ],
)
def test_a_narrow_terminal_loses_the_least_important_parts_first(width: int, status: str) -> None:
    line = live_line(width, at(3))
    assert line.startswith("step     3/20000 ")
    assert line.rstrip().endswith(f" {status}")
    assert "…" not in line and len(line) <= width


def test_what_happened_to_a_step_outlives_its_figures() -> None:
    assert "overflow, skipped | " in live_line(70, at(3, grad_norm=None, skipped=True, loss_scale=512.0))
    assert "spike, skipped | " in live_line(70, at(3, skipped=True))


def test_the_rate_is_smoothed_and_the_records_are_not_touched() -> None:
    """After a step at a tenth of the speed, the rate is the 0.9-weighted tokens ÷ the 0.9-weighted seconds."""
    display = Display(Console(file=io.StringIO()), steps=100, done=0, every=10)
    for step in range(1, 51):
        display.step(at(step, tokens_per_s=1000.0, step_ms=1000.0), 0.0)
    display.step(at(51, tokens_per_s=100.0, step_ms=10000.0), 0.0)
    weight = sum(0.9**i for i in range(1, 51))
    expected = 1000 * (weight + 1) / (weight + 10)
    assert display._parts["rate"] == f"{expected:,.0f} tok/s"


def test_the_summary_has_time_speed_validation_and_commands_that_a_shell_takes() -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream, width=40), steps=3, done=0, every=10)
    display.validation_before(9.5)
    for step, rate in enumerate((10.0, 3000.0, 2000.0), 1):
        display.step(at(step, tokens_per_s=rate, val_loss=8.0 if step == 3 else None), 0.0)
    run = Path("runs/a b[/]")
    display.summary(run / "checkpoints" / "step-3", run)
    lines = stream.getvalue().splitlines()
    assert "   speed  2,000 tokens/s, median of 3 steps" in lines
    assert "val loss  9.5000 → 8.0000 nats per token" in lines
    assert "   saved  runs/a b[/]/checkpoints/step-3" in lines
    assert lines[-2:] == [
        "  python -m phi_fast.report 'runs/a b[/]'",
        "  python -m phi_fast.convert 'runs/a b[/]' 'runs/a b[/]-hf'",
    ]


def test_the_commands_of_the_summary_are_accepted() -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream), steps=1, done=0, every=1)
    display.summary(Path("x"), Path("runs/tiny"))
    generate, reports, convert = (shlex.split(line)[3:] for line in stream.getvalue().splitlines()[-3:])
    assert tyro.cli(GenerateOptions, args=generate).model == "runs/tiny"
    assert report.parse(reports).runs == (Path("runs/tiny"),)
    assert tyro.cli(ConvertOptions, args=convert).out == Path("runs/tiny-hf")


def test_back_ends_in_few_words() -> None:
    assert back_ends({"rotary": "cpp", "adam": "cpp"}) == "all cpp"
    assert back_ends({"adam": "cpp"}) == "adam cpp"
    assert back_ends({"rotary": "cpp", "attention": "sdpa", "adam": "cpp"}) == "rotary, adam cpp; attention sdpa"


def test_the_header_goes_on_under_its_beginning_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=30, color_system=None, soft_wrap=True)
    show(console, {"data": "docs 80%, code 20% of it all"})
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines == ["    data  docs 80%, code 20%", "          of it all"]
