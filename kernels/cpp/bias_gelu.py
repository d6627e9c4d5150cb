"""GELU with a bias in C++; the contract is `reference/bias_gelu.py`'s, for fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ._tensors import address, code, matrix, vector

_OP = "bias_gelu"


def forward(
    x: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor | None = None,
    approximate: str = "tanh",
    carry: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `reference.bias_gelu.forward`. Raises TypeError for another dtype, ValueError for a shape or stride."""
    dtype, tanh = code(_OP, x.dtype), _tanh(approximate)
    if carry is not None:
        carry[1].copy_(carry[0])
    rows, columns = x.shape
    out = x.new_empty(x.shape) if out is None else out
    wide_bias = None if bias is None else vector(_OP, "bias", bias, columns)
    cpu.bias_gelu_forward(
        dtype,
        tanh,
        rows,
        columns,
        matrix(_OP, "x", x, x),
        matrix(_OP, "out", out, x),
        address(wide_bias),
        torch.get_num_threads(),
    )
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
    """See `reference.bias_gelu.backward`. Raises TypeError for another dtype, ValueError for a shape or stride."""
    dtype, tanh = code(_OP, x.dtype), _tanh(approximate)
    if carry is not None:
        carry[1].copy_(carry[0])
    rows, columns = x.shape
    dx = x.new_empty(x.shape) if dx is None else dx
    wide_bias = None if bias is None else vector(_OP, "bias", bias, columns)
    dbias = x.new_empty(columns, dtype=torch.float32)
    cpu.bias_gelu_backward(
        dtype,
        tanh,
        rows,
        columns,
        matrix(_OP, "dout", dout, x),
        matrix(_OP, "x", x, x),
        matrix(_OP, "dx", dx, x),
        matrix(_OP, "activation", activation, x),
        address(wide_bias),
        address(dbias),
        torch.get_num_threads(),
    )
    return dx, dbias


def _tanh(approximate: str) -> bool:
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate={approximate!r}; expected 'tanh' or 'none'")
    return approximate == "tanh"
