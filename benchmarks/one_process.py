"""`python -m benchmarks.one_process PRESET DTYPE CONTENDER`: two training steps, then seconds and peak memory as JSON.

Each contender needs a separate process, because a process's peak resident size never goes down again.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import models
from benchmarks.ops import DTYPES
from benchmarks.steps import ours, shape, transformers_eager
from phi_fast.startup import tolerate_encodings

STEPS = {"phi_fast": ours, "transformers eager": transformers_eager}


def peak_mb() -> int:
    """Peak resident size by Linux's VmHWM. (getrusage's ru_maxrss starts at the parent's size when it forked.)"""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM: peak memory can be measured on Linux only")
    return int(found[1]) >> 10


def measure(
    preset: models.Preset, dtype: Literal["fp32", "bf16", "fp16"], name: Literal["phi_fast", "transformers eager"]
) -> None:
    """Run two training steps; print the seconds of the second and the peak memory, as JSON.

    preset: "small NAME" for the small run's model. name: one of `STEPS`.
    """
    torch.manual_seed(0)
    imports = peak_mb()
    config, rows = shape(preset)
    step, seconds = STEPS[name](config, models.data(config, rows), DTYPES[dtype]), []
    for _ in range(2):  # the first makes the optimizer's state
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds[1:], "peak_mb": peak_mb(), "imports_mb": imports}))


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run `measure`."""
    tolerate_encodings()
    tyro.cli(
        measure, args=arguments, prog="python -m benchmarks.one_process", config=(tyro.conf.PositionalRequiredArgs,)
    )


if __name__ == "__main__":
    main()
