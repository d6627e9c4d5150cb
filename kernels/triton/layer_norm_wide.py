"""LayerNorm of rows that registers do not hold, in Triton: a row is read in parts, several times.

The second and the third read of a row (128 KB in fp32) are from the caches, since its program has just read it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import Launch
from .rounding import narrow

TILE = 2048  # elements of a part: 8 per thread


@triton.jit
def _layer_norm_forward_wide(
    x,  # (rows, d)
    weight,  # (d,)
    bias,  # (d,) or None, with mean: RMSNorm
    out,  # (rows, d)
    mean,  # (rows,) fp32, or None
    rstd,  # (rows,) fp32
    residual,  # (rows, d) or None: x + residual is normalised, and written to
    summed,  # (rows, d)
    shift,  # (d,) or None: x + shift is written to
    shifted,  # (rows, d)
    d,
    eps,
    x_stride,
    out_stride,
    residual_stride,
    summed_stride,
    shifted_stride,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    normalised = x + row * x_stride
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, d, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            v += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            stored = narrow(v, summed.dtype.element_ty)
            tl.store(summed + row * summed_stride + column, stored, mask=inside)
            v = stored.to(tl.float32)  # what backward will see
        if shift is not None:
            moved = v + tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(shifted + row * shifted_stride + column, narrow(moved, shifted.dtype.element_ty), mask=inside)
        total += v
    if residual is not None:
        normalised = summed + row * summed_stride
        tl.debug_barrier()  # other threads have written what this one reads
    mu = 0.0
    if mean is not None:
        mu = tl.sum(total, axis=0) / d
        tl.store(mean + row, mu)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, d, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        v = tl.load(normalised + column, mask=column < d, other=0.0).to(tl.float32)
        centred = tl.where(column < d, v - mu, 0.0)
        squares += centred * centred
    r = 1 / tl.sqrt(tl.sum(squares, axis=0) / d + eps)
    for first in tl.range(0, d, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        v = tl.load(normalised + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        result = (v - mu) * r * w
        if bias is not None:
            b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            result += b
        tl.store(out + row * out_stride + column, narrow(result, out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def _layer_norm_row_means(
    dy,  # (rows, d)
    x,  # (rows, d)
    weight,  # (d,)
    mean,  # (rows,) fp32, or None: RMSNorm
    rstd,  # (rows,) fp32
    row_means,  # (2, rows) fp32: Σ(γ dy x̂) / d and Σ(γ dy) / d; (1, rows) for RMSNorm, which has the first
    rows,
    d,
    dy_stride,
    x_stride,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mu = 0.0
    if mean is not None:
        mu = tl.load(mean + row)
    r = tl.load(rstd + row)
    g_x_hat = tl.zeros([BLOCK], dtype=tl.float32)
    g_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, d, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        g = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        g_x_hat += g * ((v - mu) * r)
        if mean is not None:
            g_sum += g
    tl.store(row_means + row, tl.sum(g_x_hat, axis=0) / d)
    if mean is not None:
        tl.store(row_means + rows + row, tl.sum(g_sum, axis=0) / d)


def row_means_launch(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, row_means: Tensor
) -> Launch:
    rows, d = x.shape
    return Launch(
        _layer_norm_row_means,
        (rows,),
        {
            "dy": dy,
            "x": x,
            "weight": weight.contiguous(),
            "mean": mean,
            "rstd": rstd,
            "row_means": row_means,
            "rows": rows,
            "d": d,
            "dy_stride": dy.stride(0),
            "x_stride": x.stride(0),
        },
        {"BLOCK": TILE, "STAGES": 3},
        num_warps=8,
    )
