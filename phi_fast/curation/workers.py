"""Runs tasks in worker processes that hold the step, or in this process if there is to be only one worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from ..data.preparation.processes import follow_parent, start_method
from .documents import CurateError


class Workers:
    """Calls functions with the step as their first argument."""

    def __init__(self, count: int, step: Any, pool: ProcessPoolExecutor | None) -> None:
        self._count, self._step, self._pool = count, step, pool
        self._running: dict[Future[Any], Callable[[Any], None]] = {}

    def submit(self, function: Callable[..., Any], *arguments: Any, then: Callable[[Any], None]) -> None:
        """Call function(step, *arguments) in a worker, and `then` with its result here; waits if all are busy."""
        if self._pool is None:
            then(function(self._step, *arguments))
            return
        self._running[self._pool.submit(_call, function, arguments)] = then
        self._collect(self._count + 1)

    def finish(self) -> None:
        """Wait for every call."""
        self._collect(0)

    def _collect(self, limit: int) -> None:
        from concurrent.futures.process import BrokenProcessPool

        while len(self._running) > limit:
            for done in wait(self._running, return_when=FIRST_COMPLETED).done:
                then = self._running.pop(done)
                try:
                    result = done.result()
                except BrokenProcessPool as error:
                    raise CurateError(
                        "a worker process was killed, perhaps because memory ran out: run the same command again to "
                        "go on, with fewer --workers if it happens again"
                    ) from error
                then(result)


@contextmanager
def workers(count: int, step: Any) -> Iterator[Workers]:
    """Start workers; those of an interrupted run end with it."""
    if count == 1:
        yield Workers(1, step, None)
        return
    pool = ProcessPoolExecutor(count, start_method(f"{__package__}.run"), _start, (step,))
    try:
        yield Workers(count, step, pool)
    finally:
        pool.shutdown(cancel_futures=True)


_step: Any
"""A worker process's own copy of the step."""


def _start(step: Any) -> None:
    global _step
    follow_parent()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # there is one process per core already
    _step = step


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(_step, *arguments)
