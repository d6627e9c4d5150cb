"""Stage "kernels": the benchmarks of single kernels beside their peers, each in a process of its own."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import machine, sizes, timing
from benchmarks.gpu.runner import DONE, Put, Session, Stage, in_a_process
from benchmarks.harness import Results
from benchmarks.subjects import Subject

LIMIT = 60.0
"""Seconds after which one benchmark is stopped: a peer's compiler may take longer than all that is measured."""


@dataclass(frozen=True)
class Benchmark:
    """A function of benchmarks/: what `make bench` runs too."""

    module: str
    function: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return ", ".join([self.function.removeprefix("test_"), *self.arguments.values()])

    def run(self, put: Put, full: bool) -> None:
        """Measure, and put every subject under its name."""
        function: Callable[..., None] = getattr(importlib.import_module(self.module), self.function)
        torch.manual_seed(0)
        with timing.kept_memory():
            function(**self.arguments, full=full, results=Kept(put))


class Kept(Results):
    """Results that are put instead of written."""

    def __init__(self, put: Put) -> None:
        super().__init__(None)
        self._put = put

    def add(self, subject: Subject) -> None:
        super().add(subject)
        now = {"measured": datetime.datetime.now().isoformat(timespec="seconds"), "commit": machine.commit()}
        self._put(subject.name, asdict(subject) | now)


def benchmarks() -> list[Benchmark]:
    """List the benchmarks, most important first: all of one dtype, then the next."""
    attention = importlib.import_module("benchmarks.test_attention")
    found = []
    for dtype in sizes.DTYPES:
        found += [
            Benchmark("benchmarks.test_attention", "test_attention", {"shape": shape, "dtype": dtype})
            for shape in list(attention.SHAPES)[:1]
        ]
        found += [
            Benchmark(f"benchmarks.test_{module}", f"test_{function}", {"dtype": dtype})
            for module, function in (
                ("linear_cross_entropy", "linear_cross_entropy"),
                ("parallel_block", "parallel_block"),
                ("layer_norm", "layer_norm"),
                ("bias_gelu", "bias_gelu"),
                ("rotary", "rotary"),
                ("linear_cross_entropy", "cross_entropy_of_a_chunk"),
                ("linear_cross_entropy", "loss_alone"),
            )
        ]
    found.insert(4, Benchmark("benchmarks.test_adam", "test_whole_update_of_bf16_weights", {}))
    shapes = list(attention.SHAPES)[1:]
    return found + [
        Benchmark("benchmarks.test_attention", "test_attention", {"shape": shape, "dtype": sizes.DTYPES[0]})
        for shape in shapes
    ]


def measure(session: Session) -> None:
    """Each benchmark until the time is up. One that fails is in the table of outcomes, and the next one runs."""
    outcomes = []
    todo = benchmarks()
    for benchmark in todo[:2] if session.dry else todo:
        if session.left() < 5:
            outcomes.append({"benchmark": benchmark.name, "": "not measured: the time was up"})
            continue
        deadline = session.clock() + min(LIMIT, session.left() - 2)

        def go(inner: Session, benchmark: Benchmark = benchmark) -> None:
            benchmark.run(inner.put, full=not inner.dry)

        inner = Session(session.put, deadline, session.clock, session.dry, session.scratch)
        outcome = in_a_process(Stage(benchmark.name, benchmark.name, go, 1.0), inner)
        if outcome.state != DONE:
            outcomes.append({"benchmark": benchmark.name, "": f"{outcome.state}: {outcome.reason}"})
    session.put("benchmarks that did not end", outcomes or "none")
