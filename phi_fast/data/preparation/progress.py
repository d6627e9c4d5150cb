"""Shows the progress of `prepare`."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ...terminal import printable

_LINE_EVERY = 5.0
"""Seconds between two lines if the output is not a terminal."""


class Meter:
    """Shows bytes done of all bytes, MB/s, tokens and time left: as a bar on a terminal, as plain lines elsewhere."""

    def __init__(self, title: str, total: int, console: Console) -> None:
        self.title, self.total, self.console = printable(title), max(total, 1), console
        self.done = self.read = self.tokens = 0
        """Bytes done; bytes done since the start of this process; tokens."""
        self._start = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task(self.title, total=self.total, status="")

    def __enter__(self) -> Meter:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._bar.stop()
        if kind is None:
            self.console.print(f"{self.title}: {self.status()}", soft_wrap=True)

    def advance(self, size: int, tokens: int = 0, *, before: bool = False) -> None:
        """Count a task of `size` bytes. before: whether it was done before an interruption."""
        self.done += size
        self.tokens += tokens
        self.read += 0 if before else size
        if self.console.is_terminal:
            self._bar.update(self._task, completed=self.done, status=self.status())
        elif time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            self.console.print(f"{self.title}: {self.status()}", soft_wrap=True)

    def status(self) -> str:
        """One line without the title."""
        seconds = max(time.monotonic() - self._start, 1e-6)
        parts = [f"{self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB", f"{self.read / seconds / 1e6:,.1f} MB/s"]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if self.done < self.total and self.read:
            left = (self.total - self.done) * seconds / self.read
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        else:
            parts.append(f"{timedelta(seconds=round(seconds))}")
        return ", ".join(parts)
