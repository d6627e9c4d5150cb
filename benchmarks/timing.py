"""Seconds of one call: a clock on the CPU, events on a GPU with a flushed L2 cache; and what a call launches."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Timer = Callable[[Callable[[], object]], float]


def device() -> torch.device:
    """Where the kernels are measured: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timer(where: torch.device) -> Timer:
    """The timer for work on `where`."""
    return EventTimer() if where.type == "cuda" else clock


def clock(run: Callable[[], object]) -> float:
    """Wall seconds of `run`. Garbage is collected before, so that none is during."""
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class EventTimer:
    """Seconds between two CUDA events around `run`.

    A write over more than the L2 cache precedes the first event in the stream: `run` finds its operands in memory, as
    in a model, and Python has queued its launches by the time the GPU reaches them.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.scratch = torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        gc.collect()
        torch.cuda.synchronize()
        self.scratch.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def launches(run: Callable[[], object]) -> dict[str, int]:
    """Kernels that one call of `run` launches on the GPU, and the bytes it allocates there beyond what it found."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    kernels = sum(event.device_type == DeviceType.CUDA for event in trace.events())
    return {"launches": kernels, "peak MB": (torch.cuda.max_memory_allocated() - before) >> 20}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the process keep what it frees, as a caching allocator does; where libc is not glibc, nothing changes.

    glibc hands every block over 32 MB back at once, so that a large output costs a page fault every 4 KB, the same for
    every contender and up to ten times what its kernel takes. At the end come the limits that glibc's own adjustment
    ends at in a process that frees large blocks.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    trim, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim, -1)
    try:
        yield
    finally:
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim, 64 << 20)
        libc.malloc_trim(0)
