"""The output of a run: a live line on a terminal, plain lines elsewhere, and the summary at the end."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .metrics import StepRecord

SMOOTHING = 0.9
"""Decay per step of the exponential average of tokens/s."""
BAR_WIDTH = 6
"""Least width of the progress bar, in columns; other parts of the line are dropped to make room for it."""
DROPPED_FIRST = ("ms", "lr", "norm", "scale", "mfu", "tasks", "rate", "bpb", "ema", "val")
"""Parts of the live line in the order in which a narrow terminal drops them; step, loss and ETA always stay."""


class Display:
    """Shows steps: a live line with a bar on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, console: Console, steps: int, done: int, every: int) -> None:
        self._console = console
        self._steps, self._done, self._every = steps, done, every
        self._width = len(str(steps))
        self._started = time.perf_counter()
        self._rates: list[float] = []
        self._recent = (0.0, 0.0)
        """Tokens and seconds of the steps so far, each step weighted by SMOOTHING ** (steps since)."""
        self._first_validation: float | None = None
        self._validation: float | None = None
        self._bits_per_byte: float | None = None
        self._parts: dict[str, str] = {"loss": "the first step has begun"}
        self._eta = ""
        self._live = Live(console=console, get_renderable=self._line) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def validation_before(self, val_loss: float, val_bpb: float | None = None) -> None:
        """Show the validation loss before the first step."""
        self._first_validation = self._validation = val_loss
        self.line(" | ".join(["before training", *_validation(val_loss, val_bpb).values()]))

    def step(self, record: StepRecord, seconds_left: float) -> None:
        self._rates.append(record.tokens_per_s)
        if record.val_loss is not None:
            self._validation, self._bits_per_byte = record.val_loss, record.val_bpb
        self._done, self._eta = record.step, _duration(seconds_left)
        self._parts = _parts(record, self._smoothed(record))
        measured = record.val_loss is not None or record.tasks is not None
        if self._live and not measured:
            return
        if record.step % self._every == 0 or measured or record.step in (1, self._steps) or record.skipped:
            parts = [*self._parts.values(), *([] if self._live else [f"eta {self._eta}"])]
            self.line(f"step {record.step:>{self._width}}/{self._steps} | {' | '.join(parts)}")

    def line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def summary(self, saved: Path | None, run: Path) -> None:
        """Print time, speed and validation loss of this start, and the commands to use the run with."""
        facts = {"took": _duration(time.perf_counter() - self._started)}
        if self._rates:
            facts["speed"] = f"{statistics.median(self._rates):,.0f} tokens/s, median of {len(self._rates):,} steps"
        if self._validation is not None:
            first = "" if self._first_validation is None else f"{self._first_validation:.4f} → "
            bits = "" if self._bits_per_byte is None else f", {self._bits_per_byte:.4f} bits per byte"
            facts["val loss"] = f"{first}{self._validation:.4f} nats per token{bits}"
        facts["saved"] = str(saved)
        show(self._console, facts)
        self._console.print()
        name = _quoted(run)
        self.line("try it, look at its curves, or take it to transformers:")
        self.line(f'  python -m phi_fast.generate --model {name} --prompt "The module"')
        self.line(f"  python -m phi_fast.report {name}")
        self.line(f"  python -m phi_fast.convert {name} {_quoted(run.with_name(run.name + '-hf'))}")

    def _smoothed(self, record: StepRecord) -> float:
        """Average tokens/s over about the last 1 / (1 - SMOOTHING) steps."""
        seconds = record.step_ms / 1000
        tokens_before, seconds_before = self._recent
        self._recent = (
            SMOOTHING * tokens_before + record.tokens_per_s * seconds,
            SMOOTHING * seconds_before + seconds,
        )
        return self._recent[0] / self._recent[1]

    def _line(self) -> Table:
        """Lay out the live line for the terminal's present width."""
        step = f"step {self._done:>{self._width}}/{self._steps}"
        parts = fitting(self._parts, self._console.width - cell_len(f"{step}  | {self._eta}") - BAR_WIDTH)
        status = " | ".join([*parts, *([self._eta] if self._eta else [])])
        room = self._console.width - cell_len(f"{step}  {status}")
        grid = Table.grid(padding=(0, 1, 0, 0))
        cells = [Text(step, style="bold"), Text(status)]
        if room >= BAR_WIDTH:
            cells.insert(1, ProgressBar(total=self._steps, completed=self._done, width=room))  # type: ignore[arg-type]
        for _ in cells:
            grid.add_column(no_wrap=True, overflow="crop")
        grid.add_row(*cells)
        return grid


def show(console: Console, facts: Mapping[str, str]) -> None:
    """Print one line per fact: its name in bold, then its text, which on a terminal wraps with a hanging indent."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", style="bold", no_wrap=True, min_width=8)
    grid.add_column(overflow="fold")
    for name, text in facts.items():
        if console.is_terminal:
            grid.add_row(name, text)
        else:
            console.print(Text.assemble((f"{name:>8}", "bold"), f"  {text}"), soft_wrap=True)
    if console.is_terminal:
        console.print(grid, soft_wrap=False)


def back_ends(used: Mapping[str, str]) -> str:
    """Summarise op -> back end: "all cpp", or the ops by back end."""
    names = dict.fromkeys(used.values())
    if len(used) > 1 and len(names) == 1:
        return f"all {next(iter(names))}"
    return "; ".join(f"{', '.join(op for op in used if used[op] == name)} {name}" for name in names)


def fitting(parts: Mapping[str, str], width: int) -> list[str]:
    """Drop parts in the order of `DROPPED_FIRST` until the rest, joined by " | ", fits into `width` columns."""
    left = dict(parts)
    for name in DROPPED_FIRST:
        if cell_len(" | ".join(left.values())) <= width:
            break
        left.pop(name, None)
    return list(left.values())


def _parts(record: StepRecord, tokens_per_s: float) -> dict[str, str]:
    parts = {"loss": f"loss {record.loss:.4f}"}
    if record.val_loss is not None:
        parts |= _validation(record.val_loss, record.val_bpb)
        if record.ema_val_loss is not None:
            parts["ema"] = f"ema {record.ema_val_loss:.4f}"
    if record.tasks:
        parts["tasks"] = " | ".join(f"{task} {100 * score:.1f}%" for task, score in record.tasks.items())
    parts["lr"] = f"lr {record.lr:.2e}"
    if record.grad_norm is None:
        parts["overflow"] = "overflow, skipped"
    else:
        parts["norm"] = f"norm {record.grad_norm:.3f}"
        if record.skipped:
            parts["spike"] = "spike, skipped"
    if record.loss_scale != 1:
        parts["scale"] = f"scale {record.loss_scale:g}"
    parts["rate"] = f"{tokens_per_s:,.0f} tok/s"
    parts["ms"] = f"{record.step_ms:.0f} ms"
    if record.mfu is not None:
        parts["mfu"] = f"mfu {100 * record.mfu:.1f}%"
    return parts


def _validation(val_loss: float, val_bpb: float | None) -> dict[str, str]:
    bits = {} if val_bpb is None else {"bpb": f"{val_bpb:.4f} bits/byte"}
    return {"val": f"val {val_loss:.4f}", **bits}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _quoted(path: Path) -> str:
    """Quote the path for a shell."""
    return shlex.quote(str(path))
