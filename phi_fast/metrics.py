"""What a run writes and shows: metrics.jsonl, TensorBoard, and a line or a progress bar a step."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .files import write_atomically, writing

PEAK_FLOPS = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense 16-bit tensor-core FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first match counts."""


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl."""

    step: int
    """Optimizer steps taken, this one included."""
    tokens: int
    """Tokens seen by all ranks so far."""
    loss: float
    """Mean cross entropy over the global batch, in nats a token."""
    lr: float
    grad_norm: float | None
    """Global gradient norm before clipping; null where it overflowed and the step was skipped."""
    loss_scale: float
    """The scale that this step's gradients carried; 1 unless fp16."""
    skipped: bool
    """True where a gradient overflowed, or --skip-spikes left the step out, and nothing was updated."""
    tokens_per_s: float
    step_ms: float
    mfu: float | None
    """Share of the device's peak, attention counted in full (PaLM's convention); null where the peak is not known."""
    val_loss: float | None = None
    """Mean cross entropy over the validation rows of all corpora, by the mixture's weights; null where not measured."""
    val_losses: dict[str, float] | None = None
    """The same by corpus."""
    tasks: dict[str, float] | None = None
    """Accuracy by task, a fraction of 1; null where not measured (--eval-every)."""


def peak_flops(device: torch.device) -> float | None:
    """16-bit FLOP/s of the device's data sheet, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard in a run directory; only rank 0 has one.

    Raises UsageError where they cannot be written.
    """

    def __init__(self, run: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "metrics.jsonl"
        with self._writing():
            _drop_after(self._path, resume_step)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._path, "make room, and go on from the newest checkpoint with --resume")

    def write(self, record: StepRecord) -> None:
        with self._writing():
            self._write(record)

    def _write(self, record: StepRecord) -> None:
        fields = asdict(record)
        groups = {name: fields.pop(name) for name in ("val_losses", "tasks")}
        line = {key: value for key, value in fields.items() if key != "val_loss" or value is not None}
        line |= {name: group for name, group in groups.items() if group is not None}
        self._file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")
        self._file.flush()
        for key, value in fields.items():
            if value is not None and key not in ("step", "tokens"):
                self._board.add_scalar(key, float(value), record.step)
        for name, prefix in (("val_losses", "val_loss"), ("tasks", "tasks")):
            for member, value in (groups[name] or {}).items():
                self._board.add_scalar(f"{prefix}/{member}", value, record.step)

    def text(self, tag: str, text: str, step: int) -> None:
        self._board.add_text(tag, text, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _finite(value: object) -> object:
    """JSON has no NaN: it is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    """Drop the lines after `step`: steps that a killed run took after its last checkpoint are taken again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break  # a line cut short by a kill is the last one
    write_atomically(path, "".join(kept).encode())


class Display:
    """Shows steps: a progress bar on a terminal, plain lines elsewhere, nothing on other ranks."""

    def __init__(self, console: Console, steps: int, done: int, every: int) -> None:
        self._console = console
        self._steps, self._every = steps, every
        self._width = len(str(steps))
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self._task = self._progress.add_task("", total=steps, completed=done, status="")

    def __enter__(self) -> Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def step(self, record: StepRecord, seconds_left: float) -> None:
        status = _status(record)
        measured = record.val_loss is not None or record.tasks is not None
        if self._progress:
            self._progress.update(self._task, completed=record.step, status=status)
            if not measured:
                return
        if record.step % self._every == 0 or measured or record.step in (1, self._steps) or record.skipped:
            eta = "" if self._progress else f" | eta {_duration(seconds_left)}"
            self.line(f"step {record.step:>{self._width}}/{self._steps} | {status}{eta}")

    def line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _status(record: StepRecord) -> str:
    parts = [f"loss {record.loss:.4f}"]
    if record.val_loss is not None:
        parts.append(f"val {record.val_loss:.4f}")
    parts += [f"{task} {100 * score:.1f}%" for task, score in (record.tasks or {}).items()]
    parts.append(f"lr {record.lr:.2e}")
    parts.append("overflow, skipped" if record.grad_norm is None else f"norm {record.grad_norm:.3f}")
    if record.skipped and record.grad_norm is not None:
        parts.append("spike, skipped")
    if record.loss_scale != 1:
        parts.append(f"scale {record.loss_scale:g}")
    parts.append(f"{record.tokens_per_s:,.0f} tok/s")
    parts.append(f"{record.step_ms:.0f} ms")
    if record.mfu is not None:
        parts.append(f"mfu {100 * record.mfu:.1f}%")
    return " | ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
