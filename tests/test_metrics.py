"""metrics.jsonl, TensorBoard and the lines on the screen."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phi_fast.errors import UsageError
from phi_fast.metrics import Display, MetricsLog, StepRecord, peak_flops

RECORD = StepRecord(
    step=1,
    tokens=2048,
    loss=9.01,
    lr=1e-3,
    grad_norm=2.5,
    loss_scale=1.0,
    skipped=False,
    tokens_per_s=4000.4,
    step_ms=512.1,
    mfu=None,
)


def at(step: int, **changes: object) -> StepRecord:
    return dataclasses.replace(RECORD, step=step, **changes)


def steps_in(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(at(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')  # killed while it wrote
    log = MetricsLog(tmp_path, 3)
    log.write(at(4, loss=1.0))
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(at(1, loss=float("nan"), grad_norm=None, skipped=True))
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["skipped"] is True


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(UsageError, match=r"metrics\.jsonl cannot be written \(No space left on device\): make room"):
        log.write(at(1))


def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(at(1, val_loss=8.5, val_losses={"docs": 8.4, "code": 8.9}))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr", "grad_norm", "loss_scale", "tokens_per_s", "val_loss", "val_loss/docs"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Scalars("val_loss/code")[0].value == pytest.approx(8.9)


def show(records: list[StepRecord], *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160)
    with Display(console, steps=100, done=0, every=10) as display:
        for record in records:
            display.step(record, seconds_left=75.0)
    return stream.getvalue()


def test_plain_lines_in_a_pipe() -> None:
    output = show(
        [at(step) for step in range(1, 21)] + [at(21, grad_norm=None, skipped=True, loss_scale=512.0)], terminal=False
    )
    assert output.splitlines() == [
        "step   1/100 | loss 9.0100 | lr 1.00e-03 | norm 2.500 | 4,000 tok/s | 512 ms | eta 1:15",
        "step  10/100 | loss 9.0100 | lr 1.00e-03 | norm 2.500 | 4,000 tok/s | 512 ms | eta 1:15",
        "step  20/100 | loss 9.0100 | lr 1.00e-03 | norm 2.500 | 4,000 tok/s | 512 ms | eta 1:15",
        "step  21/100 | loss 9.0100 | lr 1.00e-03 | overflow, skipped | scale 512 | 4,000 tok/s | 512 ms | eta 1:15",
    ]


def test_a_bar_on_a_terminal() -> None:
    output = show([at(step) for step in range(1, 21)] + [at(21, val_loss=8.25)], terminal=True)
    assert "21/100" in output
    assert "val 8.2500" in output
    assert output.count("step  20/100 |") == 0  # in the bar, not as a line


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Other", None),
    ],
)
def test_mfu_needs_a_known_peak(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None
