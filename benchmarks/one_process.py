"""`python -m benchmarks.one_process PRESET DTYPE CONTENDER`: two training steps, then seconds and peak memory as JSON.

A process of its own, because a process's peak resident size never goes down again.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.ops import DTYPES
from benchmarks.steps import ROWS, ours, transformers_eager
from phi_fast import PhiConfig

STEPS = {"phi_fast": ours, "transformers eager": transformers_eager}


def peak_mb() -> int:
    """Linux's VmHWM. (getrusage's ru_maxrss begins at what the parent had when it forked.)"""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux alone")
    return int(found[1]) >> 10


def main(preset: str, dtype: str, name: str) -> None:
    """name: one of `STEPS`. preset: "small NAME" for the small run's model."""
    torch.manual_seed(0)
    imports = peak_mb()
    config, rows = PhiConfig.preset(preset.removeprefix("small ")), ROWS["phi-small"]
    if preset.startswith("small "):
        config, rows = models.small(config), 1
    step, seconds = STEPS[name](config, models.data(config, rows), DTYPES[dtype]), []
    for _ in range(2):  # the optimizer's state is made by the first
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds[1:], "peak_mb": peak_mb(), "imports_mb": imports}))


if __name__ == "__main__":
    main(*sys.argv[1:])
