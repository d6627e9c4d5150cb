"""Stage "step": phi-1.5 whole, tokens per second and MFU beside transformers, and where the time goes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks import models, sizes, steps, timing
from benchmarks.gpu import profile, tiles
from benchmarks.gpu.runner import Session
from benchmarks.harness import compare
from benchmarks.ops import DTYPES
from benchmarks.subjects import Row, Subject
from phi_fast import PhiConfig
from phi_fast.kernels import backend, fuse_rotary
from phi_fast.peaks import peak_flops

ROWS = (32, 16, 8, 4, 2, 1)
"""Micro-batches that are tried, in rows of 2048 tokens: the largest that fits is measured."""
REPEATS, SECONDS = 7, 8.0
Make = Callable[[PhiConfig, int, torch.dtype], "steps.Step | str"]


def measure(session: Session) -> None:
    """The trainer's default dtype first: this project, its profile, its graph, its rotation apart, then the peers."""
    config = models.small(PhiConfig.preset("phi-tiny")) if session.dry else PhiConfig.preset("phi-1.5")
    dtype = "fp32" if session.dry else sizes.DTYPES[0]
    name = f"training step, phi-1.5, {dtype}"
    rows: list[Row] = []
    fitting = (1,) if session.dry else ROWS

    def add(label: str, make: Make, sizes_to_try: tuple[int, ...]) -> int:
        """Measure a contender at the largest of the micro-batches that fits; which one that is."""
        row, size = largest(label, make, config, DTYPES[dtype], sizes_to_try)
        rows.append(row)
        settings = {"tokens per row": config.max_position_embeddings, "parameters": config.num_parameters()}
        session.put(name, asdict(Subject(name, settings, rows)))
        return size

    size = add("phi_fast", ours, fitting)
    smaller = tuple(rows for rows in fitting if rows <= size)
    profile.measure(session, config, size, DTYPES[dtype])
    add("phi_fast, CUDA graph", captured, smaller)  # the graph's own memory may ask for a smaller micro-batch
    inside = not backend.rotary_inside(timing.device())
    with fuse_rotary(inside):
        add(f"phi_fast, RoPE {'inside' if inside else 'apart from'} attention", ours, (size,))
    table = session.scratch / tiles.TABLE
    if table.exists():
        with tiles.in_use(table):
            add("phi_fast, tiles measured on this GPU", ours, (size,))
    add("transformers eager", eager, smaller)
    add("transformers torch.compile", compiled if not session.dry else left_out, smaller)


def ours(config: PhiConfig, rows: int, dtype: torch.dtype) -> steps.Step:
    return steps.ours(config, models.data(config, rows, timing.device()), dtype)


def captured(config: PhiConfig, rows: int, dtype: torch.dtype) -> steps.Step | str:
    if not sizes.GPU:
        return "needs a GPU"
    return steps.captured(config, models.data(config, rows, timing.device()), dtype)


def eager(config: PhiConfig, rows: int, dtype: torch.dtype) -> steps.Step | str:
    return steps.transformers_eager(config, models.data(config, rows, timing.device()), dtype)


def compiled(config: PhiConfig, rows: int, dtype: torch.dtype) -> steps.Step | str:
    return steps.transformers_compiled(config, models.data(config, rows, timing.device()), dtype, full=True)


def left_out(config: PhiConfig, rows: int, dtype: torch.dtype) -> str:
    return "compiled in the full run only"


def largest(
    label: str, make: Make, config: PhiConfig, dtype: torch.dtype, rows_to_try: tuple[int, ...]
) -> tuple[Row, int]:
    """(the row, its micro-batch) of a contender at the first of the micro-batches that does not run out of memory."""
    for rows in rows_to_try:
        try:
            with timing.device():  # 1.4 B weights are drawn there, not on one core
                made = make(config, rows, dtype)
            if isinstance(made, str):
                return Row(label, None, made), rows
            made()
            made()
            row = compare("", {label: made}, config={}, repeats=REPEATS, budget=SECONDS).rows[0]
            if row.seconds is None and "OutOfMemory" in row.note and rows > rows_to_try[-1]:
                continue
            return with_rates(row, config, rows), rows
        except torch.OutOfMemoryError:
            continue
        finally:
            made = None
            free()
    return Row(label, None, f"does not fit with micro-batches of {', '.join(map(str, rows_to_try))} rows"), 1


def free() -> None:
    """Give back what a contender held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def with_rates(row: Row, config: PhiConfig, rows: int) -> Row:
    """Tokens per second, MFU in both conventions and peak memory, in the row's further figures."""
    length = config.max_position_embeddings
    row.extra["micro-batch"] = rows
    if row.median is None:
        return row
    rate = rows * length / row.median
    row.extra["tokens/s"] = round(rate)
    peak = peak_flops(torch.cuda.get_device_name()) if sizes.GPU else None
    for words, causal in (("MFU, attention in full", False), ("MFU, causal", True)):
        flops = config.flops_per_token(length, causal=causal) * rate
        row.extra[words] = f"{flops / peak:.1%}" if peak else "not measured"
    if sizes.GPU:
        row.extra["allocated at most, MB"] = torch.cuda.max_memory_allocated() >> 20
    return row
