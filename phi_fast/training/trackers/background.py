"""A tracker in a thread of its own, so that neither its errors nor its waits reach the training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Full, Queue

from .tracker import Tracker

MOST_WAITING = 10_000
"""Calls that may wait for a slow tracker."""
LAST_SECONDS = 60.0
"""How long the end of a run waits for what is left to send."""


class Background:
    """Passes each call to a tracker in order, and returns at once. After a failure it warns once and does nothing.

    open_: opens the tracker, in the thread. warn: takes the warning, in whichever thread.
    """

    def __init__(self, name: str, open_: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._open, self.warn = name, open_, warn
        self._calls: Queue[Callable[[Tracker], None] | None] = Queue(MOST_WAITING)
        self._off, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            tracker = self._open()
            while (call := self._calls.get()) is not None:
                call(tracker)
            tracker.close()
        except BaseException as error:  # whatever a tracker's library raises, SystemExit too: the training goes on
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        with self._lock:
            off, self._off = self._off, True
        if not off:
            self.warn(f"--track {self._name} has failed and is off now, the training goes on ({reason})")

    def _send(self, call: Callable[[Tracker], None] | None) -> None:
        if self._off:
            return
        try:
            self._calls.put_nowait(call)
        except Full:
            self._fail(f"{MOST_WAITING} records wait to be sent")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._send(lambda tracker: tracker.scalars(values, step))

    def text(self, tag: str, text: str, step: int) -> None:
        self._send(lambda tracker: tracker.text(tag, text, step))

    def page(self, path: Path) -> None:
        self._send(lambda tracker: tracker.page(path))

    def close(self) -> None:
        """Wait for what is left to be sent, at most LAST_SECONDS."""
        self._send(None)
        if not self._off:
            self._thread.join(LAST_SECONDS)
            if self._thread.is_alive():
                self._fail(f"not everything was sent within {LAST_SECONDS:.0f} s of the end")
