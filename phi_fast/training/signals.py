"""What a person or a scheduler asks of a running run by signals, agreed on by all ranks.

SIGINT, SIGTERM, SIGHUP    save and stop after this step; a validation is broken off
SIGUSR1                    save after this step and go on

Before the first step there is nothing to save: the first three end the process at once. During the imports
`phi_fast.terminal.end_on_signals` sees to that, afterwards `Signals`, also while this process waits for others in C++
code, where Python's own handlers do not run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from .distributed import World

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0
"""Seconds that a start has to unwind after a signal before it is ended where it waits."""


class StoppedEarly(KeyboardInterrupt):
    """A signal ends the process before its first step: there is nothing to save."""

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
    """Catches the signals while it is entered. `stop` and `save` change only where every rank sees them change.

    Until `ready` is called a stop raises StoppedEarly.
    """

    def __init__(self) -> None:
        self.abandon: Callable[[], None] = lambda: None
        """Called from another thread where the main one does not come to unwind: gives up what is owned."""
        self.world: World
        self._starting, self._unwound = True, threading.Event()
        self._previous_fd = -1
        self.stop = False
        """Agreed: this step is the run's last."""
        self.save = False
        """Agreed: a checkpoint is wanted after this step."""
        self.failed = False
        """Agreed: a rank's save in the background failed."""
        self.broken = False
        """Agreed: a rank's update left a weight or a moment that is not finite."""
        self.ended = False
        """Agreed: a rank cannot go on after this step, for a reason outside it."""
        self.stop_received = False
        """This rank was asked to stop; the others may not know yet."""
        self._save_received = False
        self._previous: dict[int, object] = {}

    @property
    def go_on(self) -> bool:
        """No rank wants the run to end after this step."""
        return not self.stop and not self.ended

    def ready(self) -> None:
        """There is something to save from now on: a stop is agreed on, and taken after a step."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._starting = False
        self._unwound.set()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        os.close(self._pipe[1])

    def _watch(self) -> None:
        """End the process where it does not react to a signal: Python's handlers wait for C++ code to return."""
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
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.stop_received = True

    def agree(self, *, save: bool, failed: bool, broken: bool, ended: bool) -> None:
        """End of a step: sets `stop`, `save`, `failed`, `broken` and `ended` on every rank where one of them has it.

        The one all-reduce of a step outside the optimizer.
        """
        flags = [self.stop_received, self._save_received or save, failed, broken, ended]
        self._save_received = False
        if self.world.size > 1:
            counts = torch.tensor(flags, dtype=torch.float32, device=self.world.device)
            dist.all_reduce(counts)
            flags = [count > 0 for count in counts.tolist()]
        self.stop, self.save, self.failed, self.broken, self.ended = flags
