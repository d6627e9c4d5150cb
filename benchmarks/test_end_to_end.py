"""The trainer's whole step under DeepSpeed ZeRO-2 beside transformers + DeepSpeed, in one process and in two.

A step is everything except the loader, whose share test_loader.py measures: forward, backward, partitioning the
gradients, norm, clip, Adam, gathering the weights. The cost of the engine is the difference from "phi_fast without
DeepSpeed", the bare step.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from benchmarks import models, sizes, zero2
from benchmarks.harness import Results, compare
from benchmarks.ops import DTYPES
from benchmarks.steps import in_a_process, ours, shape, with_rates
from benchmarks.subjects import Contender, Row, Subject
from phi_fast.training.distributed import join

PRESET: Literal["phi-tiny", "a quarter of phi-1.5"] = "a quarter of phi-1.5" if sizes.GPU else "phi-tiny"
"""What is trained: on a GPU six of phi-1.5's 24 layers, of which three contenders fit into its memory together."""


@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_one_process(dtype: str, full: bool, results: Results) -> None:
    world, (config, rows) = join("auto"), shape(PRESET if full else f"small {PRESET}")
    batch = models.data(config, rows, world.device)
    running = zero2.contenders(config, rows, world, dtype)  # type: ignore[arg-type]
    running["phi_fast without DeepSpeed"] = ours(config, batch, DTYPES[dtype])
    tokens = rows * config.max_position_embeddings
    flops = tokens * config.flops_per_token(config.max_position_embeddings, causal=True)
    subject = compare(
        f"end to end under ZeRO-2, {PRESET}, {dtype}, 1 process",
        {name: Contender(step, flops=flops) for name, step in running.items()},
        config={"rows": rows, "tokens per row": config.max_position_embeddings, "FLOPs": flops},
        repeats=9 if full else 1,
        budget=12,
    )
    results.add(with_rates(subject, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", sizes.DTYPES)
def test_two_processes(dtype: str, full: bool, results: Results) -> None:
    """On a CPU the two processes share the cores; on a machine with two GPUs each process has a GPU."""
    name = f"end to end under ZeRO-2, {PRESET}, {dtype}, 2 processes"
    if sizes.GPU and torch.cuda.device_count() < 2:
        results.add(Subject(name, {"ranks": 2}, [Row("phi_fast trainer", None, "needs two GPUs")]))
        return
    preset: models.Preset = PRESET if full else f"small {PRESET}"
    torchrun = ("torch.distributed.run", "--nproc_per_node", "2")
    found = in_a_process(*torchrun, "-m", "benchmarks.zero2", preset, dtype, "5" if full else "1")
    config, rows = shape(preset)
    length, ranks = config.max_position_embeddings, found["ranks"]
    settings = {"rows per rank": rows, "tokens per row": length, "ranks": ranks, "threads per rank": found["threads"]}
    measured = [Row(name, seconds) for name, seconds in found["seconds"].items()]
    results.add(with_rates(Subject(name, settings, measured), ranks * rows * length))
