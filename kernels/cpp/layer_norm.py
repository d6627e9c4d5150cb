"""Layer normalisation in C++; the contract is `reference/layer_norm.py`'s, for fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ..reference.layer_norm import UNTOUCHED, ResidualStream
from ._tensors import described, maybe, wide

_OP = "layer_norm"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    stream: ResidualStream = UNTOUCHED,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `reference.layer_norm.forward`. Raises TypeError for another dtype, ValueError for a shape or stride."""
    residual, summed, shift, shifted = stream
    out = x.new_empty(x.shape) if out is None else out
    if residual is not None and summed is None:
        summed = x.new_empty(x.shape)
    wide_weight, wide_bias = wide(weight), None if bias is None else wide(bias)
    wide_shift = None if shift is None or shifted is None else wide(shift)
    statistics = x.new_empty((2, x.shape[0]), dtype=torch.float32)
    mean, rstd = None if bias is None else statistics[0], statistics[1]
    cpu.layer_norm_forward(
        described(_OP, x),
        maybe(_OP, residual),
        maybe(_OP, summed),
        described(_OP, out),
        maybe(_OP, shifted),
        described(_OP, wide_weight),
        maybe(_OP, wide_bias),
        maybe(_OP, wide_shift),
        eps,
        maybe(_OP, mean),
        described(_OP, rstd),
        torch.get_num_threads(),
    )
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
    """See `reference.layer_norm.backward`. Raises TypeError for another dtype, ValueError for a shape or stride."""
    dx = x.new_empty(x.shape) if dx is None else dx
    wide_weight, means, rstds = wide(weight), None if mean is None else wide(mean), wide(rstd)
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    dweight, dbias = sums[0], None if mean is None else sums[1]
    cpu.layer_norm_backward(
        described(_OP, dy),
        described(_OP, x),
        maybe(_OP, residual_grad),
        described(_OP, dx),
        described(_OP, wide_weight),
        maybe(_OP, means),
        described(_OP, rstds),
        described(_OP, dweight),
        maybe(_OP, dbias),
        torch.get_num_threads(),
    )
    return dx, dweight, dbias
