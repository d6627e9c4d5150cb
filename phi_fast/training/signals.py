"""Signals with which a person or a scheduler stops a run or saves it; all ranks agree on what to do.

SIGINT, SIGTERM, SIGHUP    save and stop after this step; a validation is aborted
SIGUSR1                    save after this step and go on

Before the first step there is nothing to save, and the first three end the process at once. During the imports
`phi_fast.startup.end_on_signals` does this, and afterwards `Signals`, even while the process waits for other ranks in
C++ code, where Python's own handlers do not run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from .distributed import World

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0
"""Seconds that Python has to unwind after a signal before the first step; then the process is ended."""


class StoppedEarly(KeyboardInterrupt):
    """A signal arrived before the first step, when there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.number).name} before a step was taken: there is nothing to save"

    @property
    def status(self) -> int:
        """Exit status: 130 for Ctrl-C, else 75, which asks a scheduler to start the command again."""
        return 130 if self.number == signal.SIGINT else 75


class Signals:
    """Catches the signals inside a `with` block.

    `stop`, `save`, `failed`, `broken` and `ended` are the same on every rank: they change only where the ranks
    communicate. Until `ready` is called, a stop signal raises StoppedEarly.
    """

    def __init__(self) -> None:
        self.abandon: Callable[[], None] = lambda: None
        """Releases what the process owns; called from another thread if the main thread does not unwind in time."""
        self.world: World
        self._starting, self._unwound = True, threading.Event()
        self._previous_fd = -1
        self.stop = False
        """A rank was asked to stop: this step is the run's last."""
        self.save = False
        """A rank wants a checkpoint after this step."""
        self.failed = False
        """A rank's save in the background failed."""
        self.broken = False
        """A rank's update left a weight or a moment that is not finite."""
        self.ended = False
        """A rank cannot go on after this step, because of an error outside the step (`trouble`)."""
        self.stop_received = False
        """This rank was asked to stop; the others may not know yet."""
        self._save_received = False
        self._previous: dict[int, object] = {}

    @property
    def go_on(self) -> bool:
        """True if no rank wants the run to end after this step."""
        return not self.stop and not self.ended

    def ready(self) -> None:
        """Declare that the first step begins: from now on a stop is agreed on by all ranks and done after a step."""
        self._starting = False

    def __enter__(self) -> Signals:
        self._pipe = os.pipe()
        for descriptor in self._pipe:
            os.set_blocking(descriptor, descriptor == self._pipe[0])
        numbers = [n for n in (*STOPS, signal.SIGUSR1) if signal.getsignal(n) is not signal.SIG_IGN]  # by nohup
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._starting = False
        self._unwound.set()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        os.close(self._pipe[1])

    def _watch(self) -> None:
        """End the process if it does not react to a signal: Python's handlers wait for C++ code to return."""
        while received := os.read(self._pipe[0], 1):
            stopped = StoppedEarly(received[0])
            if stopped.number not in STOPS or not self._starting:
                continue
            if not self._unwound.wait(GRACE) and self._starting:
                if os.environ.get("RANK", "0") == "0":
                    print(stopped, file=sys.stderr, flush=True)
                self.abandon()
                os._exit(stopped.status)
        os.close(self._pipe[0])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save_received = True
            return
        if self._starting:
            raise StoppedEarly(number)
        if self.stop_received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self.stop_received = True

    def agree(self, *, save: bool, failed: bool, broken: bool, ended: bool) -> None:
        """Set `stop`, `save`, `failed`, `broken` and `ended` on every rank if any rank has them.

        Called once per step: the step's only all-reduce outside the optimizer.
        """
        flags = [self.stop_received, self._save_received or save, failed, broken, ended]
        self._save_received = False
        if self.world.size > 1:
            counts = torch.tensor(flags, dtype=torch.float32, device=self.world.device)
            dist.all_reduce(counts)
            flags = [count > 0 for count in counts.tolist()]
        self.stop, self.save, self.failed, self.broken, self.ended = flags
