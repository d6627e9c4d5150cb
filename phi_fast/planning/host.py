"""This machine's CPU as a `Device`, whose rates are measured in a second or two on the planned model's shapes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..kernels import attention, bias_gelu
from ..kernels.backend import implementation
from ..precision import DTYPES, Precision
from .devices import Device, Figure, Kind
from .work import Shape

SECONDS = 0.25
"""Approximate time for measuring each rate."""


def probe(shape: Shape, precision: Precision) -> Device:
    """Measure matrix products, copies, the attention op and GELU (limited by its exponential) with torch's threads."""
    dtype, d = DTYPES[precision], shape.config.hidden_size
    tokens = min(shape.tokens, 2048)
    x, packed = torch.randn(tokens, d, dtype=dtype), torch.randn(tokens, 7 * d, dtype=dtype)
    w_in = torch.randn(7 * d, d, dtype=dtype)
    gradient = implementation("weight_gradient", x.device)
    products = lambda: (x @ w_in.T, packed @ w_in, gradient.product(packed, x))  # noqa: E731
    flops = 3 * 2 * tokens * d * 7 * d / _seconds(products)
    source = packed.clone()
    bandwidth = 2 * packed.nbytes / _seconds(lambda: source.copy_(packed))
    forward, backward = _attention(shape, dtype)
    wide = torch.randn(tokens, 4 * d, dtype=dtype)
    streaming = 2 * wide.nbytes / _seconds(lambda: bias_gelu(wide)) / bandwidth
    here = f"measured now, {torch.get_num_threads()} threads"
    efficiency: dict[Kind, Figure] = {
        "product": Figure(1.0, "", f"{here}: the FLOP/s above were measured on this model's own products"),
        "attention forward": Figure(forward / flops, "", f"{here}: the attention op, forward, ÷ the products' rate"),
        "attention backward": Figure(backward / flops, "", f"{here}: the attention op, backward"),
        "memory": Figure(min(1.0, streaming), "", f"{here}: GELU's bytes/s ÷ the copy's; used for all such kernels"),
    }
    return Device(
        "cpu",
        None,
        Figure(flops, "FLOP/s", f"{here}: {precision} products of ({tokens}, {d}) and ({7 * d}, {d})"),
        Figure(bandwidth, "B/s", f"{here}: a copy of {packed.nbytes / 1e6:.0f} MB, read and written"),
        None,
        None,
        1,
        efficiency,
        None,
    )


def _attention(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Measure FLOP/s of the attention op, forward and backward, with the FLOPs that `work.py` counts."""
    rows, heads = min(shape.rows, 2), shape.config.num_attention_heads
    q, k, v = (torch.randn(rows, shape.sequence, heads, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    counted = rows * shape.sequence**2 * shape.config.hidden_size
    with torch.no_grad():
        forward = _seconds(lambda: attention(q, k, v))
    both = _seconds(lambda: attention(q, k, v).backward(grad))
    return 2 * counted / forward, 5 * counted / max(both - forward, 0.2 * both)


def _seconds(run: Callable[[], object]) -> float:
    """Measure the median time of a call, over about SECONDS."""
    run()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
