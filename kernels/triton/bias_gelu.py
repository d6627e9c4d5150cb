"""gelu(x + bias) in Triton over tiles of rows × columns.

With u = x + b, φ and Φ the normal density and distribution (Hendrycks and Gimpel, arXiv 1606.08415):

    exact: y = u Φ(u);  dx = dy (Φ(u) + u φ(u))
    tanh:  y = u σ(2 w), w = sqrt(2/π) (u + 0.044715 u³);  dx = dy σ(2w) (1 + 2 u (1 - σ(2w)) w')
    db = Σ_rows dx

Bytes per element (16-bit): forward 2 + 2; backward 2 + 2 read, 2 written, and 2 more where the activation is written
again. The bias's gradient: a program walks down its rows with a sum a column in registers, writes one partial row for
ROWS_EACH rows (1% of the bytes), and a second pass adds those in a fixed order.

tanh form: x · (1 + tanh u) / 2 = x · sigmoid(2u), which keeps its digits where 1 + tanh u cancels: the gradient's
largest error is a fifth of torch's in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Launch, next_power_of_2, refuse_double
from .grid import split_program
from .launching import launch
from .rounding import narrow
from .tiles import RowCase, Tunable, bucket, words

ROWS, COLUMNS = 4, 1024  # a tile of the forward: 32 elements per thread, 8 of them a load of 128 bits
ROWS_BACKWARD, COLUMNS_BACKWARD = 4, 512  # of the backward: 4 rows at once keep the sums of many rows accurate
WIDEST = 2**30  # elements of a row: the columns of a grid's last tile are still 32 bits
ROWS_EACH = 64  # rows a program of the backward walks down


class ForwardTile(NamedTuple):
    rows: int
    columns: int
    """At most: a row may have less."""
    warps: int


class BackwardTile(NamedTuple):
    rows: int
    columns: int
    warps: int
    rows_each: int
    """Rows that a program walks down, a multiple of `rows`."""


_SIDES = {"rows": (1, 2, 4, 8, 16), "warps": (1, 2, 4, 8)}
FORWARD = Tunable("bias_gelu.forward", ForwardTile, RowCase, {**_SIDES, "columns": (256, 512, 1024, 2048)})
BACKWARD = Tunable(
    "bias_gelu.backward",
    BackwardTile,
    RowCase,
    {**_SIDES, "columns": (128, 256, 512, 1024), "rows_each": (32, 64, 128, 256)},
)


@triton.jit
def _sigmoids(x):
    """sigmoid(x), and sigmoid(x) sigmoid(-x).

    From exp(-|x|), which does not overflow; sigmoid(-x) is not 1 - sigmoid(x), which would cancel.
    """
    t = tl.exp(-tl.abs(x))
    large = 1 / (1 + t)
    small = t * large
    return tl.where(x >= 0, large, small), large * small


@triton.jit
def _gates(x):
    """sigmoid(2u), and sigmoid(2u) sigmoid(-2u), with 2u = 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    return _sigmoids(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)))


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:
        gate, _ = _gates(x)
        return x * gate
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_and_slope(x, TANH: tl.constexpr):
    if TANH:
        gate, product = _gates(x)
        return x * gate, gate + x * product * (1.5957691216057308 + 0.21406444881780073 * (x * x))
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _copy_tile(source, target, row, rows, column, width, source_stride, target_stride):
    inside = (row < rows)[:, None] & (column < width)[None, :]
    values = tl.load(source + row[:, None] * source_stride + column[None, :], mask=inside)
    tl.store(target + row[:, None] * target_stride + column[None, :], values, mask=inside)


@triton.jit
def _forward(
    x,  # (rows, n)
    bias,  # (n,) or None
    out,  # (rows, n)
    source,  # (rows, width) or None: copied to
    target,  # (rows, width)
    rows,
    n,
    width,
    x_stride,
    out_stride,
    source_stride,
    target_stride,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(n, COLUMNS)
    group, tile = split_program(tiles + tl.cdiv(width, COLUMNS))
    row = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    if tile >= tiles:
        if source is not None:
            _copy_tile(source, target, row, rows, column - tiles * COLUMNS, width, source_stride, target_stride)
    else:
        inside = (row < rows)[:, None] & (column < n)[None, :]
        v = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            v += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        result = narrow(_gelu(v, TANH), out.dtype.element_ty)
        tl.store(out + row[:, None] * out_stride + column[None, :], result, mask=inside)


@triton.jit
def _backward(
    dout,  # (rows, n)
    x,  # (rows, n)
    bias,  # (n,) or None
    dx,  # (rows, n)
    activation,  # (rows, n) or None
    partial,  # (groups, n) fp32: dx summed over a program's rows
    source,  # (rows, width) or None: copied to
    target,  # (rows, width)
    rows,
    n,
    width,
    dout_stride,
    x_stride,
    dx_stride,
    activation_stride,
    source_stride,
    target_stride,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_EACH: tl.constexpr,
):
    tiles = tl.cdiv(n, COLUMNS)
    group, tile = split_program(tiles + tl.cdiv(width, COLUMNS))
    group = group.to(tl.int64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, ROWS)
    if tile >= tiles:
        if source is not None:
            for start in range(0, ROWS_EACH, ROWS):
                row = group * ROWS_EACH + start + lanes
                _copy_tile(source, target, row, rows, column - tiles * COLUMNS, width, source_stride, target_stride)
    else:
        b = tl.zeros([1, COLUMNS], dtype=tl.float32)
        if bias is not None:
            b = tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, ROWS_EACH, ROWS):
            row = group * ROWS_EACH + start + lanes
            inside = (row < rows)[:, None] & (column < n)[None, :]
            v = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            g = tl.load(dout + row[:, None] * dout_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            value, slope = _gelu_and_slope(v + b, TANH)
            g *= slope
            total += tl.where(inside, g, 0.0)
            tl.store(dx + row[:, None] * dx_stride + column[None, :], narrow(g, dx.dtype.element_ty), mask=inside)
            if activation is not None:
                value = narrow(value, activation.dtype.element_ty)
                tl.store(activation + row[:, None] * activation_stride + column[None, :], value, mask=inside)
        tl.store(partial + group * n + column, tl.sum(total, axis=0), mask=column < n)


def _carried(carry: tuple[Tensor, Tensor] | None) -> dict:
    """The kernels' arguments for what is copied beside."""
    source, target = carry or (None, None)
    return {
        "source": source,
        "target": target,
        "width": 0 if source is None else source.shape[1],
        "source_stride": 0 if source is None else source.stride(0),
        "target_stride": 0 if target is None else target.stride(0),
    }


def _columns(n: int, width: int, most: int) -> tuple[int, int]:
    """(columns of a tile, tiles across both parts). Raises ValueError for columns that pass 32 bits."""
    if max(n, width) > WIDEST:
        raise ValueError(
            f"bias_gelu in Triton takes rows of up to {WIDEST} elements, not {max(n, width)}; use('reference')"
        )
    columns = min(most, next_power_of_2(max(n, width)))
    return columns, triton.cdiv(n, columns) + triton.cdiv(width, columns)


def _case(x: Tensor, bias: Tensor | None, approximate: str, activation: Tensor | None, carry: object) -> RowCase:
    rows, n = x.shape
    beside = {"bias": bias, "activation": activation, "carry": carry}
    given = (name for name, value in beside.items() if value is not None)
    return RowCase(words(x.dtype), next_power_of_2(n), bucket(rows), ", ".join((approximate, *given)))


def _most_columns(x: Tensor, carry: tuple[Tensor, Tensor] | None, most: int) -> int:
    return min(most, next_power_of_2(max(x.shape[1], 0 if carry is None else carry[0].shape[1])))


def _forward_tile(x: Tensor, bias: Tensor | None, approximate: str, carry: tuple[Tensor, Tensor] | None) -> ForwardTile:
    by_hand = ForwardTile(ROWS, COLUMNS, max(1, _most_columns(x, carry, COLUMNS) * ROWS // 1024))
    return FORWARD.tile(x.device, by_hand, _case, x, bias, approximate, None, carry)


def _backward_tile(
    x: Tensor,
    bias: Tensor | None,
    activation: Tensor | None,
    approximate: str,
    carry: tuple[Tensor, Tensor] | None,
) -> BackwardTile:
    warps = max(1, _most_columns(x, carry, COLUMNS_BACKWARD) * ROWS_BACKWARD * x.element_size() // 1024)
    by_hand = BackwardTile(ROWS_BACKWARD, COLUMNS_BACKWARD, warps, ROWS_EACH)
    return BACKWARD.tile(x.device, by_hand, _case, x, bias, approximate, activation, carry)


def _forward_launch(
    tile: ForwardTile,
    x: Tensor,
    bias: Tensor | None,
    out: Tensor,
    approximate: str,
    carry: tuple[Tensor, Tensor] | None,
) -> Launch:
    rows, n = x.shape
    carried = _carried(carry)
    columns, tiles = _columns(n, carried["width"], tile.columns)
    return Launch(
        _forward,
        (triton.cdiv(rows, tile.rows) * tiles,),
        {
            "x": x,
            "bias": None if bias is None else bias.contiguous(),
            "out": out,
            "rows": rows,
            "n": n,
            "x_stride": x.stride(0),
            "out_stride": out.stride(0),
            **carried,
        },
        {"TANH": approximate == "tanh", "ROWS": tile.rows, "COLUMNS": columns},
        num_warps=tile.warps,
        tile=tile,
    )


def _backward_launch(
    tile: BackwardTile,
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    activation: Tensor | None,
    partial: Tensor,
    approximate: str,
    carry: tuple[Tensor, Tensor] | None,
) -> Launch:
    rows, n = x.shape
    carried = _carried(carry)
    columns, tiles = _columns(n, carried["width"], tile.columns)
    return Launch(
        _backward,
        (partial.shape[0] * tiles,),
        {
            "dout": dout,
            "x": x,
            "bias": None if bias is None else bias.contiguous(),
            "dx": dx,
            "activation": activation,
            "partial": partial,
            "rows": rows,
            "n": n,
            "dout_stride": dout.stride(0),
            "x_stride": x.stride(0),
            "dx_stride": dx.stride(0),
            "activation_stride": 0 if activation is None else activation.stride(0),
            **carried,
        },
        {"TANH": approximate == "tanh", "ROWS": tile.rows, "COLUMNS": columns, "ROWS_EACH": tile.rows_each},
        num_warps=tile.warps,
        tile=tile,
    )


def forward(
    x: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor | None = None,
    approximate: str = "tanh",
    carry: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Same contract as `reference.bias_gelu.forward`. Raises TypeError for fp64."""
    refuse_double("bias_gelu", x)
    out = x.new_empty(x.shape) if out is None else out
    if x.numel():
        launch(_forward_launch, _forward_tile(x, bias, approximate, carry), x, bias, out, approximate, carry)
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    *,
    dx: Tensor | None = None,
    activation: Tensor | None = None,
    approximate: str = "tanh",
    carry: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.bias_gelu.backward`. Raises TypeError for fp64."""
    refuse_double("bias_gelu", x)
    rows, n = x.shape
    dx = x.new_empty(x.shape) if dx is None else dx
    tile = _backward_tile(x, bias, activation, approximate, carry)
    partial = x.new_empty((triton.cdiv(rows, tile.rows_each), n), dtype=torch.float32)
    if x.numel():
        launch(_backward_launch, tile, dout, x, bias, dx, activation, partial, approximate, carry)
    return dx, partial.sum(0)
