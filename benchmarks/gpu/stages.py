"""The stages of the day, most important first: is it right, how fast is it beside its peers, and why."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from benchmarks.gpu.runner import Session, Stage


def stages() -> list[Stage]:
    """In order, with the most that each may take of the whole budget."""
    return [
        Stage("machine", "Machine, compiler, ceilings", late("ceilings", "measure"), 0.10),
        Stage("parity", "Parity with plain PyTorch", late("parity", "check"), 0.25),
        Stage("sanitizer", "compute-sanitizer", late("sanitizer", "check"), 0.15),
        Stage("tests", "Tests on CUDA", late("cuda_tests", "run"), 0.25, least=20),
        Stage("kernels", "Kernels beside their peers", late("kernels", "measure"), 0.30, least=15),
        Stage("tiles", "Tiles swept", late("tiles", "sweep"), 0.10, least=15),
        Stage("step", "A training step of phi-1.5", late("step", "measure"), 0.25, least=20),
        Stage("trainer", "The trainer, killed and resumed", late("trainer", "check"), 0.30, least=20),
    ]


def late(module: str, function: str) -> Callable[[Session], None]:
    """A stage's function, imported in the stage's own process: one that cannot be imported fails alone."""

    def run(session: Session) -> None:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(session)

    return run
