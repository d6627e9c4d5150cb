"""LayerNorm in Triton, a row in registers.

Of a row x of n elements, with gradient dy of y (Ba et al., arXiv 1607.06450):

    μ = Σ x / n;  rstd = 1 / sqrt(Σ (x - μ)² / n + ε);  x̂ = (x - μ) rstd;  y = γ x̂ + β
    dx = rstd (γ dy - Σ(γ dy) / n - x̂ Σ(γ dy x̂) / n), plus the residual's gradient;  dγ = Σ_rows dy x̂;  dβ = Σ_rows dy

Bytes per element (16-bit): forward 2 + 2, with a residual 4 more, with `shifted` 2 more; backward 2 + 2 + 2, with the
residual's gradient 2 more. dweight and dbias: each program sums its rows in registers and writes one partial row (at
most PROGRAMS of them, some 5% of the bytes at phi-1.5's shapes), which a second pass adds in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.layer_norm import UNTOUCHED, ResidualStream
from .common import Launch, next_power_of_2, refuse_double
from .launching import launch
from .rounding import narrow
from .tiles import RowCase, Tunable, bucket, words

PROGRAMS = 384  # of the backward: about three on each multiprocessor of an A100 or H100
WIDEST = 32768  # elements of a row that registers hold; the backward's five rows spill beyond 8192 (1.3 KB per thread)


class ForwardTile(NamedTuple):
    warps: int


class BackwardTile(NamedTuple):
    warps: int
    programs: int
    """At most so many, each with a partial row of sums."""


_WARPS = (1, 2, 4, 8, 16)
FORWARD = Tunable("layer_norm.forward", ForwardTile, RowCase, {"warps": _WARPS})
BACKWARD = Tunable(
    "layer_norm.backward", BackwardTile, RowCase, {"warps": _WARPS, "programs": (132, 264, PROGRAMS, 528, 792, 1056)}
)


@triton.jit
def _layer_norm_forward(
    x,  # (rows, d)
    weight,  # (d,)
    bias,  # (d,)
    out,  # (rows, d)
    mean,  # (rows,) fp32
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
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
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
    mu = tl.sum(v, axis=0) / d
    centred = tl.where(inside, v - mu, 0.0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / d + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    result = centred * r * w + b
    tl.store(out + row * out_stride + column, narrow(result, out.dtype.element_ty), mask=inside)
    tl.store(mean + row, mu)
    tl.store(rstd + row, r)


@triton.jit
def _layer_norm_backward(
    dy,  # (rows, d)
    x,  # (rows, d)
    weight,  # (d,)
    mean,  # (rows,) fp32
    rstd,  # (rows,) fp32
    residual_grad,  # (rows, d) or None
    dx,  # (rows, d)
    partial,  # (2, programs, d) fp32: sums of dweight and dbias over a program's rows
    rows,
    d,
    rows_each,
    dy_stride,
    x_stride,
    residual_grad_stride,
    dx_stride,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < d
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)
    first = program * rows_each
    for i in range(first, tl.minimum(first + rows_each, rows)):
        row = tl.cast(i, tl.int64)
        g = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        x_hat = tl.where(inside, (v - tl.load(mean + row)) * r, 0.0)
        dweight += g * x_hat
        dbias += g
        g *= w
        c1 = tl.sum(g * x_hat, axis=0) / d
        result = (g - tl.sum(g, axis=0) / d - x_hat * c1) * r
        if residual_grad is not None:
            residual = tl.load(residual_grad + row * residual_grad_stride + column, mask=inside, other=0.0)
            result += residual.to(tl.float32)
        tl.store(dx + row * dx_stride + column, narrow(result, dx.dtype.element_ty), mask=inside)
    at = partial + program.to(tl.int64) * d + column
    tl.store(at, dweight, mask=inside)
    tl.store(at + tl.num_programs(0).to(tl.int64) * d, dbias, mask=inside)


def _block(d: int) -> int:
    if d > WIDEST:
        raise ValueError(f"layer_norm in Triton takes rows of up to {WIDEST} elements, not {d}; use('reference')")
    return next_power_of_2(d)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _case(x: Tensor, residual: Tensor | None, shift: Tensor | None) -> RowCase:
    rows, d = x.shape
    given = [name for name, tensor in (("residual", residual), ("shift", shift)) if tensor is not None]
    return RowCase(words(x.dtype), _block(d), bucket(rows), ", ".join(given))


def _forward_tile(x: Tensor, stream: ResidualStream) -> ForwardTile:
    by_hand = ForwardTile(max(1, min(16, _block(x.shape[1]) // 512)))  # 16 elements per thread: two loads of 128 bits
    return FORWARD.tile(x.device, by_hand, _case, x, stream.residual, stream.shift)


def _backward_tile(x: Tensor, residual_grad: Tensor | None) -> BackwardTile:
    # 8 elements per thread: five fp32 rows stay in registers
    by_hand = BackwardTile(max(1, min(16, _block(x.shape[1]) // 256)), PROGRAMS)
    return BACKWARD.tile(x.device, by_hand, _case, x, residual_grad, None)


def _forward_launch(
    tile: ForwardTile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stream: ResidualStream,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Launch:
    residual, summed, shift, shifted = stream
    rows, d = x.shape
    block = _block(d)
    return Launch(
        _layer_norm_forward,
        (rows,),
        {
            "x": x,
            "weight": weight.contiguous(),
            "bias": bias.contiguous(),
            "out": out,
            "mean": mean,
            "rstd": rstd,
            "residual": residual,
            "summed": summed,
            "shift": None if shift is None else shift.contiguous(),
            "shifted": shifted,
            "d": d,
            "eps": float(eps),
            "x_stride": x.stride(0),
            "out_stride": out.stride(0),
            "residual_stride": _stride(residual),
            "summed_stride": _stride(summed),
            "shifted_stride": _stride(shifted),
        },
        {"BLOCK": block},
        num_warps=tile.warps,
        tile=tile,
    )


def _backward_launch(
    tile: BackwardTile,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None,
    dx: Tensor,
    partial: Tensor,
) -> Launch:
    rows, d = x.shape
    block = _block(d)
    programs = partial.shape[1]
    return Launch(
        _layer_norm_backward,
        (programs,),
        {
            "dy": dy,
            "x": x,
            "weight": weight.contiguous(),
            "mean": mean,
            "rstd": rstd,
            "residual_grad": residual_grad,
            "dx": dx,
            "partial": partial,
            "rows": rows,
            "d": d,
            "rows_each": triton.cdiv(rows, programs),
            "dy_stride": dy.stride(0),
            "x_stride": x.stride(0),
            "residual_grad_stride": _stride(residual_grad),
            "dx_stride": dx.stride(0),
        },
        {"BLOCK": block},
        num_warps=tile.warps,
        tile=tile,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stream: ResidualStream = UNTOUCHED,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.layer_norm.forward`. Raises TypeError for fp64, ValueError for rows of more than
    32768."""
    refuse_double("layer_norm", x)
    rows, _ = x.shape
    out = x.new_empty(x.shape) if out is None else out
    mean, rstd = x.new_empty((2, rows), dtype=torch.float32)
    if stream.residual is not None and stream.summed is None:
        stream = stream._replace(summed=x.new_empty(x.shape))
    if rows:
        launch(_forward_launch, _forward_tile(x, stream), x, weight, bias, eps, stream, out, mean, rstd)
    return out, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.layer_norm.backward`. Raises TypeError for fp64, ValueError for rows of more than
    32768."""
    refuse_double("layer_norm", x)
    rows, d = x.shape
    dx = x.new_empty(x.shape) if dx is None else dx
    tile = _backward_tile(x, residual_grad)
    rows_each = max(1, triton.cdiv(rows, tile.programs))
    partial = x.new_empty((2, triton.cdiv(rows, rows_each), d), dtype=torch.float32)
    if rows:
        launch(_backward_launch, tile, dy, x, weight, mean, rstd, residual_grad, dx, partial)
    dweight, dbias = partial.sum(1)
    return dx, dweight, dbias
