"""Timing of kernels on a GPU: by events, behind a write over the L2 cache, launches replayed from a CUDA graph."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Timer = Callable[[Callable[[], object]], float]
"""Takes a function and returns the seconds that one call of it took."""


class EventTimer:
    """Seconds between two CUDA events around `run`, Python's own included where the GPU has to wait for it.

    The stream first writes more memory than the L2 cache holds: `run` then finds its operands in memory, as in a model.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.scratch = torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device="cuda")
        # A collection before each call then looks at what is new, not at every library's objects for 100 ms.
        gc.collect()
        gc.freeze()

    def __call__(self, run: Callable[[], object]) -> float:
        return self.between_events(run)[0]

    def between_events(self, run: Callable[[], object], flushes: int = 1) -> tuple[float, float]:
        """(seconds on the GPU, seconds that Python took to queue `run`)."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        gc.collect()
        torch.cuda.synchronize()
        for _ in range(flushes):
            self.scratch.zero_()
        begin.record()
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000, host


class KernelTimer(EventTimer):
    """Seconds that the GPU takes for `run`, without Python's: launches are replayed from a CUDA graph.

    A run that cannot be captured (it waits for the GPU, or allocates in a way that a graph forbids) is launched from
    Python behind as many writes over the L2 cache as hide the time that Python takes to queue it; `replayed` says
    which. Runs are captured on a stream of their own, on which they have to be recorded too: use `on_stream`.
    """

    MOST_FLUSHES = 100
    """About 10 ms on an H100. What Python takes longer for shows in the figure, and `replayed` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = torch.cuda.Stream()
        self._graphs: dict[Callable[[], object], torch.cuda.CUDAGraph | None] = {}
        self._flush = self.between_events(self.scratch.zero_)[0]

    def replayed(self, run: Callable[[], object]) -> bool:
        """Whether `run` is timed from a graph."""
        return self._graph(run) is not None

    def __call__(self, run: Callable[[], object]) -> float:
        graph = self._graph(run)
        if graph is not None:
            return self.between_events(graph.replay)[0]
        flushes = 1
        while True:
            seconds, host = self.between_events(run, flushes)
            if host <= flushes * self._flush or flushes == self.MOST_FLUSHES:
                return seconds
            flushes = min(self.MOST_FLUSHES, math.ceil(1.5 * host / self._flush))

    def _graph(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        if run not in self._graphs:
            self._graphs[run] = self._capture(run)
        return self._graphs[run]

    def _capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        run()  # what is made at the first call is not made in the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                run()
        except RuntimeError:  # what a capture forbids: the run is launched from Python, and its row says so
            torch.cuda.synchronize()
            return None
        return graph


@contextmanager
def on_stream(measure: Timer) -> Iterator[None]:
    """The stream on which a timer's runs must be recorded, current inside; a CPU has none."""
    if not isinstance(measure, KernelTimer):
        yield
        return
    measure.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(measure.stream):
        yield
    torch.cuda.current_stream().wait_stream(measure.stream)
