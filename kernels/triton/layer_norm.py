"""LayerNorm in Triton, a row in registers; `layer_norm_wide` has what wider rows need.

Of a row x of n elements, with gradient dy of y (Ba et al., arXiv 1607.06450):

    μ = Σ x / n;  rstd = 1 / sqrt(Σ (x - μ)² / n + ε);  x̂ = (x - μ) rstd;  y = γ x̂ + β
    dx = rstd (γ dy - Σ(γ dy) / n - x̂ Σ(γ dy x̂) / n), plus the residual's gradient;  dγ = Σ_rows dy x̂;  dβ = Σ_rows dy

Bytes per element (16-bit): forward 2 + 2, with a residual 4 more, with `shifted` 2 more; backward 2 + 2 + 2, with the
residual's gradient 2 more.

The backward pass keeps every multiprocessor reading. Its grid is what the GPU holds at once, so that each
multiprocessor has the same number of rows, give or take one tile; and while a program sums one tile of rows, which
takes several barriers, the next two are on their way into shared memory (on AMD, into registers). dweight and dbias:
each program sums its rows in registers and writes one partial row (some 6% of the bytes at phi-1.5's shapes on an
H100), and a second pass adds these in a fixed order. Rows of more than WIDE elements do not fit in registers beside
those sums: a kernel before it forms the two means of each row, and the columns are then taken tile by tile, so that dy
and x are read twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.layer_norm import UNTOUCHED, ResidualStream
from .common import Launch, multiprocessors, next_power_of_2, refuse_double
from .grid import split_program
from .launching import launch
from .layer_norm_wide import TILE, _layer_norm_forward_wide, row_means_launch
from .rounding import narrow
from .tiles import RowCase, Tunable, bucket, words

WIDEST = 32768  # elements of a row
WIDE_FORWARD = 16384  # beyond these, registers do not hold a row of the forward
WIDE = 8192  # and of the backward, beside the sums of dweight and dbias
WARPS = 16  # of the backward on a multiprocessor in 16 bits; with up to 128 registers per thread all are resident
PREFETCH = 96 * 1024  # bytes ahead of the backward's sums on a multiprocessor; consumer cards have 99 KB per block


class ForwardTile(NamedTuple):
    warps: int


class BackwardTile(NamedTuple):
    warps: int
    resident: int
    """Programs on each multiprocessor, each with a partial row of sums."""


_WARPS = (1, 2, 4, 8, 16)
FORWARD = Tunable("layer_norm.forward", ForwardTile, RowCase, {"warps": _WARPS})
BACKWARD = Tunable("layer_norm.backward", BackwardTile, RowCase, {"warps": (4, 8, 16), "resident": (1, 2, 3, 4)})


@triton.jit
def _layer_norm_forward(
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
    mu = 0.0
    if mean is not None:
        mu = tl.sum(v, axis=0) / d
        tl.store(mean + row, mu)
    centred = tl.where(inside, v - mu, 0.0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / d + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result = centred * r * w
    if bias is not None:
        b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        result += b
    tl.store(out + row * out_stride + column, narrow(result, out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def _layer_norm_backward(
    dy,  # (rows, d)
    x,  # (rows, d)
    weight,  # (d,)
    mean,  # (rows,) fp32, or None: RMSNorm, which has neither the mean of γ dy nor dbias
    rstd,  # (rows,) fp32
    row_means,  # (2, rows) fp32, of `row_means_launch`; None where a tile holds whole rows
    residual_grad,  # (rows, d) or None
    dx,  # (rows, d)
    partial,  # (2, programs of a column, d) fp32: sums of dweight and dbias over a program's rows; (1, ...) for RMSNorm
    rows,
    d,
    dy_stride,
    x_stride,
    residual_grad_stride,
    dx_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    parts = tl.cdiv(d, BLOCK)
    program, part = split_program(parts)
    programs = tl.num_programs(0) // parts
    column = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    last = (rows - 1) // ROWS  # there are no more programs than tiles, and no sum here passes 2³¹
    for i in tl.range(0, (last - program) // programs + 1, num_stages=STAGES):
        row = (tl.cast(i, tl.int64) * programs + program) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < d)
        g = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        mu = 0.0
        if mean is not None:
            mu = tl.load(mean + row, mask=row < rows, other=0.0)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        x_hat = (v - mu) * r  # beyond the row's end g is 0
        dweight += g * x_hat
        if mean is not None:
            dbias += g
        g *= w
        if row_means is None:
            c1 = tl.sum(g * x_hat, axis=1, keep_dims=True) / d
        else:
            c1 = tl.load(row_means + row, mask=row < rows, other=0.0)
        c2 = 0.0
        if mean is not None:
            if row_means is None:
                c2 = tl.sum(g, axis=1, keep_dims=True) / d
            else:
                c2 = tl.load(row_means + rows + row, mask=row < rows, other=0.0)
        result = (g - c2 - x_hat * c1) * r
        if residual_grad is not None:
            residual = tl.load(residual_grad + row * residual_grad_stride + column, mask=inside, other=0.0)
            result += residual.to(tl.float32)
        tl.store(dx + row * dx_stride + column, narrow(result, dx.dtype.element_ty), mask=inside)
    own = part * BLOCK + tl.arange(0, BLOCK)
    at = partial + program.to(tl.int64) * d + own
    tl.store(at, tl.sum(dweight, axis=0), mask=own < d)
    if mean is not None:
        tl.store(at + programs.to(tl.int64) * d, tl.sum(dbias, axis=0), mask=own < d)


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
    d = x.shape[1]
    each = 16 if stream.residual is None else 8  # elements per thread: in 16 bits, two loads of 128 bits
    by_hand = ForwardTile(8 if d > WIDE_FORWARD else max(1, min(16, _block(d) // (32 * each))))
    return FORWARD.tile(x.device, by_hand, _case, x, stream.residual, stream.shift)


def _backward_tile(x: Tensor, residual_grad: Tensor | None) -> BackwardTile:
    # 8 elements per thread, or 16 for rows of more than 4096: the sums stay in registers
    d = x.shape[1]
    narrow = _shape(d)[1] <= TILE
    warps = 8 if narrow and (x.element_size() == 2 or d <= 1024) else WARPS
    return BACKWARD.tile(x.device, BackwardTile(warps, 2 if narrow else 1), _case, x, residual_grad, None)


def _forward_launch(
    tile: ForwardTile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    stream: ResidualStream,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> Launch:
    residual, summed, shift, shifted = stream
    rows, d = x.shape
    whole = {"BLOCK": _block(d)}
    return Launch(
        _layer_norm_forward_wide if d > WIDE_FORWARD else _layer_norm_forward,
        (rows,),
        {
            "x": x,
            "weight": weight.contiguous(),
            "bias": None if bias is None else bias.contiguous(),
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
        {"BLOCK": TILE, "STAGES": 3} if d > WIDE_FORWARD else whole,
        num_warps=tile.warps,
        tile=tile,
    )


def _shape(d: int) -> tuple[int, int]:
    """Rows and columns that a program of the backward holds at once."""
    columns = TILE if d > WIDE else next_power_of_2(d)
    return max(1, TILE // columns), columns


def _programs(tile: BackwardTile, rows: int, d: int, device: torch.device) -> int:
    """Programs that share out the rows of each column: as many as the device holds, but no more than tiles."""
    rows_each, columns = _shape(d)
    resident = multiprocessors(device) * tile.resident
    return min(triton.cdiv(rows, rows_each), max(1, resident // triton.cdiv(d, columns)))


def _stages(tile: BackwardTile, d: int, *read: Tensor | None) -> int:
    """Pipeline stages of the backward's loop: the tiles prefetched per tensor, plus one."""
    rows_each, columns = _shape(d)
    size = sum(x.element_size() for x in read if x is not None) * rows_each * columns
    return 1 + min(2, PREFETCH // (size * tile.resident))


def _backward_launch(
    tile: BackwardTile,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    row_means: Tensor | None,
    residual_grad: Tensor | None,
    dx: Tensor,
    partial: Tensor,
) -> Launch:
    rows, d = x.shape
    rows_each, columns = _shape(d)
    return Launch(
        _layer_norm_backward,
        (partial.shape[1] * triton.cdiv(d, columns),),
        {
            "dy": dy,
            "x": x,
            "weight": weight.contiguous(),
            "mean": mean,
            "rstd": rstd,
            "row_means": row_means,
            "residual_grad": residual_grad,
            "dx": dx,
            "partial": partial,
            "rows": rows,
            "d": d,
            "dy_stride": dy.stride(0),
            "x_stride": x.stride(0),
            "residual_grad_stride": _stride(residual_grad),
            "dx_stride": dx.stride(0),
        },
        {"ROWS": rows_each, "BLOCK": columns, "STAGES": _stages(tile, d, dy, x, residual_grad)},
        num_warps=tile.warps,
        tile=tile,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    stream: ResidualStream = UNTOUCHED,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Same contract as `reference.layer_norm.forward`. Raises TypeError for fp64, ValueError for rows of more than
    32768."""
    refuse_double("layer_norm", x)
    rows, _ = x.shape
    out = x.new_empty(x.shape) if out is None else out
    statistics = x.new_empty((2, rows), dtype=torch.float32)
    mean, rstd = None if bias is None else statistics[0], statistics[1]
    if stream.residual is not None and stream.summed is None:
        stream = stream._replace(summed=x.new_empty(x.shape))
    if rows:
        launch(_forward_launch, _forward_tile(x, stream), x, weight, bias, eps, stream, out, mean, rstd)
    return out, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Same contract as `reference.layer_norm.backward`. Raises TypeError for fp64, ValueError for rows of more than
    32768."""
    refuse_double("layer_norm", x)
    rows, d = x.shape
    dx = x.new_empty(x.shape) if dx is None else dx
    tile = _backward_tile(x, residual_grad)
    sums = 1 if mean is None else 2
    partial = x.new_empty((sums, _programs(tile, rows, d, x.device), d), dtype=torch.float32)
    row_means = x.new_empty((sums, rows), dtype=torch.float32) if d > WIDE else None
    if rows:
        if row_means is not None:
            launch(row_means_launch, dy, x, weight, mean, rstd, row_means)
        launch(_backward_launch, tile, dy, x, weight, mean, rstd, row_means, residual_grad, dx, partial)
    dweight, *dbias = partial.sum(1)
    return dx, dweight, dbias[0] if dbias else None
