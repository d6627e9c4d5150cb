"""act(gate) · up in Triton over tiles of rows × columns, and both gradients in one pass.

    silu:      act(x) = x σ(x);  act'(x) = σ(x) + x σ(x) σ(-x)
    gelu_tanh: bias_gelu's tanh form
    dgate = dout up act'(gate);  dup = dout act(gate)

Bytes per element (16-bit): forward 2 + 2 read, 2 written; backward 2 + 2 + 2 read, 2 + 2 written.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .bias_gelu import WIDEST, _gelu_and_slope, _sigmoids
from .common import Launch, next_power_of_2, refuse_double
from .grid import split_program
from .launching import launch
from .rounding import narrow
from .tiles import RowCase, Tunable, bucket, words

ROWS, COLUMNS, ELEMENTS = 4, 512, 1024  # of a tile, and of a warp: 16 or 32 elements per thread and operand


class Tile(NamedTuple):
    rows: int
    columns: int
    """At most: a row may have less."""
    warps: int


_TRIED = {"rows": (1, 2, 4, 8, 16), "columns": (256, 512, 1024, 2048), "warps": (1, 2, 4, 8)}
FORWARD = Tunable("gated_activation.forward", Tile, RowCase, _TRIED)
BACKWARD = Tunable("gated_activation.backward", Tile, RowCase, _TRIED)


@triton.jit
def _activate(x, SILU: tl.constexpr):
    """act(x) and act'(x); the compiler drops what is not used. x σ(x) is a quotient, which is rounded once less."""
    if SILU:
        t = tl.exp(-tl.abs(x))
        gate, product = _sigmoids(x)
        return x * tl.where(x >= 0, 1.0, t) / (1 + t), gate + x * product
    return _gelu_and_slope(x, True)


@triton.jit
def _forward(
    gate,  # (rows, n)
    up,  # (rows, n)
    out,  # (rows, n)
    rows,
    n,
    gate_stride,
    up_stride,
    out_stride,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, tile = split_program(tl.cdiv(n, COLUMNS))
    row = (group.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < n)
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    value, _ = _activate(g, SILU)
    tl.store(out + row * out_stride + column, narrow(value * u, out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dout,  # (rows, n)
    gate,  # (rows, n)
    up,  # (rows, n)
    dgate,  # (rows, n)
    dup,  # (rows, n)
    rows,
    n,
    dout_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, tile = split_program(tl.cdiv(n, COLUMNS))
    row = (group.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < n)
    d = tl.load(dout + row * dout_stride + column, mask=inside).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    value, slope = _activate(g, SILU)
    tl.store(dgate + row * dgate_stride + column, narrow(d * u * slope, dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * dup_stride + column, narrow(d * value, dup.dtype.element_ty), mask=inside)


def _case(gate: Tensor, activation: str) -> RowCase:
    rows, n = gate.shape
    return RowCase(words(gate.dtype), next_power_of_2(n), bucket(rows), activation)


def _tile(tunable: Tunable, gate: Tensor, activation: str) -> Tile:
    by_hand = Tile(ROWS, COLUMNS, max(1, ROWS * min(COLUMNS, next_power_of_2(gate.shape[1])) // ELEMENTS))
    return tunable.tile(gate.device, by_hand, _case, gate, activation)


def _describe(kernel, tile: Tile, operands: dict[str, Tensor], activation: str) -> Launch:
    """The launch of a kernel on operands of one shape."""
    rows, n = operands["gate"].shape
    if n > WIDEST:
        raise ValueError(f"gated_activation in Triton takes rows of up to {WIDEST} elements, not {n}; use('reference')")
    columns = min(tile.columns, next_power_of_2(n))
    strides = {f"{name}_stride": x.stride(0) for name, x in operands.items()}
    return Launch(
        kernel,
        (triton.cdiv(rows, tile.rows) * triton.cdiv(n, columns),),
        {**operands, "rows": rows, "n": n, **strides},
        {"SILU": activation == "silu", "ROWS": tile.rows, "COLUMNS": columns},
        num_warps=tile.warps,
        tile=tile,
    )


def _forward_launch(tile: Tile, gate: Tensor, up: Tensor, out: Tensor, activation: str) -> Launch:
    return _describe(_forward, tile, {"gate": gate, "up": up, "out": out}, activation)


def _backward_launch(
    tile: Tile, dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str
) -> Launch:
    operands = {"dout": dout, "gate": gate, "up": up, "dgate": dgate, "dup": dup}
    return _describe(_backward, tile, operands, activation)


def forward(gate: Tensor, up: Tensor, *, out: Tensor | None = None, activation: str = "silu") -> Tensor:
    """Same contract as `reference.gated_activation.forward`. Raises TypeError for fp64."""
    refuse_double("gated_activation", gate)
    out = gate.new_empty(gate.shape) if out is None else out
    if gate.numel():
        launch(_forward_launch, _tile(FORWARD, gate, activation), gate, up, out, activation)
    return out


def backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.gated_activation.backward`. Raises TypeError for fp64."""
    refuse_double("gated_activation", gate)
    dgate = gate.new_empty(gate.shape) if dgate is None else dgate
    dup = up.new_empty(up.shape) if dup is None else dup
    if gate.numel():
        launch(_backward_launch, _tile(BACKWARD, gate, activation), dout, gate, up, dgate, dup, activation)
    return dgate, dup
