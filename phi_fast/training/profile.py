"""A trace of some steps for Perfetto, with a snapshot of the GPU's memory (`--profile`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..files import writing
from .distributed import World
from .trouble import Trouble

MAX_MEMORY_EVENTS = 100_000
"""The newest allocations and releases that a memory snapshot holds."""


class Profile:
    """Traces the steps from the first to the last of `steps`, with all that happens between them.

    Writes, for each rank, `trace-rank-R-steps-FROM-TO.json.gz` for https://ui.perfetto.dev, and on CUDA
    `memory-rank-R-steps-FROM-TO.pickle` for https://pytorch.org/memory_viz. NVTX ranges, on CUDA, name the same spans
    for Nsight Systems.
    """

    def __init__(self, folder: Path, steps: range, world: World, trouble: Trouble) -> None:
        self._folder, self._steps, self._rank, self._trouble = folder, steps, world.rank, trouble
        self._cuda = world.device.type == "cuda"
        self._running: profile | None = None
        self._step = 0
        """The newest step that began in the trace."""

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace a step; the trace begins before the first of `steps`."""
        if step not in self._steps:
            yield
            return
        if self._running is None:
            self._start(step)
        self._step = step
        with self.span(f"step {step}"):
            yield
        if step == self._steps[-1]:
            self.stop()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Name what happens inside, in the trace."""
        if self._running is None:
            yield
            return
        with record_function(name):
            if self._cuda:
                with torch.cuda.nvtx.range(name):
                    yield
            else:
                yield

    def _start(self, step: int) -> None:
        self._steps = range(step, self._steps.stop)  # a resumed run may begin inside of the range
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._running = profile(activities=activities, record_shapes=True)
        self._running.start()

    def stop(self) -> None:
        """End the trace, if it runs, and write it; an error in writing ends the run after this step."""
        running, self._running = self._running, None
        if running is None:
            return
        if self._cuda:
            torch.cuda.synchronize()
        running.stop()
        name = f"rank-{self._rank}-steps-{self._steps[0]}-{self._step}"
        with self._trouble.kept(), writing(self._folder, "make room, or leave --profile out"):
            self._folder.mkdir(exist_ok=True)
            (self._folder / f"trace-{name}.json.gz").touch()  # an error here is an OSError; the profiler's is not
            running.export_chrome_trace(str(self._folder / f"trace-{name}.json.gz"))
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{name}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
