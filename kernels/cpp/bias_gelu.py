"""GELU with a bias in C++; the contract is `reference/bias_gelu.py`'s, for fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ._tensors import described, maybe, wide

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
    tanh = _tanh(approximate)
    if carry is not None:
        carry[1].copy_(carry[0])
    out = x.new_empty(x.shape) if out is None else out
    wide_bias = None if bias is None else wide(bias)
    cpu.bias_gelu_forward(tanh, described(_OP, x), described(_OP, out), maybe(_OP, wide_bias), torch.get_num_threads())
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
    tanh = _tanh(approximate)
    if carry is not None:
        carry[1].copy_(carry[0])
    dx = x.new_empty(x.shape) if dx is None else dx
    wide_bias = None if bias is None else wide(bias)
    dbias = x.new_empty(x.shape[1], dtype=torch.float32)
    cpu.bias_gelu_backward(
        tanh,
        described(_OP, dout),
        described(_OP, x),
        described(_OP, dx),
        maybe(_OP, activation),
        maybe(_OP, wide_bias),
        described(_OP, dbias),
        torch.get_num_threads(),
    )
    return dx, dbias


def _tanh(approximate: str) -> bool:
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate={approximate!r}; expected 'tanh' or 'none'")
    return approximate == "tanh"
