"""Stage "machine": the compiler, and the two rates that bound everything else: a copy and a large matrix product."""

from __future__ import annotations

import shutil
import statistics
import subprocess

import torch

from benchmarks import sizes, timing, yardsticks
from benchmarks.gpu import place
from benchmarks.gpu.runner import Session
from benchmarks.ops import DTYPES
from benchmarks.subjects import Contender

REPEATS = 20


def measure(session: Session) -> None:
    """The rates, and the clocks before and after: a card that was throttled shows it."""
    where = timing.device()
    session.put("compiler", compiler())
    before = place.clocks()
    copied = yardsticks.copy(2**20 if session.dry else 2**31, where)
    ceilings = {"copy, GB/s": copied.moved / seconds(copied) / 1e9}
    session.put("ceilings", ceilings)
    n = 64 if session.dry else sizes.PRODUCT
    for dtype in sizes.DTYPES:
        product = yardsticks.product(n, DTYPES[dtype], where)
        ceilings[f"{n}³ product, {dtype}, TFLOP/s"] = product.flops / seconds(product) / 1e12
        session.put("ceilings", ceilings)
    if before:
        session.put("clocks before and after", [before, place.clocks()])


def seconds(contender: Contender) -> float:
    """Median of repeats after three untimed calls."""
    time = timing.timer(timing.device())
    for _ in range(3):
        contender.run()
    return statistics.median(time(contender.run) for _ in range(REPEATS))


def compiler() -> dict[str, str]:
    """Versions of what compiles the kernels here."""
    found = {"ptxas of Triton": "not installed", "nvcc": "not installed"}
    try:
        from triton.knobs import nvidia

        found["ptxas of Triton"] = nvidia.ptxas.version
    except ImportError:
        pass  # a CPU may have no Triton; the table says so
    if (nvcc := shutil.which("nvcc")) is not None:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False, timeout=30)
        found["nvcc"] = next((line.strip() for line in done.stdout.splitlines() if "release" in line), "")
    return found | {"torch's CUDA": torch.version.cuda or "none"}
