"""How kernels are timed on a GPU, on a stand-in for torch.cuda whose clock the test turns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import timing

FLUSH = 100e-6
"""Seconds that the stand-in's GPU takes to write over its L2 cache."""


class Gpu:
    """A GPU with one stream and a host, each with a time of its own: work starts when both it is queued and the GPU is
    free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.gpu = 0.0
        self.capturing: list[float] | None = None
        self.flushes = 0
        cuda = torch.cuda
        properties = SimpleNamespace(L2_cache_size=50 << 20)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(cuda, "current_device", lambda: 0)
        monkeypatch.setattr(cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
        monkeypatch.setattr(cuda, "graph", lambda graph, stream: Capture(self, graph))
        monkeypatch.setattr(torch, "empty", lambda size, **_: SimpleNamespace(zero_=self.flush))

    def synchronize(self) -> None:
        self.host = self.gpu = max(self.host, self.gpu)

    def flush(self) -> None:
        self.flushes += 1
        self.launch(python=5e-6, seconds=FLUSH)

    def launch(self, python: float, seconds: float) -> None:
        self.host += python
        if self.capturing is None:
            self.gpu = max(self.gpu, self.host) + seconds
        else:
            self.capturing.append(seconds)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.gpu, self.gpu.host)

    def synchronize(self) -> None:
        self.gpu.synchronize()

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


class Capture:
    def __init__(self, gpu: Gpu, graph: Any) -> None:
        self.gpu, self.graph = gpu, graph

    def __enter__(self) -> None:
        self.gpu.capturing = []

    def __exit__(self, *_: object) -> None:
        captured, self.gpu.capturing = self.gpu.capturing or [], None
        self.graph.replay = lambda: self.gpu.launch(python=8e-6, seconds=sum(captured))


def kernels(gpu: Gpu, *, refused: bool = False, python: float = 300e-6) -> Callable[[], None]:
    """Three kernels of 10 µs that Python takes `python` seconds to launch. refused: they cannot be captured."""

    def run() -> None:
        for _ in range(3):
            if refused and gpu.capturing is not None:
                raise RuntimeError("operation not permitted when stream is capturing")
            gpu.launch(python=python / 3, seconds=10e-6)

    return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_a_step_is_timed_with_what_python_takes(gpu: Gpu) -> None:
    measure = timing.timer(torch.device("cuda"))
    assert measure(kernels(gpu)) == pytest.approx(310e-6 - FLUSH + 5e-6, rel=0.1)  # the L2 write hides a part of it


def test_a_kernel_is_timed_without_what_python_takes_to_launch_it(gpu: Gpu) -> None:
    measure = timing.kernel_timer(torch.device("cuda"))
    run = kernels(gpu)
    assert isinstance(measure, timing.KernelTimer)
    with timing.on_stream(measure):
        assert measure.replayed(run)
        assert measure(run) == pytest.approx(30e-6)


def test_one_that_cannot_be_captured_waits_behind_enough_work_to_hide_python(gpu: Gpu) -> None:
    measure = timing.kernel_timer(torch.device("cuda"))
    run = kernels(gpu, refused=True)
    assert isinstance(measure, timing.KernelTimer)
    assert not measure.replayed(run)
    assert measure(run) == pytest.approx(30e-6)
    assert gpu.flushes < 20


def test_python_that_nothing_hides_is_measured_once_more_only(gpu: Gpu) -> None:
    measure = timing.kernel_timer(torch.device("cuda"))
    assert measure(kernels(gpu, refused=True, python=1.0)) > 0.9
    assert gpu.flushes <= 3 + timing.KernelTimer.MOST_FLUSHES


def test_a_launch_as_the_tuner_describes_it_is_timed_from_a_graph(gpu: Gpu) -> None:
    """Its arguments are in dicts, which have no hash; the timer keeps a graph for each launch."""
    triton_common = pytest.importorskip("phi_fast.kernels.triton.common")

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda **_: gpu.launch(python=300e-6, seconds=10e-6)

    launch = triton_common.Launch(Kernel(), (1,), {"x": torch.zeros(1)}, {})
    measure = timing.kernel_timer(torch.device("cuda"))
    with timing.on_stream(measure):
        assert isinstance(measure, timing.KernelTimer) and measure.replayed(launch)
        assert measure(launch) == pytest.approx(10e-6)
