"""Layer normalisation in C++; the contract is `reference/layer_norm.py`'s, for fp32, bf16 and fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from phi_fast._C import cpu

from ._tensors import address, code, matrix, vector

_OP = "layer_norm"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    summed: Tensor | None = None,
    shift: Tensor | None = None,
    shifted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.layer_norm.forward`. Raises TypeError for another dtype, ValueError for a shape or stride."""
    dtype = code(_OP, x.dtype)
    rows, columns = x.shape
    out = x.new_empty(x.shape) if out is None else out
    if residual is not None and summed is None:
        summed = x.new_empty(x.shape)
    wide_weight, wide_bias = vector(_OP, "weight", weight, columns), vector(_OP, "bias", bias, columns)
    wide_shift = None if shift is None or shifted is None else vector(_OP, "shift", shift, columns)
    mean, rstd = x.new_empty((2, rows), dtype=torch.float32).unbind()
    cpu.layer_norm_forward(
        dtype,
        rows,
        columns,
        matrix(_OP, "x", x, x),
        matrix(_OP, "residual", residual, x),
        matrix(_OP, "summed", summed, x),
        matrix(_OP, "out", out, x),
        matrix(_OP, "shifted", shifted, x),
        address(wide_weight),
        address(wide_bias),
        address(wide_shift),
        eps,
        address(mean),
        address(rstd),
        torch.get_num_threads(),
    )
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
    """See `reference.layer_norm.backward`. Raises TypeError for another dtype, ValueError for a shape or stride."""
    dtype = code(_OP, x.dtype)
    rows, columns = x.shape
    dx = x.new_empty(x.shape) if dx is None else dx
    wide_weight = vector(_OP, "weight", weight, columns)
    means, rstds = vector(_OP, "mean", mean, rows), vector(_OP, "rstd", rstd, rows)
    dweight, dbias = x.new_empty((2, columns), dtype=torch.float32).unbind()
    cpu.layer_norm_backward(
        dtype,
        rows,
        columns,
        matrix(_OP, "dy", dy, x),
        matrix(_OP, "x", x, x),
        matrix(_OP, "residual_grad", residual_grad, x),
        matrix(_OP, "dx", dx, x),
        address(wide_weight),
        address(means),
        address(rstds),
        address(dweight),
        address(dbias),
        torch.get_num_threads(),
    )
    return dx, dweight, dbias
