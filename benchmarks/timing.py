"""Timing of one call, by a clock on the CPU and by events with a flushed L2 cache on a GPU; counts of its launches."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from phi_fast.kernels.tuning.timing import EventTimer, KernelTimer, Timer, on_stream

__all__ = [
    "EventTimer",
    "KernelTimer",
    "Timer",
    "clock",
    "device",
    "kept_memory",
    "kernel_timer",
    "launches",
    "on_stream",
]


def device() -> torch.device:
    """The device to measure on: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timer(where: torch.device) -> Timer:
    """The timer for whole steps on `where`, as a user waits for them."""
    return EventTimer() if where.type == "cuda" else clock


def kernel_timer(where: torch.device) -> Timer:
    """The timer for single kernels on `where`: on a GPU without what Python takes to launch them."""
    return KernelTimer() if where.type == "cuda" else clock


def clock(run: Callable[[], object]) -> float:
    """Wall seconds of `run`. Garbage is collected first, so that no collection falls into the timed call."""
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def launches(run: Callable[[], object]) -> dict[str, int]:
    """Number of kernels that one call of `run` launches on the GPU, and its peak of additionally allocated MB."""
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
    """Let the process keep the memory it frees, as a caching allocator does. Does nothing if libc is not glibc.

    glibc returns every block over 32 MB at once, so that a large output costs a page fault every 4 KB. This adds the
    same time to every contender, up to ten times what its kernel takes. Afterwards the limits are set to the values at
    which glibc's own adjustment arrives in a process that frees large blocks.
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
